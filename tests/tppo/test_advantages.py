import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo.algorithms.advantages import egae, gae, last_valid
from tppo.algorithms.lambdas import length_adaptive_lambda
from tppo.algorithms.normalise import whiten
from tppo.algorithms.returns import monte_carlo_returns


def mask_of(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def random_batch(seed, rows=4, time=9):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, time, generator=generator)
    values = torch.randn(rows, time, generator=generator)
    mask = torch.rand(rows, time, generator=generator) < 0.7
    finished = torch.rand(rows, generator=generator) < 0.5
    return rewards, values, mask, finished


def test_unfinished_row_bootstraps_from_its_last_value():
    # V = 1, 2, 4; no reward; V(s_3) := 4; lam = 1/2
    # delta = 2-1, 4-2, 4-4 = 1, 2, 0;  A_2 = 0;  A_1 = 2 + 0/2 = 2;  A_0 = 1 + 2/2 = 2
    got = egae(torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 4.0]]), mask_of([1, 1, 1]), torch.tensor([False]), lam=0.5)
    assert got.tolist() == [[2.0, 2.0, 0.0]]


def test_finished_row_gets_its_reward_on_the_last_token():
    # V = 1, 2, 4; r_2 = 1; V(s_3) = 0; lam = 1/2
    # delta = 1, 2, 1+0-4 = -3;  A_2 = -3;  A_1 = 2 - 3/2 = 1/2;  A_0 = 1 + 1/4
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    got = gae(rewards, torch.tensor([[1.0, 2.0, 4.0]]), mask_of([1, 1, 1]), lam=0.5)
    assert got.tolist() == [[1.25, 0.5, -3.0]]


def test_a_discount_makes_the_last_delta_of_a_truncated_row_gamma_minus_one_times_its_value():
    # gamma = 1/2, V = 4: delta = 0 + 4/2 - 4 = -2
    got = egae(torch.zeros(1, 1), torch.tensor([[4.0]]), mask_of([1]), torch.tensor([False]), gamma=0.5)
    assert got.tolist() == [[-2.0]]


def test_with_gamma_and_lambda_one_a_truncated_row_gets_its_last_value_minus_its_own():
    _, values, _, _ = random_batch(0)
    mask = torch.ones_like(values, dtype=torch.bool)
    got = egae(torch.zeros_like(values), values, mask, torch.zeros(4, dtype=torch.bool), lam=1.0)
    torch.testing.assert_close(got, values[:, -1:] - values)


def test_lambda_zero_gives_the_deltas():
    # V = 1, 2, 4; r_2 = 1, finished: deltas 1, 2, -3
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    got = gae(rewards, torch.tensor([[1.0, 2.0, 4.0]]), mask_of([1, 1, 1]), lam=0.0)
    assert got.tolist() == [[1.0, 2.0, -3.0]]


def test_a_masked_gap_carries_the_sum_through():
    # The middle token is not there: V = 1, 4; lam = 1/2; r = 1 at the end; delta = 4-1, 1-4 = 3, -3
    # A_2 = -3;  A_0 = 3 - 3/2 = 3/2
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    got = gae(rewards, torch.tensor([[1.0, 99.0, 4.0]]), mask_of([1, 0, 1]), lam=0.5)
    assert got.tolist() == [[1.5, 0.0, -3.0]]


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_what_stands_in_padding_never_changes_a_result(seed):
    rewards, values, mask, finished = random_batch(seed)
    clean = egae(rewards, values, mask, finished, lam=0.9)
    values = torch.where(mask, values, torch.tensor(float("nan")))
    rewards = torch.where(mask, rewards, torch.tensor(1e30))
    assert torch.equal(egae(rewards, values, mask, finished, lam=0.9), clean)


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_egae_of_finished_rows_is_gae_bit_for_bit(seed):
    rewards, values, mask, _ = random_batch(seed)
    finished = torch.ones(len(mask), dtype=torch.bool)
    assert torch.equal(egae(rewards, values, mask, finished, lam=0.95), gae(rewards, values, mask, lam=0.95))


def test_a_lambda_per_row_is_applied_row_by_row():
    rewards, values, mask, finished = random_batch(3)
    lam = torch.tensor([0.0, 0.5, 0.9, 1.0])
    together = egae(rewards, values, mask, finished, lam=lam)
    for row in range(4):
        part = slice(row, row + 1)
        alone = egae(rewards[part], values[part], mask[part], finished[part], lam=lam[row].item())
        torch.testing.assert_close(together[part], alone)


def test_a_row_without_a_token_has_no_advantage_and_disturbs_nobody():
    got = egae(torch.ones(2, 2), torch.ones(2, 2), mask_of([0, 0], [1, 1]), torch.tensor([False, True]), lam=1.0)
    # second row: V = 1, 1; r = 1, 1: delta_1 = 1 - 1 = 0; delta_0 = 1 + 1 - 1 = 1
    assert got.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_last_valid_skips_the_mask():
    assert last_valid(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), mask_of([1, 1, 0], [0, 0, 0])).tolist() == [
        2,
        0,
    ]


def test_adaptive_lambda_counts_half_a_window_for_truncated_rows():
    # alpha = 1/4. Finished, 16 tokens: 1 - 1/4 = 3/4. Truncated, 16 + 32/2 = 32: 1 - 1/8 = 7/8. 1 token: 1 - 4 -> 0.
    got = length_adaptive_lambda(
        torch.tensor([16, 16, 1]), torch.tensor([True, False, True]), window=32, alpha=0.25, floor=0.0
    )
    assert got.tolist() == [0.75, 0.875, 0.0]


def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_mask():
    # 1, 3 -> mean 2, std 1 -> -1, 1
    got = whiten(torch.tensor([[1.0, 3.0, 50.0]]), mask_of([1, 1, 0]), epsilon=0.0)
    assert got.tolist() == [[-1.0, 1.0, 0.0]]


def test_whitening_nothing_gives_nothing():
    assert whiten(torch.ones(1, 2), mask_of([0, 0])).tolist() == [[0.0, 0.0]]


def test_monte_carlo_returns_discount_by_the_tokens_left():
    got = monte_carlo_returns(torch.tensor([1.0]), mask_of([1, 1, 1, 0]), gamma=0.5)
    assert got.tolist() == [[0.25, 0.5, 1.0, 0.0]]
