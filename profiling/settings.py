"""TOML files to frozen pydantic models; an unknown key is an error that names the nearest one."""

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from profiling.errors import ConfigError, shown
from profiling.files import opened


class Settings(BaseModel):
    """Base of every configuration section: frozen, strict about keys, field docstrings are the help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)
LARGEST_BYTES = 2**18
"""Of a file of settings."""
MOST_DOTS = 100
LONG_KEY = re.compile(rf"""(?:\.[ \t]*+(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+){{{MOST_DOTS}}}""")
"""tomllib's time for a dotted key grows with the square of its length: minutes for one of 100 KB."""


def read_toml(path: Path, *, regular: bool = False) -> dict[str, Any]:
    """The tables of a TOML file, which may be a pipe (tppo simulate <(...)) unless it must be `regular`. Raises
    ConfigError when it is missing, not a file, too large or not TOML."""
    try:
        with os.fdopen(opened(path), "rb") if regular else path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a name with a NUL
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if len(content) > LARGEST_BYTES:
        raise ConfigError(f"{path}: more than {LARGEST_BYTES >> 10} KiB: not a file of settings")
    try:
        return parse_toml(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Raises ValueError: tomllib's own, and where nesting or a number is beyond what Python follows."""
    if LONG_KEY.search(text):
        raise ValueError(f"a key of {MOST_DOTS} dots or more")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load_settings(path: Path, model: type[Model]) -> Model:
    return check_settings(read_toml(path), model, where=str(path))


def check_settings(values: Mapping[str, Any], model: type[Model], *, where: str) -> Model:
    """`values` as a `model`; the first fault becomes one line naming file, field, fault and remedy.
    Raises ConfigError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error.errors()[0], model)}") from None


def describe(fault: ErrorDetails, model: type[BaseModel]) -> str:
    keys = without_tags(model, [str(part) for part in fault["loc"]])
    name = ".".join(keys) or "the file"
    if fault["type"] == "extra_forbidden":
        siblings = sibling_keys(model, [str(part) for part in fault["loc"]][:-1])
        near = get_close_matches(keys[-1], siblings, n=1, cutoff=0.4)
        hint = f"; did you mean '{'.'.join([*keys[:-1], near[0]])}'?" if near else ""
        return f"unknown key '{name}'{hint}"
    if fault["type"] == "missing":
        return f"missing key '{name}'; add it"
    message = fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    value = "" if isinstance(given, Mapping) else f" = {shown(given, 77)}"
    return f"{name}{value}: {message[:1].lower()}{message[1:]}"


def without_tags(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """A fault's path as the user writes it: pydantic puts the tag of a discriminated union into it."""
    models, shown = [model], []
    for key in path:
        if any(key in m.model_fields for m in models) or not any(key in tags_of(m) for m in models):
            shown.append(key)
        models = step_into(models, key)
    return shown


def sibling_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the fields at `path` inside `model`."""
    models = [model]
    for key in path:
        models = step_into(models, key)
    return sorted({name for m in models for name in m.model_fields})


def step_into(models: list[type[BaseModel]], key: str) -> list[type[BaseModel]]:
    """The models that may stand at `key` of one of `models`; a tag of a union narrows the choice."""
    fields = [m.model_fields[key] for m in models if key in m.model_fields]
    if fields:
        return [inner for field in fields for inner in models_in(field.annotation)]
    return [m for m in models if key in tags_of(m)] or models


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for part in get_args(annotation) for inner in models_in(part)]


def tags_of(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}: what `with_overrides` takes."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        found |= flattened(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with dotted keys replaced: {"rollout.window": 85} sets values["rollout"]["window"]."""
    changed: dict[str, Any] = dict(values)
    for dotted, value in overrides.items():
        table = changed
        *sections, key = dotted.split(".")
        for section in sections:
            inner = table.get(section)
            table[section] = dict(inner) if isinstance(inner, Mapping) else {}
            table = table[section]
        table[key] = value
    return changed


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Command-line words `--section.key value` or `--section.key=value`; values are TOML, or else plain text.
    Raises ConfigError."""
    overrides: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"{word}: not an option; overrides are written --section.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise ConfigError(f"{word}: a value is missing")
            text = following
        overrides[key.replace("-", "_")] = _toml_literal(text)
    return overrides


def _toml_literal(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except (KeyError, ValueError):
        return text


def to_toml(values: Mapping[str, Any], within: str = "") -> str:
    """Nested tables of plain values as TOML; None is left out. within: the name of the table that these belong to."""
    lines, tables = [], []
    for key, value in values.items():
        if isinstance(value, dict):
            tables.append((key, value))
        elif value is not None:
            lines.append(f"{key} = {_toml_value(value)}")
    for name, table in tables:
        lines += ["", f"[{within}{name}]", to_toml(table, f"{within}{name}.").rstrip()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        pairs = (f"{key} = {_toml_value(own)}" for key, own in value.items() if own is not None)
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
