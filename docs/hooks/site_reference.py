"""Pages that the code writes itself: the command line, the settings of a training, the experiment file, figures."""

import argparse
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

WRITTEN = "*Written by the code itself when the site is built.*"


def pages() -> dict[str, str]:
    """Path relative to `docs/` -> the page."""
    return {
        "reference/cli.md": command_line(),
        "reference/training.md": training_settings(),
        "reference/experiment.md": experiment_file(),
        "reference/figures.md": figures(),
    }


def command_line() -> str:
    from tppo.cli import build_parser

    lines = ["# Command line", "", WRITTEN, "", f"{build_parser().description} {build_parser().epilog}", ""]
    for name in subcommands(build_parser()):
        parser = subcommands(build_parser(name))[name]
        lines += [f"## tppo {name}", "", sentence(parser.description or ""), ""]
        lines += ["| argument | | default |", "|---|---|---|"]
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                lines.append(f"| {spelling(action)} | {cell(help_of(parser, action))} | {default_of(action)} |")
        if parser.get_default("overrides"):
            lines.append("| `--section.key VALUE` | any field of the file | |")
        lines.append("")
    return "\n".join(lines)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    action = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


def spelling(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if not action.option_strings:
        shown = str(action.metavar or action.dest.upper())
        return f"`{shown} ...`" if action.nargs == "+" else f"`{shown}`"
    names = ", ".join(action.option_strings)
    return f"`{names} {value}`" if action.nargs != 0 and value else f"`{names}`"


def default_of(action: argparse.Action) -> str:
    nothing = any(action.default is each for each in (None, False, argparse.SUPPRESS)) or action.default == []
    if nothing or not action.option_strings:
        return "required" if action.required and action.option_strings else ""
    return f"`{action.default}`"


def help_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def training_settings() -> str:
    from tppo.config import RunConfig

    lines = ["# Settings of a training", "", WRITTEN, ""]
    lines += ["The TOML file of `tppo train`; `--section.field VALUE` on the command line wins over the file.", ""]
    plain = {name: field for name, field in RunConfig.model_fields.items() if not models_of(field)}
    lines += [*table(plain), ""]
    for name, field in RunConfig.model_fields.items():
        for model in models_of(field):
            lines += [f"## [{name}]", "", sentence(own_words(model)), "", *table(model.model_fields), ""]
    return "\n".join(lines)


def experiment_file() -> str:
    from simulator.experiment import Experiment

    lines = ["# Experiment file", "", WRITTEN, "", "What `tppo simulate` and `tppo sweep` read.", ""]
    for name, field in Experiment.model_fields.items():
        lines += [f"## [{name}]", ""]
        models = models_of(field)
        for model in models:
            if len(models) > 1:
                lines += [f'### {name}.kind = "{kind_of(model)}"', "", sentence(own_words(model)), ""]
            shown = {key: value for key, value in model.model_fields.items() if key != "kind"}
            lines += [*table(shown), ""] if shown else ["No further settings.", ""]
            for key, value in shown.items():
                lines += choices(f"{name}.{key}", value)
    return "\n".join(lines)


def choices(name: str, field: FieldInfo) -> Iterator[str]:
    """The kinds of a field that is itself a table."""
    models = models_of(field)
    if not models:
        return
    yield from (f"### {name}", "", "| kind | |", "|---|---|")
    for model in models:
        fields = {key: value for key, value in model.model_fields.items() if key != "kind"}
        yield f"| `{kind_of(model)}` | {'; '.join(described(key, value) for key, value in fields.items())} |"
    yield ""


def described(name: str, field: FieldInfo) -> str:
    default = default_text(field)
    text = cell(field.description or "").rstrip(".")
    return f"`{name}`" + (f" ({default})" if default else "") + (f": {text}" if text else "")


def figures() -> str:
    from analysis.figures import FIGURES

    lines = ["# Figures", "", WRITTEN, "", "`tppo plot RUN ... --figure NAME`, or `figures.NAME(runs)` in Python.", ""]
    lines += ["| figure | | below it |", "|---|---|---|"]
    for name, module in FIGURES.items():
        first = (module.__doc__ or "").strip().split("\n\n")[0]
        lines.append(f"| `{name}` | {cell(first)} | {cell(module.CAPTION)} |")
    return "\n".join([*lines, ""])


def table(fields: dict[str, FieldInfo]) -> list[str]:
    rows = [f"| `{name}` | {cell(field.description or '')} | {type_text(field.annotation)} | {default_text(field)} |"
            for name, field in fields.items()]  # fmt: skip
    return ["| field | | value | default |", "|---|---|---|---|", *rows]


def default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default is PydanticUndefined or isinstance(field.default, BaseModel):
        return ""
    value = field.default
    shown = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    if isinstance(value, str):
        shown = f'"{value}"'
    if isinstance(value, tuple):
        shown = str(list(value))
    return f"`{shown or value}`"


def type_text(annotation: Any) -> str:
    """A type as one would say it: choices, number, text."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if models_in(annotation):
        return "table"
    if get_origin(annotation) in (Union, types.UnionType):
        return ", or ".join(dict.fromkeys(type_text(a) for a in get_args(annotation) if a is not type(None)))
    if get_origin(annotation) is tuple:
        return "list"
    if get_origin(annotation) is not None:  # Annotated: a number with bounds
        return type_text(get_args(annotation)[0])
    words = {"int": "whole number", "float": "number", "bool": "true, false", "str": "text", "Path": "path"}
    return words.get(getattr(annotation, "__name__", ""), "")


def models_of(field: FieldInfo) -> list[type[BaseModel]]:
    return models_in(field.annotation)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def kind_of(model: type[BaseModel]) -> str:
    return ", ".join(map(str, get_args(model.model_fields["kind"].annotation)))


def own_words(model: type[BaseModel]) -> str:
    """The docstring of the class itself, not one that it inherits."""
    return model.__dict__.get("__doc__") or ""


def cell(text: str) -> str:
    """Text for a table's cell: one line, no bar and no tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def sentence(text: str) -> str:
    words = " ".join(text.split())
    return words[:1].upper() + words[1:] + ("" if not words or words.endswith((".", ":")) else ".")
