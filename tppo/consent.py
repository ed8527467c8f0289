"""What a run directory may not decide: whose code is executed.

A configuration that the user names is the user's own word. The config.toml inside a run directory may be somebody
else's: a run that was copied or downloaded is data, and evaluating it or going on with it executes nothing that the
command line does not name.
"""

from collections.abc import Mapping
from typing import Any

from profiling.errors import ConfigError
from profiling.settings import with_overrides

ADDRESSES_HERE = ("", "auto", "local")
"""Of Ray: no cluster, the one on this machine, one for this run."""


def check_code_is_asked_for(tables: Mapping[str, Any], overrides: Mapping[str, Any], *, where: str) -> None:
    """tables: of a run's own config.toml; overrides: dotted names that the command line gives. Raises ConfigError
    naming the field, and the words that allow it. Tables of wrong types are left to whoever checks them."""
    values = with_overrides(tables, overrides)

    def value(section: str, name: str) -> Any:
        table = values.get(section)
        return table.get(name) if isinstance(table, Mapping) else None

    function = value("reward", "function") if value("reward", "kind") == "python" else None
    address = value("ray", "address") or ""
    for field, given, does in (
        (
            "model.trust_remote_code",
            True if value("model", "trust_remote_code") else None,
            "executes code that a model brings",
        ),
        ("reward.function", function, "executes it"),
        ("ray.address", None if address in ADDRESSES_HERE else address, "takes objects that execute code from there"),
    ):
        if given is None or field in overrides:
            continue
        shown = "true" if given is True else str(given)
        raise ConfigError(
            f"{where}: {field} = {shown:.200}: {does}, and a run directory does not decide that; if you trust it, "
            f"add --{field} {shown:.200}"
        )
