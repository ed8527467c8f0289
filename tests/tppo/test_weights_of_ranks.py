"""Weights in several files are read like those of one."""

import torch
from safetensors.torch import save_file

from tppo.checkpoints.weights import read_weights, weight_files


def test_a_file_and_its_parts_are_read_alike(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2)}
    path = tmp_path / "value_model.safetensors"
    assert weight_files(path) == []
    for number, name in enumerate(tensors, start=1):
        save_file({name: tensors[name]}, tmp_path / f"value_model-0000{number}-of-00002.safetensors")
    in_parts = read_weights(path)
    save_file(tensors, path)
    for found in (in_parts, read_weights(path)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert weight_files(path) == [path]
