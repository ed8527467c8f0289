"""Objectives on hand-worked tokens, and their gradients against autograd's on the formula written out."""

import math

import pytest
import torch

from tppo.algorithms.objectives import (
    additive_clip_loss,
    clipped_loss,
    decoupled_loss,
    k1_kl,
    k3_kl,
    ratio_of,
    value_loss,
)


def logs(*ratios):
    return torch.tensor([math.log(r) for r in ratios])


ONE = torch.ones(1)


def test_two_tokens_under_ppo_by_hand_and_by_autograd():
    # ratios 1.5 and 0.75, A = 2 and -4, weights 1/2: min(3, 1.25 x 2) = 2.5 and min(-3, 0.8 x -4 = -3.2) = -3.2
    # L = -(2.5 - 3.2) / 2 = 0.35. Both tokens are at the bound, so neither has a gradient.
    new, old = logs(1.5, 0.75).requires_grad_(), torch.zeros(2)
    advantages, weights = torch.tensor([2.0, -4.0]), torch.tensor([0.5, 0.5])
    got = clipped_loss(new, old, advantages, weights, clip=(0.2, 0.25))
    assert got.loss.item() == pytest.approx(0.35)
    assert (got.clipped_low.item(), got.clipped_high.item(), got.ratio_max.item()) == (1, 1, pytest.approx(1.5))
    got.loss.backward()
    assert new.grad.tolist() == [0, 0]
    # Inside the region the gradient is -w r A: -1/2 x 1.1 x 2 and -1/2 x 0.9 x -4
    new = logs(1.1, 0.9).requires_grad_()
    clipped_loss(new, old, advantages, weights, clip=(0.2, 0.25)).loss.backward()
    assert new.grad.tolist() == pytest.approx([-1.1, 1.8])


@pytest.mark.parametrize(("ratio", "advantage", "low", "high"), [(0.5, 1.0, 0, 0), (2.0, -1.0, 0, 0),
                                                                 (0.5, -1.0, 1, 0), (2.0, 1.0, 0, 1)])  # fmt: skip
def test_a_token_counts_as_clipped_only_where_the_bound_takes_its_gradient(ratio, advantage, low, high):
    got = clipped_loss(logs(ratio), torch.zeros(1), torch.tensor([advantage]), ONE, clip=(0.2, 0.2))
    assert (got.clipped_low.item(), got.clipped_high.item()) == (low, high)


def test_the_decoupled_loss_weighs_by_proximal_over_behaviour():
    # pi_behaviour : pi_proximal : pi = 1 : 2 : 3.  r = 3/2, clipped at 1.25; importance 2; A = 4
    # L = -2 x min(1.5 x 4, 1.25 x 4) = -10;  with A = -4: -2 x min(-6, -5) = 12
    new, proximal, behaviour = logs(3.0), logs(2.0), logs(1.0)
    for advantage, loss in ((4.0, -10.0), (-4.0, 12.0)):
        got = decoupled_loss(new, proximal, behaviour, torch.tensor([advantage]), ONE, clip=(0.25, 0.25))
        assert got.loss.item() == pytest.approx(loss)
        assert got.ratio_max.item() == pytest.approx(1.5)


def test_the_decoupled_loss_is_ppos_where_the_proximal_policy_sampled():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = (torch.randn(50, generator=generator) / 4 for _ in range(3))
    weights = torch.full((50,), 1 / 50)
    ppo = clipped_loss(new, old, advantages, weights, clip=(0.2, 0.28))
    decoupled = decoupled_loss(new, old, old, advantages, weights, clip=(0.2, 0.28))
    torch.testing.assert_close(ppo.loss, decoupled.loss)


def test_the_guard_bounds_policy_over_behaviour():
    # pi / pi_behaviour = 8 / 1, bound 2: behaviour is raised to 4, so importance = 8/4 and r = 1: L = -2 A
    got = decoupled_loss(logs(8.0), logs(8.0), logs(1.0), ONE, ONE, clip=(0.2, 0.2), max_importance=2.0)
    assert got.loss.item() == pytest.approx(-2.0)
    unbounded = decoupled_loss(logs(8.0), logs(8.0), logs(1.0), ONE, ONE, clip=(0.2, 0.2))
    assert unbounded.loss.item() == pytest.approx(-8.0)


def test_no_gradient_flows_through_the_guard_or_the_importance():
    new = logs(3.0).requires_grad_()
    decoupled_loss(new, logs(2.9), logs(1.0), ONE, ONE, clip=(0.2, 0.2), max_importance=2.0).loss.backward()
    # behaviour raised to 3/2: importance 2.9 / 1.5, r = 3 / 2.9; d/d log pi = -importance x r = -2
    assert new.grad.item() == pytest.approx(-2.0)


def test_geppo_clips_additively_around_the_ratio_of_the_current_policy():
    # rho_0 = pi_k / pi_{k-i} = 2, eps = 1/4, so rho is held in [1.75, 2.25]
    for rho, advantage, loss in (
        (2.5, 2.0, -4.5),
        (2.5, -2.0, 5.0),
        (1.5, -2.0, 3.5),
        (1.5, 2.0, -3.0),
        (2.125, 2.0, -4.25),
    ):
        got = additive_clip_loss(logs(rho), logs(2.0), logs(1.0), torch.tensor([advantage]), ONE, epsilon=0.25)
        assert got.loss.item() == pytest.approx(loss, rel=1e-6)


def test_geppo_on_fresh_samples_is_ppo():
    generator = torch.Generator().manual_seed(1)
    new, old, advantages = (torch.randn(50, generator=generator) / 4 for _ in range(3))
    weights = torch.full((50,), 1 / 50)
    ppo = clipped_loss(new, old, advantages, weights, clip=(0.1, 0.1))
    geppo = additive_clip_loss(new, old, old, advantages, weights, epsilon=0.1)
    torch.testing.assert_close(ppo.loss, geppo.loss)


@pytest.mark.parametrize("kind", ["clip", "decoupled", "additive"])
def test_gradients_equal_those_of_the_formula_written_out(kind):
    generator = torch.Generator().manual_seed(2)
    new, current, old, advantages = (torch.randn(200, generator=generator, dtype=torch.float64) / 3 for _ in range(4))
    weights = torch.rand(200, generator=generator, dtype=torch.float64)
    mine, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    if kind == "clip":
        got = clipped_loss(mine, old, advantages, weights, clip=(0.2, 0.28))
        ratio = torch.exp(theirs - old)
        low, high, outer = torch.full_like(ratio, 0.8), torch.full_like(ratio, 1.28), 1.0
    elif kind == "decoupled":
        got = decoupled_loss(mine, current, old, advantages, weights, clip=(0.2, 0.28))
        ratio, outer = torch.exp(theirs - current), torch.exp(current - old)
        low, high = torch.full_like(ratio, 0.8), torch.full_like(ratio, 1.28)
    else:
        got = additive_clip_loss(mine, current, old, advantages, weights, epsilon=0.1)
        ratio, outer = torch.exp(theirs - old), 1.0
        low, high = torch.exp(current - old) - 0.1, torch.exp(current - old) + 0.1
    held = torch.max(torch.min(ratio, high), low)
    expected = -(weights * outer * torch.min(ratio * advantages, held * advantages)).sum()
    got.loss.backward()
    expected.backward()
    torch.testing.assert_close(got.loss, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert 0 < (mine.grad == 0).sum() < 200


def test_the_kl_estimates_are_exact_in_expectation_over_three_outcomes():
    # pi = (1/2, 1/4, 1/4), reference q = (1/4, 1/4, 1/2): KL(pi, q) = 1/2 log 2 + 0 - 1/4 log 2 = 1/4 log 2
    pi, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    assert (pi * k3_kl(pi.log(), q.log())).sum().item() == pytest.approx(math.log(2) / 4)
    # k1 estimates KL(behaviour, pi) from samples of the behaviour policy
    assert (q * k1_kl(pi.log(), q.log())).sum().item() == pytest.approx(math.log(2) / 4)


def test_the_k3_estimate_is_never_negative_and_zero_only_at_equality():
    x = torch.linspace(-3, 3, 101)
    assert (k3_kl(x, torch.zeros(101)) >= 0).all()
    assert k3_kl(torch.tensor([1.25]), torch.tensor([1.25])).item() == 0
    assert k3_kl(torch.tensor([1.0]), torch.tensor([0.0])).item() == pytest.approx(math.exp(-1) - 1 + 1)


def test_no_token_is_no_loss_and_no_ratio():
    none = torch.zeros(0, requires_grad=True)
    got = clipped_loss(none, torch.zeros(0), torch.zeros(0), torch.zeros(0), clip=(0.2, 0.2))
    assert (got.loss.item(), got.ratio_max.item()) == (0, 0)
    got.loss.backward()


def test_a_ratio_is_the_exponential_of_a_plain_difference_held_finite():
    assert ratio_of(logs(3.0), logs(2.0)).item() == pytest.approx(1.5)
    assert ratio_of(torch.tensor([900.0]), torch.zeros(1)).isfinite().all()


def counts(result):
    return result.clipped_low.item(), result.clipped_high.item()


@pytest.mark.parametrize("kind", ["clip", "dual", "decoupled", "guard", "additive", "value", "clipped value"])
def test_the_gradient_on_two_tokens_is_the_slope_of_the_loss(kind):
    # No point lies on a kink: ratios to `near` are 1.1 and 2.5, to `far` 2.2 and 5
    x = torch.tensor([math.log(1.1), math.log(2.5)], dtype=torch.float64)
    near, far, stored = torch.zeros_like(x), torch.full_like(x, -math.log(2)), x - 0.5
    advantages, weights = torch.tensor([2.0, -3.0]).double(), torch.tensor([0.25, 0.75]).double()

    def loss_of(x, guarded=x):
        if kind == "clip":
            return clipped_loss(x, near, advantages, weights, clip=(0.2, 0.28)).loss
        if kind == "dual":
            return clipped_loss(x, near, advantages, weights, clip=(0.2, 0.28), dual_clip=3.0).loss
        if kind == "decoupled":
            return decoupled_loss(x, near, far, advantages, weights, clip=(0.2, 0.28)).loss
        if kind == "guard":  # the second token's pi / pi_behaviour of 5 is over the bound; the guard is held fixed
            held = torch.maximum(far, guarded - math.log(4.0))
            return decoupled_loss(x, near, held, advantages, weights, clip=(0.2, 0.28)).loss
        if kind == "additive":
            return additive_clip_loss(x, near, far, advantages, weights, epsilon=0.5).loss
        # With a clip both values are held 0.25 from the old ones: nearer to the second target, further from the first
        clip = 0.25 if kind == "clipped value" else None
        return value_loss(x, torch.tensor([0.5, -1.0]).double(), weights, old_values=stored, clip=clip)

    free = x.clone().requires_grad_()
    if kind == "guard":
        decoupled_loss(free, near, far, advantages, weights, clip=(0.2, 0.28), max_importance=4.0).loss.backward()
    else:
        loss_of(free).backward()
    step = 1e-6
    for token in range(2):
        shift = torch.zeros_like(x)
        shift[token] = step
        slope = (loss_of(x + shift) - loss_of(x - shift)) / (2 * step)
        # The bound log 4 is rounded to float32 on its way, hence 1e-6
        assert free.grad[token].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-8)


def test_the_dual_clip_bounds_bad_tokens_only_and_only_beyond_its_bound():
    # ratios 4, 2, 4 with A = -1, -1, +1 and c = 3: terms max(-4, -3) = -3, max(-2, -3) = -2 and 1.25, so
    # L = -(-3 - 2 + 1.25) = 3.75. Only the second token has a gradient: -r A = 2.
    new = logs(4.0, 2.0, 4.0).requires_grad_()
    advantages = torch.tensor([-1.0, -1.0, 1.0])
    got = clipped_loss(new, torch.zeros(3), advantages, torch.ones(3), clip=(0.25, 0.25), dual_clip=3.0)
    assert got.loss.item() == pytest.approx(3.75)
    got.loss.backward()
    assert new.grad.tolist() == pytest.approx([0, 2, 0])


def test_lower_and_upper_width_are_not_exchanged():
    # Region [1 - 1/2, 1 + 1/4]. Ratio 1/4, A = -1: max(1/4, 1/2) = 1/2. Ratio 2, A = 2: -5/4 x 2.
    new, advantages = logs(0.25, 2.0), torch.tensor([-1.0, 2.0])
    weights = torch.ones(2)
    for got in (
        clipped_loss(new, torch.zeros(2), advantages, weights, clip=(0.5, 0.25)),
        decoupled_loss(new, torch.zeros(2), torch.zeros(2), advantages, weights, clip=(0.5, 0.25)),
    ):
        assert got.loss.item() == pytest.approx(0.5 - 2.5)
        assert counts(got) == (1, 1)


def test_the_guard_raises_behaviour_exactly_where_the_policy_outgrew_it():
    # Without clipping the loss of a token with A = -1 is min(pi / pi_behaviour, bound), wherever the proximal one is.
    generator = torch.Generator().manual_seed(3)
    new, proximal, behaviour = (torch.randn(40, generator=generator) for _ in range(3))
    plain = (new - behaviour).exp()
    assert (plain > 2).any() and (plain < 2).any()
    for token in range(40):
        at = slice(token, token + 1)
        got = decoupled_loss(
            new[at], proximal[at], behaviour[at], -ONE, ONE, clip=(1.0, 1e6), max_importance=2.0
        ).loss.item()
        assert got == pytest.approx(min(plain[token].item(), 2.0), rel=1e-5)


def test_the_default_guard_is_a_hundred():
    # pi = pi_proximal = 128 pi_behaviour: importance 100
    got = decoupled_loss(logs(128.0), logs(128.0), logs(1.0), -ONE, ONE, clip=(0.2, 0.2))
    assert got.loss.item() == pytest.approx(100.0, rel=1e-5)


def test_the_decoupled_trust_region_and_its_counts_look_at_the_proximal_policy_only():
    # pi / pi_proximal = 2, 1/2, 1 and pi / pi_behaviour = 1, 1, 4: the third is far from who sampled it, yet free
    new, proximal, behaviour = torch.zeros(3), logs(0.5, 2.0, 1.0), logs(1.0, 1.0, 0.25)
    advantages = torch.tensor([1.0, -1.0, 1.0])
    got = decoupled_loss(new, proximal, behaviour, advantages, torch.ones(3), clip=(0.25, 0.25))
    # importance 1/2, 2, 4: -(1/2 x 5/4 + 2 x -3/4 + 4 x 1) = -3.125
    assert got.loss.item() == pytest.approx(-3.125)
    assert counts(got) == (1, 1)
    assert got.ratio_max.item() == pytest.approx(2.0)


def test_geppo_counts_the_tokens_held_at_either_bound():
    # rho_0 = 2 and eps = 1/4: above 2.25 with A > 0 is high, below 1.75 with A < 0 low, all else free
    new = logs(4.0, 1.0, 1.0, 4.0, 2.125, 1.875)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    got = additive_clip_loss(new, logs(2.0).expand(6), torch.zeros(6), advantages, torch.ones(6), epsilon=0.25)
    assert counts(got) == (1, 1)


def test_geppo_around_an_unlikely_centre_is_not_ppo():
    # rho_0 = 1/2, eps = 1/4, rho = 1, A = 2: held at 3/4, so L = -3/2; PPO would see 1 and leave it
    got = additive_clip_loss(logs(1.0), logs(0.5), logs(1.0), torch.tensor([2.0]), ONE, epsilon=0.25)
    assert got.loss.item() == pytest.approx(-1.5)


def test_geppos_largest_ratio_is_to_the_policy_its_trust_region_stands_around():
    # pi_{k-i} : pi_k : pi = 1 : 2 : 3; the region stands around pi_k, and pi / pi_k = 3/2
    got = additive_clip_loss(logs(3.0), logs(2.0), logs(1.0), ONE, ONE, epsilon=0.25)
    assert got.ratio_max.item() == pytest.approx(1.5)


def test_loss_and_diagnostics_leave_no_graph_but_the_losss():
    new = logs(1.5).requires_grad_()
    got = clipped_loss(new, torch.zeros(1), ONE, ONE, clip=(0.2, 0.2))
    assert got.loss.requires_grad
    assert not any(each.requires_grad for each in (got.clipped_low, got.clipped_high, got.ratio_max))


def test_the_kl_estimates_know_their_direction():
    # pi = (1/2, 1/4, 1/4), q = (1/8, 3/8, 1/2). With L = log 2, T = log 3:
    # KL(pi, q) = 1/2 x 2L + 1/4 (L - T) - 1/4 L = L - T/4;  KL(q, pi) = -1/8 x 2L + 3/8 (T - L) + 1/2 L = 3T/8 - L/8
    pi, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.125, 0.375, 0.5])
    log2, log3 = math.log(2), math.log(3)
    forward, backward = log2 - log3 / 4, 3 * log3 / 8 - log2 / 8
    assert (pi * k3_kl(pi.log(), q.log())).sum().item() == pytest.approx(forward)
    assert (q * k3_kl(q.log(), pi.log())).sum().item() == pytest.approx(backward)
    assert (q * k1_kl(pi.log(), q.log())).sum().item() == pytest.approx(backward)
    assert (pi * k1_kl(q.log(), pi.log())).sum().item() == pytest.approx(forward)


def test_the_gradient_of_k3_is_one_minus_the_ratio():
    # r = pi_reference / pi = 2 and 1/2: value 1 - log 2 and log 2 - 1/2, slope 1 - r = -1 and 1/2
    new = logs(1.0, 1.0).requires_grad_()
    got = k3_kl(new, logs(2.0, 0.5))
    assert got.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5])
    got.sum().backward()
    assert new.grad.tolist() == pytest.approx([-1.0, 0.5])


def test_the_k3_estimate_of_an_absurd_difference_is_finite():
    assert k3_kl(torch.tensor([-500.0, 500.0]), torch.zeros(2)).isfinite().all()


def test_the_gradient_of_the_value_loss_is_the_weighted_error():
    # V = 1, 3; targets 0, 1; w = 1/4, 1/2: L = 1/2 (1/4 x 1 + 1/2 x 4) = 1.125; slopes 1/4 x 1 and 1/2 x 2
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = value_loss(values, torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.5]))
    loss.backward()
    assert loss.item() == 1.125
    assert values.grad.tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (0.25, 2.0, 1.53125, -1.75),  # inside the clip: 1/2 x 1.75^2
        (2.0, 2.0, 1.125, 0.0),  # ran past it towards the target: held at 1/2, 1/2 x 1.5^2, no pull
        (-2.0, -2.0, 1.125, 0.0),  # the same below: held at -1/2
        (2.0, -1.0, 4.5, 3.0),  # ran away from the target: its own error 3 is larger than 1.5 and pulls it back
    ],
)
def test_value_clipping_stops_a_value_that_ran_towards_its_target_not_one_that_ran_away(value, target, loss, slope):
    # V_old = 0, clip 1/2
    values = torch.tensor([value], requires_grad=True)
    got = value_loss(values, torch.tensor([target]), ONE, old_values=torch.zeros(1), clip=0.5)
    got.backward()
    assert got.item() == loss
    assert values.grad.item() == slope


def test_old_values_without_a_clip_change_nothing_and_a_clip_without_them_is_refused():
    values, targets = torch.tensor([2.0]), torch.tensor([0.0])
    assert value_loss(values, targets, ONE, old_values=torch.tensor([9.0])).item() == 2.0
    with pytest.raises(ValueError, match="old values"):
        value_loss(values, targets, ONE, clip=0.5)


def test_no_token_is_no_loss_under_any_objective():
    none, nothing = torch.zeros(0, requires_grad=True), torch.zeros(0)
    for got in (
        clipped_loss(none, nothing, nothing, nothing, clip=(0.2, 0.2), dual_clip=10.0),
        decoupled_loss(none, nothing, nothing, nothing, nothing, clip=(0.2, 0.2)),
        additive_clip_loss(none, nothing, nothing, nothing, nothing, epsilon=0.1),
    ):
        assert (got.loss.item(), *counts(got), got.ratio_max.item()) == (0, 0, 0, 0)
        got.loss.backward()
    for options in ({}, {"old_values": nothing, "clip": 0.5}):
        value_loss(none, nothing, nothing, **options).backward()
    assert k1_kl(none, nothing).shape == k3_kl(none, nothing).shape == (0,)
    assert none.grad.shape == (0,)
