"""Low-rank adapters (arXiv 2106.09685, through peft) inside the policy; everything else keeps seeing a plain model.

    W x  becomes  W x + s B A x        s = lora_alpha / lora_rank;  B = 0 at first, so the policy starts as it was

Only A and B train. Rollout engines, exports and `policy/` of a checkpoint get W + s B A under the plain names.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from profiling.errors import ConfigError, first_line
from tppo.config import ModelConfig
from tppo.models.dropout import RowDropout
from tppo.parallel.tensors import like, whole

ADAPTER = "default"
"""peft's name of the only adapter that a model has here."""
BASE = ".base_layer"
"""What peft puts into the name of a layer's own weights."""


def add_adapters(model: PreTrainedModel, settings: ModelConfig, seed: int) -> None:
    """In place; the rest of the model is frozen. seed: of A, the same on all ranks. Raises ConfigError when peft is
    missing or no layer has the names of lora_targets."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"model.lora_rank = {settings.lora_rank}: needs peft; install the extra `lora`, or set 0")
    from peft import LoraConfig, inject_adapter_in_model

    targets = settings.lora_targets if isinstance(settings.lora_targets, str) else list(settings.lora_targets)
    adapters = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout, target_modules=targets,
    )  # fmt: skip
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(adapters, model)
        except ValueError as error:
            reason = first_line(error)
            raise ConfigError(f"model.lora_targets = {targets!r}: {reason}") from None
    found = {name.rpartition(".")[2] for name, _ in adapted_layers(model)}
    if isinstance(targets, list) and (missing := [name for name in targets if name.rpartition(".")[2] not in found]):
        raise ConfigError(f"model.lora_targets = {targets!r}: no layer is named {missing[0]!r}; leave it out")
    for number, (name, layer) in enumerate(adapted_layers(model)):
        if not isinstance(layer.base_layer, nn.Linear):
            raise ConfigError(f"model.lora_targets = {targets!r}: {name} is no linear layer; leave it out")
        if layer.base_layer is model.get_output_embeddings() or layer is model.get_output_embeddings():
            raise ConfigError(f"model.lora_targets = {targets!r}: {name} is the output layer; leave it out")
        if settings.lora_dropout:
            layer.lora_dropout[ADAPTER] = RowDropout(settings.lora_dropout, number)  # type: ignore[index, operator, assignment]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and layer. By what they hold, so that peft need not be imported."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def has_adapters(model: nn.Module) -> bool:
    return any(True for _ in adapted_layers(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it started: s = 0. Nothing happens to a model without adapters."""
    layers = [layer for _, layer in adapted_layers(model)]
    before = [layer.scaling[ADAPTER] for layer in layers]  # type: ignore[index]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] = 0.0  # type: ignore[index, operator]
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = scale  # type: ignore[index, operator]


@torch.no_grad()
def plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state of the model as if it had no adapters, theirs merged into it: names of the plain model, whole tensors,
    one after the other. Collective where the model is sharded. The model stays as it is."""
    layers = dict(adapted_layers(model))
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            continue
        own = whole(tensor)
        layer, _, kind = name.rpartition(f"{BASE}.")
        if layer in layers and kind == "weight":
            own = own + _increment(layers[layer])
        yield plain_name(name), own


def is_adapter(name: str) -> bool:
    """Of an entry of a state."""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """Of an entry of a state, as it is without adapters."""
    return name.replace(f"{BASE}.", ".")


def _increment(layer: nn.Module) -> Float[Tensor, "out in"]:
    a, b = (getattr(layer, side)[ADAPTER].weight for side in ("lora_A", "lora_B"))  # (rank, in), (out, rank)
    return (whole(b) @ whole(a)) * layer.scaling[ADAPTER]  # type: ignore[index]


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every layer, whole, on the CPU. Collective where the model is sharded."""
    return {name: whole(tensor).cpu() for name, tensor in model.state_dict().items() if is_adapter(name)}


@torch.no_grad()
def load_adapters(model: nn.Module, adapters: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> None:
    """What `adapter_weights` gave. merged: the plain weights of the same moment. Raises KeyError or RuntimeError when
    they do not fit, ValueError when with them the model is another one: its base has changed."""
    own = {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
    if own.keys() != adapters.keys():
        raise KeyError("the adapters are of other layers")
    for name, tensor in own.items():
        tensor.copy_(like(tensor, adapters[name]))
    for name, weight in plain_weights(model):
        if name in merged and not torch.allclose(weight.cpu(), merged[name], atol=1e-5, rtol=1e-4):
            raise ValueError(f"model.path no longer holds the weights that the run started from ({name})")
