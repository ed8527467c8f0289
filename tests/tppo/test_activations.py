"""Activation checkpointing: the same losses and gradients from fewer bytes kept for the backward pass."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from profiling.errors import ConfigError
from tppo.models.activations import checkpoint_activations
from tppo.models.policy import load_policy, token_log_probs
from tppo.models.value import ValueModel

IDS = torch.arange(2, 50).view(2, 24)
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ROW, COLUMN = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 9, 12, 22])


def policy_loss(model):
    return -token_log_probs(model, IDS, ROW, COLUMN, IDS[ROW, COLUMN + 1]).log_probs.mean()


def value_loss(model):
    return (model(IDS, ROW, COLUMN) - 1.0).square().mean()


def gradients(model, loss):
    """Of the loss, and bytes that the forward pass kept for it, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(model)
    value.backward()
    return value.detach(), [p.grad for p in model.parameters()], sum(kept.values())


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_losses_and_gradients_are_equal_and_less_is_kept(loss, tiny_model):
    policy, _ = load_policy(str(tiny_model))
    model = policy if loss is policy_loss else ValueModel(policy)
    if loss is value_loss:
        nn.init.constant_(model.head.weight, 0.1)
    checkpointed = copy.deepcopy(model)
    checkpoint_activations(checkpointed)
    plain_value, plain, plain_bytes = gradients(model, loss)
    value, found, kept = gradients(checkpointed, loss)
    assert torch.equal(value, plain_value)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in plain)
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert kept < plain_bytes / 2


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES, intermediate_size=48, attention_dropout=0.5)),
        (OPTForCausalLM, OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5)),
    ],
)
def test_dropout_is_off_so_that_two_passes_are_equal(kind, own):
    """OPT drops what it adds up, and whole layers, by numbers of its own instead of by modules."""
    model = kind(own)
    model.train()
    assert not torch.equal(policy_loss(model), policy_loss(model))
    checkpoint_activations(model)
    assert model.training  # transformers checkpoints in training mode only
    assert torch.equal(policy_loss(model), policy_loss(model))


def test_a_model_that_cannot_is_refused_by_the_setting_s_name():
    with pytest.raises(ConfigError, match="activation_checkpointing: this model"):
        checkpoint_activations(nn.Linear(2, 2))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_trains_to_the_same_weights_with_and_without(lora_rank, make_config):
    from safetensors.torch import load_file

    from tppo.checkpoints.store import newest_usable
    from tppo.start import train

    if lora_rank:
        pytest.importorskip("peft")
    weights = []
    for checkpointing in (False, True):
        model = {"activation_checkpointing": checkpointing, "lora_rank": lora_rank}
        config = make_config(f"run{checkpointing}", train={"steps": 2}, model=model)
        train(config, show_progress=False)
        weights.append(load_file(newest_usable(config.output).path / "policy" / "model.safetensors"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-6, rtol=1e-5)
