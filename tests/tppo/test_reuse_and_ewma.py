import io
from itertools import pairwise

import numpy as np
import pytest
import torch

from tppo.algorithms.geppo import clip_width, next_learning_rate, reuse_weights
from tppo.learner.ewma import ProximalPolicy, beta_for
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


@pytest.mark.parametrize("batches", [2, 3, 4, 5])
def test_with_variance_alone_the_weights_fall_linearly(batches):
    # Least sum nu^2 with sum nu = 1 and mean age B: nu_j = a - b j until it meets 0. Over n batches n + 1 - j has mean
    # age (n + 2) / 3, so n = 3 B - 2: 4, 3, 2, 1 of 10 for B = 2; 7 .. 1 of 28 for B = 3; 13 .. 1 of 91 for B = 5.
    kept = 3 * batches - 2
    falling = np.arange(kept, 0, -1)
    assert reuse_weights(batches).tolist() == pytest.approx((falling / falling.sum()).tolist(), abs=1e-6)


def test_with_age_alone_the_weights_are_as_fresh_as_the_variance_allows():
    # B = 2, three batches, nu = 1/3 + b, 1/3, 1/3 - b with sum nu^2 = 1/3 + 2 b^2 = 1/2: b = 1 / sqrt 12 = 0.289.
    # Mean age 2 - 2 b = 1.42; two batches could only do 1/2, 1/2 with 1.5.
    b = 12**-0.5
    assert reuse_weights(2, tradeoff=0.0).tolist() == pytest.approx([1 / 3 + b, 1 / 3, 1 / 3 - b], abs=1e-6)


def test_halfway_the_weights_are_those_of_the_lagrangian():
    # B = 2: 1/2 sum nu^2 / (1/2 - 3/10) + 1/2 age / (2 - (2 - 2 b)), b = 1 / sqrt 12. Stationary in nu_j:
    # 2 x 2.5 nu_j + j / (4 b) = const, so nu falls by s = sqrt 12 / 20 = 0.173 a batch: 1/3 + s, 1/3, 1/3 - s.
    # A fourth batch would get 1/3 - 2 s < 0, and neither bound is reached: age 2 - 2 s, sum nu^2 = 1/3 + 2 s^2 = 0.39.
    s = 12**0.5 / 20
    assert reuse_weights(2, tradeoff=0.5).tolist() == pytest.approx([1 / 3 + s, 1 / 3, 1 / 3 - s], abs=1e-5)


@pytest.mark.parametrize("batches", [2, 3, 4])
@pytest.mark.parametrize("tradeoff", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_no_feasible_neighbour_is_better_on_the_whole_objective(batches, tradeoff):
    def square(nu):
        return (nu**2).sum(-1)

    def mean_age(nu):
        return nu @ np.arange(1, nu.shape[-1] + 1)

    variance_range = 1 / batches - square(reuse_weights(batches, tradeoff=1.0))
    age_range = batches - mean_age(reuse_weights(batches, tradeoff=0.0))

    def objective(nu):
        return tradeoff * square(nu) / variance_range + (1 - tradeoff) * mean_age(nu) / age_range

    found = np.zeros(3 * batches)
    weights = reuse_weights(batches, tradeoff=tradeoff)
    found[: len(weights)] = weights
    assert mean_age(found) <= batches + 1e-6
    assert square(found) <= 1 / batches + 1e-6
    assert (np.diff(weights) <= 1e-9).all()  # never more of an older batch
    rng = np.random.default_rng(1)
    spread = rng.dirichlet(np.full(3 * batches, 0.5), size=20_000)
    far = found + rng.uniform(0, 1, (20_000, 1)) * (spread - found)  # anything between here and a random point
    near = found + rng.uniform(0, 0.02, (20_000, 1)) * (spread - found)
    others = np.concatenate([far, near])
    others = others[(mean_age(others) <= batches) & (square(others) <= 1 / batches)]
    assert len(others) > 100
    assert objective(others).min() >= objective(found) - 1e-6


def test_a_negligible_weight_is_dropped_and_the_others_sum_to_one_again():
    # B = 6: 16, 15, .. 1 of 136; the last, 0.007, is below 0.01. Left are 16 .. 2 of 135.
    assert reuse_weights(6).tolist() == pytest.approx([j / 135 for j in range(16, 1, -1)], abs=1e-5)


def test_dropping_negligible_weights_exceeds_a_bound_by_no_more_than_they_weighed():
    # B = 5 with age alone has a seventh weight below 0.01
    weights = reuse_weights(5, tradeoff=0.0)
    assert weights @ weights <= 1 / 5 * (1 + 2 * 0.01)


def test_the_clip_narrows_with_the_mean_age():
    assert clip_width(0.2, np.ones(1)) == pytest.approx(0.2)
    assert clip_width(0.25, np.array([0.5, 0.0, 0.5])) == 0.125  # mean age 1/2 x 1 + 1/2 x 3 = 2


def test_the_learning_rate_is_divided_by_its_factor_and_never_rises():
    assert next_learning_rate(1.0, total_variation=0.375, epsilon=0.5, factor=2.0) == 0.5
    assert next_learning_rate(1.0, total_variation=0.25, epsilon=0.5, factor=2.0) == 1.0
    assert next_learning_rate(1.0, total_variation=0.0, epsilon=0.5, factor=2.0) == 1.0


def filled(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def values_of(proximal):
    return torch.cat([p.detach().flatten() for p in proximal.model.parameters()])


def test_with_beta_one_the_proximal_policy_is_the_plain_mean_and_with_beta_zero_the_latest():
    # theta = 2, 4, 9. beta 1: W = 1, 2, 3 and (2 + 4) / 2 = 3, then 2/3 x 3 + 9/3 = 5. beta 0: 4, then 9.
    for beta, expected in ((1.0, (3.0, 5.0)), (0.0, (4.0, 9.0))):
        model = filled(torch.nn.Linear(2, 1), 2.0)
        proximal = ProximalPolicy(model, beta)
        assert values_of(proximal).tolist() == [2.0] * 3
        for theta, average in zip((4.0, 9.0), expected, strict=True):
            proximal.update(filled(model, theta))
            assert values_of(proximal).tolist() == pytest.approx([average] * 3)


def test_the_average_weighs_every_past_policy_by_beta_to_its_age():
    # sum_k beta^(n - k) theta_k / sum_k beta^(n - k) over the start and 20 updates
    beta, thetas = beta_for(8), [float(k * k % 7) for k in range(21)]
    model = filled(torch.nn.Linear(2, 1), thetas[0])
    proximal = ProximalPolicy(model, beta)
    for theta in thetas[1:]:
        proximal.update(filled(model, theta))
    weights = [beta ** (20 - k) for k in range(21)]
    expected = sum(w * theta for w, theta in zip(weights, thetas, strict=True)) / sum(weights)
    assert values_of(proximal).tolist() == pytest.approx([expected] * 3, rel=1e-5)
    assert proximal.total_weight == pytest.approx(sum(weights))


def test_updates_too_small_for_bfloat16_are_not_lost():
    # theta goes from 1 to 1 + 2^-7, the next bfloat16 number, and stays. At beta 15/16 and W = 1 + beta + .. the
    # start keeps a share of beta^n / W_n. No update moves the average half-way to that number: rounded each time it
    # would stay 1 for ever.
    beta, n = 15 / 16, 40
    model = filled(torch.nn.Linear(2, 1).to(torch.bfloat16), 1.0)
    proximal = ProximalPolicy(model, beta)
    proximal.total_weight = 1 / (1 - beta)  # as after a long time at 1: every update moves by 1/16 of the rest
    filled(model, 1 + 2**-7)
    seen = []
    for _ in range(n):
        proximal.update(model)
        seen.append(proximal.state()["weight"].clone())
    assert all(each.dtype == torch.float32 for each in seen)
    assert all((later > earlier).all() for earlier, later in pairwise(seen))
    assert (seen[-1] - 1).flatten().tolist() == pytest.approx([2**-7 * (1 - beta**n)] * 2, abs=2e-6)
    assert values_of(proximal).dtype == torch.bfloat16
    assert values_of(proximal).tolist() == [1 + 2**-7] * 3  # beyond half-way, so it rounds up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_proximal_policy_read_back_goes_on_bit_for_bit(dtype):
    model = tiny(dtype)
    proximal = ProximalPolicy(model, 0.9)
    for by in (0.125, -0.0625, 0.03):
        shift(model, by)
        proximal.update(model)
    file = io.BytesIO()
    torch.save(proximal.state(), file)
    file.seek(0)
    other = ProximalPolicy(tiny(dtype), 0.9)
    other.load(torch.load(file))
    assert torch.equal(values_of(other), values_of(proximal))
    for by in (0.25, -0.1):
        shift(model, by)
        proximal.update(model)
        other.update(model)
    assert torch.equal(values_of(other), values_of(proximal))
    assert other.total_weight == proximal.total_weight
    mine, theirs = proximal.state(), other.state()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_gradients_go_to_the_policy_only_and_the_average_never_moves_it():
    model = torch.nn.Linear(2, 1)
    inputs = torch.tensor([[1.0, 2.0]])
    model(inputs).sum().backward()  # the copy is taken from a model that has gradients already
    proximal = ProximalPolicy(model, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    (model(inputs) * proximal.model(inputs)).sum().backward()
    proximal.update(model)
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in proximal.model.parameters())
    assert not any(value.requires_grad for value in proximal.state().values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    filled(model, 7.0)
    assert not (values_of(proximal) == 7.0).any()  # it follows at update, not before
