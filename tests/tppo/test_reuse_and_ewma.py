import numpy as np
import pytest
import torch

from tppo.algorithms.ewma import ProximalPolicy, beta_for
from tppo.algorithms.geppo import clip_width, next_learning_rate, reuse_weights
from tppo.models.policy import new_qwen2


def test_two_batches_to_ppos_one_give_the_weights_of_the_paper():
    weights = reuse_weights(2)
    assert weights.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-6)
    assert clip_width(0.2, weights) == pytest.approx(0.1)  # mean age 0.4 + 0.6 + 0.6 + 0.4 = 2
    assert reuse_weights(1).tolist() == [1]


@pytest.mark.parametrize("batches", [2, 3, 4])
@pytest.mark.parametrize("tradeoff", [0.0, 0.5, 1.0])
def test_the_weights_are_feasible_and_no_random_feasible_ones_are_better(batches, tradeoff):
    weights = reuse_weights(batches, tradeoff=tradeoff)
    age = np.arange(1, len(weights) + 1)
    assert weights.sum() == pytest.approx(1)
    assert (weights > 0).all()
    assert age @ weights <= batches * 1.02  # dropping negligible weights may move it a little
    assert weights @ weights <= 1 / batches * 1.02
    rng = np.random.default_rng(0)
    others = rng.dirichlet(np.full(2 * batches, 0.7), size=20_000)
    ages, squares = others @ np.arange(1, 2 * batches + 1), (others**2).sum(1)
    feasible = (ages <= batches) & (squares <= 1 / batches)
    if tradeoff == 1.0:
        assert squares[feasible].min(initial=np.inf) >= weights @ weights - 1e-3
    if tradeoff == 0.0:
        assert ages[feasible].min(initial=np.inf) >= age @ weights - 0.02


def test_impossible_reuse_is_refused():
    with pytest.raises(ValueError, match="out of range"):
        reuse_weights(0)
    with pytest.raises(ValueError, match="out of range"):
        reuse_weights(2, tradeoff=1.5)


def test_the_learning_rate_falls_only_when_the_policy_moved_too_far():
    assert next_learning_rate(1.03, total_variation=0.06, epsilon=0.1) == pytest.approx(1.0)
    assert next_learning_rate(1.03, total_variation=0.05, epsilon=0.1) == 1.03


def test_the_centre_of_mass_of_the_average_is_the_updates_of_a_rollout():
    assert beta_for(8) == pytest.approx(0.889, abs=5e-4)
    assert beta_for(16) == pytest.approx(1 - 1 / 17)
    for updates in (1, 2, 8):
        assert beta_for(updates) / (1 - beta_for(updates)) == pytest.approx(updates)


def tiny(dtype=torch.float32):
    return new_qwen2(
        vocab_size=8, eos_token_id=0, pad_token_id=0, layers=1, hidden_size=8, heads=2, kv_heads=1,
        intermediate_size=8, max_tokens=8, seed=0,
    ).to(dtype)  # fmt: skip


def shift(model, by):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


def test_two_updates_of_the_proximal_policy_by_hand():
    # beta 1/2, W = 1. theta: 0 -> 3 -> 6 (as offsets).  W' = 3/2: 1/3 x 0 + 2/3 x 3 = 2
    # W'' = 7/4: (3/4)/(7/4) x 2 + (4/7) x 6 = 6/7 + 24/7 = 30/7
    model = tiny()
    start = [p.detach().clone() for p in model.parameters()]
    proximal = ProximalPolicy(model, 0.5)
    for offset, expected in ((3.0, 2.0), (3.0, 30 / 7)):
        shift(model, offset)
        proximal.update(model)
        for before, average in zip(start, proximal.model.parameters(), strict=True):
            torch.testing.assert_close(average, before + expected, atol=1e-5, rtol=1e-6)
    assert proximal.total_weight == 1.75


def test_the_average_keeps_float32_beside_a_bfloat16_policy():
    """Each update moves the average by less than bfloat16 can hold; together they arrive."""
    model = tiny(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    proximal = ProximalPolicy(model, 0.999)
    proximal.total_weight = 1000.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.5)
    for _ in range(300):
        proximal.update(model)
    average = proximal.state()["model.embed_tokens.weight"]
    assert average.dtype == torch.float32
    assert average.mean().item() == pytest.approx(1 + 0.5 * (1 - 0.999**300), abs=1e-3)
    assert next(proximal.model.parameters()).dtype == torch.bfloat16


def test_the_state_round_trips_and_the_copy_never_trains():
    model = tiny()
    proximal = ProximalPolicy(model, 0.5)
    shift(model, 1.0)
    proximal.update(model)
    other = ProximalPolicy(tiny(), 0.5)
    other.load(proximal.state())
    assert other.total_weight == proximal.total_weight
    for a, b in zip(other.model.parameters(), proximal.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
