"""A model's weights in files: every rank writes a part of them, and one reader finds the file, or its parts.

    value_model.safetensors                                                        one process
    value_model-00001-of-00002.safetensors, value_model-00002-of-00002.safetensors  two ranks

A part has whole tensors, so any number of ranks reads them. All ranks gather each tensor, and one of them keeps it, so
that none takes memory for a whole model.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tppo.models.lora import is_adapter, plain_name, plain_weights
from tppo.parallel.ranks import Ranks
from tppo.parallel.tensors import like, whole

LAYER = re.compile(r".*?\.\d+(?=\.)")
"""What the names of a layer's tensors begin with: model.layers.7"""


def own_weights(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """This rank's part of the model as it is without adapters. Tied weights are there once, under the name that
    transformers reads. A collective where the model is sharded."""
    state = {plain_name(name): t for name, t in model.state_dict(keep_vars=True).items() if not is_adapter(name)}
    tied = getattr(model, "all_tied_weights_keys", {})
    once = {name: tensor for name, tensor in state.items() if state.get(tied.get(name, "")) is not tensor}
    return _kept(own_names(once, ranks), plain_weights(model))


def own_tensors(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """This rank's part of them. A collective where they are shards."""
    return _kept(own_names(tensors, ranks), ((name, whole(tensor)) for name, tensor in tensors.items()))


def _kept(names: set[str], tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors if name in names}


def own_names(tensors: Mapping[str, Tensor], ranks: Ranks) -> set[str]:
    """Of the tensors in this rank's part. The largest layer goes first, to the rank that has least; what is outside of
    layers counts as one each. A layer stays together: transformers stores some of its tensors as one."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        found = LAYER.match(name)
        layers[found[0] if found else name].append(name)
    sizes = [sum(tensors[name].numel() * tensors[name].element_size() for name in own) for own in layers.values()]
    return {name for own, counts in ranks.share(list(layers.values()), sizes) if counts for name in own}


def part_files(path: Path, parts: int) -> list[Path]:
    """Named as Hugging Face does; one part is `path` itself."""
    if parts == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{n:05d}-of-{parts:05d}{path.suffix}") for n in range(1, parts + 1)]


def weight_files(path: Path) -> list[Path]:
    """`path`, or its parts; empty where there is neither."""
    return [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Mapped from `path`, or from its parts. Raises OSError or SafetensorError."""
    return {name: tensor for file in weight_files(path) or [path] for name, tensor in load_file(file).items()}


def write_index(path: Path) -> None:
    """Which part has which tensor, for transformers and vLLM; nothing where there is one file."""
    if path.exists():
        return
    parts = {file.name: load_file(file) for file in weight_files(path)}
    total_bytes = sum(tensor.nbytes for own in parts.values() for tensor in own.values())
    weight_map = {name: file for file, own in parts.items() for name in own}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Whole weights into a model that may be sharded. Raises RuntimeError or KeyError when they do not fit."""
    for name, tensor in model.state_dict().items():
        if tensor.shape != weights[name].shape:
            raise RuntimeError(f"{name}: of shape {tuple(weights[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(like(tensor, weights[name]))
