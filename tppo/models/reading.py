"""Reading what was saved with transformers, here or elsewhere: whatever that meets ends in one line."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # its name alone, nothing is unpickled here # nosec B403
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from profiling.errors import ConfigError, ToolkitError

MOST_LAYERS = 1_000
"""Layers, or experts of one. Beyond, building the model takes longer than reading its weights ever does."""
COUNTS = ("layer", "expert")
"""What the names of such fields hold."""
FEWEST_BYTES_PER_PARAMETER = 0.25
"""Of a file with weights: half of what 4 bits take."""


@contextmanager
def reading_model(fault: Callable[[str], ConfigError]) -> Iterator[None]:
    """fault: of a reason in one line, an error that names the setting. At a damaged file the libraries raise whatever
    their own code stumbles over, and the tokenizers' Rust panics, which Python sees as no Exception."""
    try:
        yield
    except ToolkitError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise fault(reason_of(error)) from error


def settings_of(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Of the model in a local directory, or on the hub. Raises ValueError where its config.json asks for more layers
    than any model has, and whatever transformers raises."""
    trust = {"trust_remote_code": trust_remote_code}
    check_counts(PreTrainedConfig.get_config_dict(path, **trust)[0])
    settings = AutoConfig.from_pretrained(path, **trust)
    assert isinstance(settings, PreTrainedConfig)
    return settings


def check_counts(values: Any) -> None:
    """Raises ValueError."""
    if isinstance(values, dict):
        for name, value in values.items():
            counts = isinstance(value, int) and any(word in str(name) for word in COUNTS)
            if counts and value > MOST_LAYERS:
                raise ValueError(f"{name} is {value}, and no model has more than {MOST_LAYERS:,}")
            check_counts(value)


def read_model(
    kind: Any,
    path: str,
    settings: PreTrainedConfig,
    *,
    weights: bool = True,
    trust_remote_code: bool = False,
    **how: Any,
) -> PreTrainedModel:
    """kind: one of transformers' Auto classes. how: its arguments. weights: False: none are read, on the meta device.
    Raises ValueError where weights are missing or of other shapes, and whatever transformers raises."""
    if not weights or not trust_remote_code:
        with torch.device("meta"):
            own = {name: value for name, value in how.items() if name != "use_safetensors"}
            shapes = kind.from_config(copy.deepcopy(settings), trust_remote_code=trust_remote_code, **own).eval()
        if not weights:
            return shapes
        check_the_weights_can_be_there(Path(path), shapes)
    model, facts = kind.from_pretrained(
        path, config=settings, trust_remote_code=trust_remote_code, output_loading_info=True, **how
    )
    absent = sorted(map(str, facts["missing_keys"] or facts["mismatched_keys"]))
    if absent:
        raise ValueError(f"it lacks weights: {absent[0]}")
    return model


def check_the_weights_can_be_there(folder: Path, shapes: PreTrainedModel) -> None:
    """Before memory is taken for what config.json describes. Raises ValueError. Of the hub's models nothing is known
    before they are here."""
    stored = sum(file.stat().st_size for end in ("safetensors", "bin") for file in folder.glob(f"*.{end}"))
    described = sum(parameter.numel() for parameter in shapes.parameters())
    if stored and described * FEWEST_BYTES_PER_PARAMETER > stored:
        raise ValueError(f"its config.json describes {described:,} parameters, and its weights have {stored:,} bytes")


def reason_of(error: BaseException) -> str:
    """transformers' message in one line, which names our setting where it names an argument of its own."""
    reason = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
    if "custom code" in reason:
        return "it comes with modelling code of its own; set model.trust_remote_code = true if you trust its author"
    if isinstance(error, UnpicklingError):  # torch's own words advise to execute it
        return "its weights are a pickle of more than tensors, which is not executed; take a model with safetensors"
    if isinstance(error, (TypeError, AttributeError, LookupError)):  # words of code, not of files
        return f"one of its files holds what cannot stand there ({type(error).__name__}: {reason})"
    return reason
