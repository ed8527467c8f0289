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
