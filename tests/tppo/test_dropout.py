"""Dropout before adapters: masks depend on the seed, the mini-batch, the row and the layer, and on nothing else."""

import random

import pytest
import torch

from profiling.reader import Run
from tests.tppo.killing import KILLED, assert_same_run, metrics_of, resume_to_the_end, train_in_child, train_seeded
from tests.tppo.ranks import on_ranks
from tests.tppo.test_ranks import assert_equal_runs, settings_of
from tppo.config import ModelConfig
from tppo.models.activations import checkpoint_activations
from tppo.models.dropout import Draws, RowDropout, draw_masks
from tppo.models.lora import add_adapters
from tppo.models.policy import load_policy
from tppo.start import train

pytest.importorskip("peft")


def dropping(make_config, name, algorithm="tppo", **train_settings):
    own = settings_of(algorithm)
    own["model"] = {**own.get("model", {}), "lora_rank": 4, "lora_dropout": 0.3}
    own["train"] = {**own["train"], **train_settings}
    return make_config(name, **own)


def masks(seed, rows, tokens, width, layer=0, hidden=64):
    """True: kept; (rows, width, hidden)."""
    layer = RowDropout(0.5, layer)
    draw_masks(layer, Draws(seed, rows, tokens))
    return layer(torch.ones(len(rows), width, hidden)) > 0


def test_a_share_p_is_dropped_and_the_mean_stays():
    layer = RowDropout(0.25, layer=0)
    draw_masks(layer, Draws(0, [7], [4000]))
    out = layer(torch.full((1, 4000, 64), 3.0))
    assert out.unique().tolist() == [0.0, 4.0]  # 3 / (1 - 1/4)
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.004)  # 256,000 draws: five standard errors


def test_a_rows_mask_is_its_own_whatever_it_is_computed_beside():
    together = masks(5, [3, 8], [20, 12], width=20)
    alone = masks(5, [8], [12], width=12)
    assert torch.equal(together[1, :12], alone[0])
    assert together[1, 12:].all()  # padding, which no one sees
    layer = RowDropout(0.5, layer=0)
    draw_masks(layer, Draws(5, [3, 8], [20, 12]))
    assert torch.equal(layer(torch.ones(40, 64)).view(2, 20, 64) > 0, together)  # rows x time, as some layers have it


def test_no_two_rows_layers_positions_or_mini_batches_share_a_mask():
    """Of two that have nothing to do with each other, half of the entries are equal: 64,000 of them, to within five
    standard errors."""
    one = masks(5, [3], [1000], width=1000)
    for other in (
        masks(6, [3], [1000], width=1000), masks(5, [4], [1000], width=1000), masks(5, [3], [1000], 1000, layer=1),
        one.roll(1, dims=1),
    ):  # fmt: skip
        assert (one == other).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_layer_that_is_computed_again_drops_the_same(tiny_model):
    ids, gradients = torch.arange(2, 20).view(2, 9), []
    for checkpointed in (False, True):
        model, _ = load_policy(str(tiny_model))
        add_adapters(model, ModelConfig(lora_rank=2, lora_dropout=0.4), seed=0)
        if checkpointed:
            checkpoint_activations(model)
        draw_masks(model, Draws(1, [0, 1], [9, 9]))
        model(input_ids=ids).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if ".lora_B." in name})
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_the_same_seed_gives_the_same_run_whatever_the_process_drew_before(make_config):
    found = []
    for name in ("one", "other"):
        config = dropping(make_config, name)
        torch.manual_seed(random.SystemRandom().randrange(2**31))
        train(config, show_progress=False)
        found.append(metrics_of(config.output))
    assert found[0] == found[1]
    other = dropping(make_config, "of another seed", seed=4)
    train(other, show_progress=False)
    assert metrics_of(other.output) != found[0]
    without = make_config("without", **{**settings_of("tppo"), "model": {"lora_rank": 4}})
    train(without, show_progress=False)
    norms = [Run(config.output).metrics["actor/grad_norm"].iloc[1] for config in (config, without)]
    assert norms[0] != pytest.approx(norms[1], rel=0.01)


LONG = [("tppo", 4), ("tppo, detached", 2), ("vapo", 2)]


@pytest.mark.parametrize(
    ("algorithm", "world"), [("tppo", 2), *(pytest.param(*own, marks=pytest.mark.slow) for own in LONG)]
)
@pytest.mark.slow
def test_ranks_drop_as_one_process_does(make_config, algorithm, world):
    """vapo's has checkpointed activations here."""
    config, others = (dropping(make_config, name, algorithm) for name in ("one", "many"))
    train(config, show_progress=False)
    on_ranks(world, lambda rank: train(others, show_progress=False))
    assert_equal_runs(Run(config.output), Run(others.output))


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_undisturbed(make_config):
    whole = dropping(make_config, "whole", steps=4)
    train_seeded(whole)
    config = dropping(make_config, "run", steps=4, checkpoint_every=2)
    assert train_in_child(config, kill_at=lambda event, path: "rollouts" in path and "step-000003" in path) == KILLED
    resume_to_the_end(config)
    assert_same_run(config.output, whole.output)


@pytest.mark.slow
def test_ranks_that_go_on_drop_as_if_undisturbed(make_config):
    whole, half = dropping(make_config, "whole", steps=4), dropping(make_config, "half", steps=2)
    on_ranks(2, lambda rank: train(whole, show_progress=False))
    on_ranks(2, lambda rank: train(half, show_progress=False))
    on_ranks(2, lambda rank: train(dropping(make_config, "half", steps=4), resume=True, show_progress=False))
    assert metrics_of(half.output) == metrics_of(whole.output)
