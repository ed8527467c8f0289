import pytest
import torch

from tppo.algorithms.advantages import vtrace_gae
from tppo.algorithms.normalise import clamp, normalise_reused
from tppo.algorithms.returns import vtrace_returns
from tppo.algorithms.rewards import group_relative, informative_groups, overlong_penalty


def test_the_overlong_penalty_falls_over_the_cache_only():
    # L = 16, cache 8: 0 up to 8, -1/2 at 12, -1 at 16
    lengths = torch.tensor([1, 8, 10, 12, 16])
    assert overlong_penalty(lengths, max_response_tokens=16, cache_tokens=8).tolist() == [0, 0, -0.25, -0.5, -1]
    assert overlong_penalty(lengths, max_response_tokens=16, cache_tokens=0).tolist() == [0] * 5


def test_group_relative_advantages_by_hand_with_groups_in_any_order():
    # group 7: rewards 1, -1: mean 0, std sqrt(2); group 3: 1, 1, 4: mean 2, deviations -1, -1, 2, std sqrt(6 / 2)
    rewards, group = torch.tensor([1.0, 1.0, -1.0, 1.0, 4.0]), torch.tensor([7, 3, 7, 3, 3])
    got = group_relative(rewards, group, epsilon=0.0)
    assert got.tolist() == pytest.approx([2**-0.5, -(3**-0.5), -(2**-0.5), -(3**-0.5), 2 * 3**-0.5])


def test_a_group_of_one_or_of_equal_rewards_has_no_advantage():
    assert group_relative(torch.tensor([5.0, 1.0, 1.0]), torch.tensor([0, 1, 1])).tolist() == [0, 0, 0]


def test_only_prompts_answered_both_right_and_wrong_inform():
    right = torch.tensor([True, False, True, True, False, False])
    group = torch.tensor([5, 5, 2, 2, 9, 9])
    assert informative_groups(right, group).tolist() == [True, True, False, False, False, False]


def test_vtrace_cuts_the_trace_where_the_old_policy_was_likelier():
    # V = 1, 2, 4; r_2 = 1: deltas 1, 2, -3; lam = 1/2; ratios 8, 1/2, 2, so c = 1, 1/2, 1
    # A_2 = -3;  A_1 = 2 + 1/2 x 1 x -3 = 1/2;  A_0 = 1 + 1/2 x 1/2 x 1/2 = 9/8
    values, rewards = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    ratios, mask = torch.tensor([[8.0, 0.5, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    got = vtrace_gae(rewards, values, mask, ratios, lam=0.5)
    assert got.tolist() == [[1.125, 0.5, -3.0]]
    # targets V + c A: 1 + 9/8, 2 + 1/2 x 1/2, 4 - 3
    assert vtrace_returns(got, values, ratios).tolist() == [[2.125, 2.25, 1.0]]


def test_reused_advantages_are_centred_by_importance_and_scaled_by_the_spread_of_the_product():
    # A = 0, 4 with importance 1, 3: mean 12/4 = 3; products 0, 12: deviation 6; (0 - 3)/6, (4 - 3)/6
    mask = torch.tensor([[True, True, False]])
    got = normalise_reused(torch.tensor([[0.0, 4.0, 9.0]]), mask, torch.tensor([[1.0, 3.0, 5.0]]), epsilon=1e-12)
    assert got[0].tolist() == pytest.approx([-0.5, 1 / 6, 0.0])


def test_nothing_to_normalise_is_zero():
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert normalise_reused(torch.ones(2, 2), nothing, torch.ones(2, 2)).tolist() == [[0, 0], [0, 0]]


def test_a_bound_of_zero_is_no_bound():
    advantages = torch.tensor([[-50.0, 3.0, 50.0]])
    assert clamp(advantages, 10.0).tolist() == [[-10, 3, 10]]
    assert clamp(advantages, 0.0).tolist() == [[-50, 3, 50]]
