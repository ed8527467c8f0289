"""What a run directory may not decide: whose code is executed, and who is sent a secret.

A configuration that the user names is the user's own word. The config.toml inside a run directory may be somebody
else's: a run that was copied or downloaded is data, and evaluating it or going on with it executes nothing that the
command line does not name.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from profiling.errors import ConfigError
from profiling.settings import with_overrides

ADDRESSES_HERE = ("", "auto", "local")
"""Of Ray: no cluster, the one on this machine, one for this run."""


def check_code_is_asked_for(tables: Mapping[str, Any], overrides: Mapping[str, Any], *, where: str) -> None:
    """tables: of a run's own config.toml; overrides: dotted names that the command line gives. Raises ConfigError
    naming the field, and the words that allow it. Tables of wrong types are left to whoever checks them."""
    for field, given, does in decisions(with_overrides(tables, overrides)):
        if field not in overrides:
            raise ConfigError(
                f"{where}: {field} = {given:.200}: {does}, and a run directory does not decide that; if you trust it, "
                f"add --{field} {given:.200}"
            )


def words_that_allow(tables: Mapping[str, Any]) -> str:
    """What a command line that goes on with such a run has to say besides --resume RUN; empty, or begins with a
    space."""
    return "".join(f" --{field} {shlex.quote(given)}" for field, given, _ in decisions(tables))


def decisions(values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, its value, what it does) of everything in a configuration that only its user may decide."""

    def value(section: str, name: str) -> Any:
        table = values.get(section)
        return table.get(name) if isinstance(table, Mapping) else None

    kind = value("reward", "kind")
    function = value("reward", "function") if kind == "python" else None
    variable = (kind == "http" and value("reward", "header_env")) or None
    address = value("ray", "address") or ""
    found = (
        (
            "model.trust_remote_code",
            True if value("model", "trust_remote_code") else None,
            "executes code that a model brings",
        ),
        ("reward.function", function, "executes it"),
        ("reward.header_env", variable, "sends the variable's value to reward.url"),
        ("reward.url", value("reward", "url") if variable else None, "is sent the value of reward.header_env"),
        ("ray.address", None if address in ADDRESSES_HERE else address, "takes objects that execute code from there"),
    )
    return [
        (field, "true" if given is True else str(given), does) for field, given, does in found if given is not None
    ]
