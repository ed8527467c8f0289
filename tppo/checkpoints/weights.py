"""A model's weights in files: one reader finds the file, or its parts.

value_model.safetensors                                                        in one
value_model-00001-of-00002.safetensors, value_model-00002-of-00002.safetensors  in two, as Hugging Face names them
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tppo.parallel.tensors import like


def weight_files(path: Path) -> list[Path]:
    """`path`, or its parts; empty where there is neither."""
    return [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Mapped from `path`, or from its parts. Raises OSError or SafetensorError."""
    return {name: tensor for file in weight_files(path) or [path] for name, tensor in load_file(file).items()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Whole weights into a model that may be sharded. Raises RuntimeError or KeyError when they do not fit."""
    for name, tensor in model.state_dict().items():
        if tensor.shape != weights[name].shape:
            raise RuntimeError(f"{name}: of shape {tuple(weights[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(like(tensor, weights[name]))
