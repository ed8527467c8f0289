import pytest
import torch

from tppo.algorithms.advantages import vtrace_gae
from tppo.algorithms.normalise import clamp, normalise_reused, whiten
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


def test_the_overlong_penalty_in_dapos_own_numbers():
    # L = 20,480 with a cache of 4,096: free up to 16,384
    lengths = torch.tensor([0, 16_384, 17_408, 18_432, 20_480])
    got = overlong_penalty(lengths, max_response_tokens=20_480, cache_tokens=4096)
    assert got.tolist() == [0, 0, -0.25, -0.5, -1]


def test_the_overlong_penalty_stays_at_minus_one_and_may_fall_over_the_whole_length():
    assert overlong_penalty(torch.tensor([17, 99]), max_response_tokens=16, cache_tokens=8).tolist() == [-1, -1]
    got = overlong_penalty(torch.tensor([0, 4, 16]), max_response_tokens=16, cache_tokens=16)
    assert got.tolist() == [0, -0.25, -1]


def test_group_relative_advantages_of_any_two_rewards_are_plus_and_minus_half_root_two():
    # n = 2: deviations +-d, std sqrt(2 d^2 / 1) = d sqrt 2, so +-1 / sqrt 2 whatever the rewards
    got = group_relative(torch.tensor([8.0, 3.0, -1.0, 1.0]), torch.tensor([-4, 90, 90, -4]), epsilon=0.0)
    assert got.tolist() == pytest.approx([2**-0.5, 2**-0.5, -(2**-0.5), -(2**-0.5)])


def test_group_relative_epsilon_is_added_to_the_deviation():
    # rewards 0, 2, 4: mean 2, std sqrt(8 / 2) = 2; (4 - 2) / (2 + 2) = 1/2
    got = group_relative(torch.tensor([0.0, 2.0, 4.0]), torch.zeros(3, dtype=torch.long), epsilon=2.0)
    assert got.tolist() == [-0.5, 0, 0.5]


def test_a_group_is_not_changed_by_the_others():
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, -7.0]), torch.tensor([1, 1, 1, 1, 0, 0])
    assert torch.equal(group_relative(rewards, group)[:4], group_relative(rewards[:4], group[:4]))


@pytest.mark.parametrize("reward", [0.1, 0.7, -1.3])
def test_equal_rewards_give_no_advantage_whatever_they_are(reward):
    got = group_relative(torch.full((8,), reward), torch.zeros(8, dtype=torch.long))
    assert got.abs().max().item() < 1e-3


@pytest.mark.parametrize("advantage", [0.1, 0.7, -1.3])
def test_whitening_equal_advantages_takes_off_the_mean_and_leaves_nothing(advantage):
    got = whiten(torch.full((2, 4), advantage), torch.ones(2, 4, dtype=torch.bool))
    assert got.abs().max().item() < 1e-3


def test_no_row_has_no_advantage_and_informs_nobody():
    nobody = torch.zeros(0, dtype=torch.long)
    assert group_relative(torch.zeros(0), nobody).shape == (0,)
    assert informative_groups(torch.zeros(0, dtype=torch.bool), nobody).shape == (0,)
    assert overlong_penalty(nobody, max_response_tokens=16, cache_tokens=8).shape == (0,)


def test_informative_groups_may_be_scattered_and_one_answer_never_informs():
    right = torch.tensor([True, True, False, False, True, False, True])
    group = torch.tensor([3, 1, 3, 8, 1, 5, 3])  # 3: two of three right; 1: all; 8: none; 5: one row, wrong
    assert informative_groups(right, group).tolist() == [True, False, True, False, False, False, True]


def test_what_informs_is_exactly_what_has_an_advantage():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(64, generator=generator) < 0.5
    group = torch.randint(0, 20, (64,), generator=generator)
    advantages = group_relative(2 * right.float() - 1, group)
    assert torch.equal(informative_groups(right, group), advantages != 0)


def test_a_higher_trace_bound_lets_likelier_tokens_count_more():
    # V = 1, 2; r_1 = 1; lam = 1/2: deltas 2 - 1 = 1 and 1 - 2 = -1; ratios 4, 4 and c_bar = 2, so c = 2
    # A_1 = -1;  A_0 = 1 + 1/2 x 2 x -1 = 0;  targets 1 + 2 x 0 and 2 + 2 x -1
    values, rewards = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])
    ratios, mask = torch.tensor([[4.0, 4.0]]), torch.ones(1, 2, dtype=torch.bool)
    got = vtrace_gae(rewards, values, mask, ratios, lam=0.5, c_bar=2.0)
    assert got.tolist() == [[0.0, -1.0]]
    assert vtrace_returns(got, values, ratios, c_bar=2.0).tolist() == [[1.0, 0.0]]


def test_the_trace_of_a_masked_token_is_not_looked_at():
    # V = 1, -, 4; r_2 = 1; lam = 1/2; ratios 1, -, 1/2: deltas 3 and -3;  A_2 = -3;  A_0 = 3 + 1/2 x 1/2 x -3 = 9/4
    values, rewards = torch.tensor([[1.0, 99.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    mask = torch.tensor([[True, False, True]])
    assert vtrace_gae(rewards, values, mask, torch.tensor([[1.0, 0.0, 0.5]]), lam=0.5).tolist() == [[2.25, 0.0, -3.0]]


def test_reused_advantages_of_importance_one_are_whitened():
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    torch.testing.assert_close(normalise_reused(advantages, mask, torch.ones(4, 6)), whiten(advantages, mask))


def test_after_normalising_the_importance_weighted_mean_is_zero_and_padding_never_counts():
    generator = torch.Generator().manual_seed(2)
    advantages, importance = torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator) + 0.5
    mask = torch.rand(4, 6, generator=generator) < 0.7
    got = normalise_reused(advantages, mask, importance)
    assert (importance * got)[mask].sum().item() == pytest.approx(0, abs=1e-5)
    dirty = advantages.masked_fill(~mask, float("nan")), importance.masked_fill(~mask, float("inf"))
    assert torch.equal(normalise_reused(dirty[0], mask, dirty[1]), got)


def test_one_reused_token_has_nothing_to_be_better_than():
    got = normalise_reused(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]]), torch.tensor([[2.0, 1.0]]))
    assert got.tolist() == [[0, 0]]


def test_equal_advantages_of_reused_batches_leave_nothing():
    got = normalise_reused(torch.full((2, 4), 0.7), torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 4))
    assert got.tolist() == [[0.0] * 4] * 2


def test_a_thousand_equal_rewards_are_seen_to_be_equal():
    got = group_relative(torch.full((1000,), 0.1), torch.zeros(1000, dtype=torch.long))
    assert got.tolist() == [0.0] * 1000
