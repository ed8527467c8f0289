"""Sums of weighted token losses: the same number for one batch, many micro-batches or many ranks."""

import pytest
import torch

from tppo.algorithms.aggregation import age_weights, loss_denominator, token_weights
from tppo.algorithms.objectives import clipped_loss, value_loss

MASK = torch.tensor(
    [[True, True, True, False], [True, False, False, False], [False] * 4, [True, True, False, False]]
)  # 6 tokens in 3 rows


@pytest.mark.parametrize(("aggregation", "denominator"), [("token-mean", 6), ("sequence-mean", 3)])
def test_the_parts_of_several_ranks_weigh_what_the_whole_does(aggregation, denominator):
    whole = token_weights(MASK, aggregation)
    for parts in ([[0, 1], [2, 3]], [[2], [0, 1, 3]], [[0], [1], [2], [3]]):
        # What an all-reduce would sum
        total = torch.stack([loss_denominator(MASK[part], aggregation) for part in parts]).sum()
        assert total.item() == denominator
        pieces = torch.cat([token_weights(MASK[part], aggregation, total) for part in parts])
        order = [row for part in parts for row in part]
        assert torch.equal(pieces, whole[order])
    assert whole.sum().item() == pytest.approx(1)
    assert (whole[~MASK] == 0).all()


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_the_gradient_of_parts_adds_up_to_that_of_the_whole(aggregation):
    losses = torch.arange(16.0).reshape(4, 4)
    scale = torch.ones(4, 4, requires_grad=True)
    (token_weights(MASK, aggregation) * losses * scale).sum().backward()
    whole, scale.grad = scale.grad.clone(), None
    total = loss_denominator(MASK, aggregation)
    for part in ([0, 1], [2, 3]):
        (token_weights(MASK[part], aggregation, total) * losses[part] * scale[part]).sum().backward()
    assert torch.equal(scale.grad, whole)


def test_a_mean_over_ranks_of_their_own_means_would_be_wrong():
    """What the denominator is for: ranks with 4 and 2 tokens."""
    ranks = [MASK[:2], MASK[2:]]
    own = torch.cat([token_weights(part, "token-mean") / 2 for part in ranks])
    assert not torch.allclose(own, token_weights(MASK, "token-mean"))


def test_batches_of_several_ages_weigh_by_nu_whatever_their_size():
    # Age 0 has 4 tokens, age 1 has 2; nu = 3/4, 1/4. Factors: 3/4 x 6/4 = 9/8 and 1/4 x 6/2 = 3/4
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    got = age_weights(mask, torch.tensor([0, 0, 1]), torch.tensor([0.75, 0.25]))
    assert got.tolist() == [1.125, 1.125, 0.75]
    weights = token_weights(mask, "token-mean") * got[:, None]
    assert weights.sum().item() == pytest.approx(1)
    assert weights[:2].sum().item() == pytest.approx(0.75)


def test_ages_not_there_yet_leave_their_weight_to_the_others():
    # nu = 0.4, 0.3, 0.2, 0.1 with ages 0 and 1 only: 4/7 and 3/7; equal sizes, so factors 8/7 and 6/7
    mask = torch.ones(2, 3, dtype=torch.bool)
    got = age_weights(mask, torch.tensor([0, 1]), torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert got.tolist() == pytest.approx([8 / 7, 6 / 7])


def test_a_batch_whose_tokens_are_all_masked_takes_no_weight():
    mask = torch.tensor([[True, True], [False, False]])
    got = age_weights(mask, torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    assert got[0].item() == pytest.approx(1)
    assert (token_weights(mask, "token-mean") * got[:, None]).isfinite().all()


def random_tokens(seed, rows=6, time=5):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, time, generator=generator) < 0.6
    log_probs, old, advantages = (torch.randn(rows, time, generator=generator, dtype=torch.float64) for _ in range(3))
    return mask, log_probs / 4, old / 4, advantages


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[4], [0, 2], [5, 1, 3]], [[row] for row in range(6)]])
def test_micro_batches_give_the_loss_and_the_gradient_of_one_batch(aggregation, parts, reused):
    mask, log_probs, old, advantages = random_tokens(0)
    mask[3] = False  # one micro-batch has no token at all
    weights = token_weights(mask, aggregation)
    if reused:
        ages = torch.tensor([0, 0, 1, 1, 2, 2])
        weights = weights * age_weights(mask, ages, torch.tensor([0.5, 0.25, 0.25]))[:, None]

    def losses_and_gradient(groups):
        free = log_probs.clone().requires_grad_()
        policy, value = 0.0, 0.0
        for rows in groups:
            here = mask[rows]
            new, weight = free[rows][here], weights[rows][here].double()
            actor = clipped_loss(new, old[rows][here], advantages[rows][here], weight, clip=(0.2, 0.28)).loss
            critic = value_loss(new, advantages[rows][here], weight)
            (actor + critic).backward()
            policy, value = policy + actor.item(), value + critic.item()
        return policy, value, free.grad

    whole, split = losses_and_gradient([list(range(6))]), losses_and_gradient(parts)
    assert split[:2] == pytest.approx(whole[:2], rel=1e-12)
    torch.testing.assert_close(split[2], whole[2], rtol=1e-12, atol=0)
    assert (whole[2][~mask] == 0).all() and (whole[2][mask] != 0).any()


def test_the_two_means_differ_where_rows_differ_in_length():
    # Losses 4 on a row of three tokens and 8 on a row of one: (12 + 8) / 4 = 5 and (4 + 8) / 2 = 6
    mask = torch.tensor([[True, True, True], [True, False, False]])
    losses = torch.tensor([[4.0, 4.0, 4.0], [8.0, 99.0, 99.0]])
    assert (token_weights(mask, "token-mean") * losses).sum().item() == 5
    assert (token_weights(mask, "sequence-mean") * losses).sum().item() == pytest.approx(6)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_a_rank_without_a_token_adds_nothing_and_takes_nothing(aggregation):
    empty = torch.zeros(2, 4, dtype=torch.bool)
    total = loss_denominator(MASK, aggregation) + loss_denominator(empty, aggregation)
    assert torch.equal(token_weights(MASK, aggregation, total), token_weights(MASK, aggregation))
    assert token_weights(empty, aggregation, total).tolist() == [[0.0] * 4] * 2
    assert loss_denominator(torch.zeros(0, 4, dtype=torch.bool), aggregation).item() == 0


@pytest.mark.parametrize("seed", range(5))
def test_age_factors_average_one_over_tokens_and_give_each_batch_its_share(seed):
    mask = random_tokens(seed, rows=12)[0]
    ages = torch.arange(12) % 3
    nu = torch.tensor([0.5, 0.25, 0.125, 0.125])  # age 3 is not there: 4/7, 2/7, 1/7
    factors = age_weights(mask, ages, nu)
    tokens = mask.sum(1)
    assert (factors * tokens).sum().item() == pytest.approx(tokens.sum().item())
    shares = [((factors * tokens)[ages == age].sum() / tokens.sum()).item() for age in range(3)]
    assert shares == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    weights = token_weights(mask, "token-mean") * factors[:, None]
    assert (weights[~mask] == 0).all() and weights.sum().item() == pytest.approx(1)


def test_a_single_batch_keeps_its_weight_and_an_age_of_weight_zero_loses_it():
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert age_weights(mask, torch.tensor([2, 2]), torch.tensor([0.5, 0.25, 0.25])).tolist() == [1, 1]
    assert age_weights(mask, torch.tensor([0, 1]), torch.tensor([1.0, 0.0])).tolist() == [2, 0]


def test_age_factors_of_nothing_are_zero_not_nan():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert age_weights(nothing, torch.tensor([0, 1]), torch.tensor([0.5, 0.5])).tolist() == [0, 0]
