"""Sums of weighted token losses: the same number for one batch, many micro-batches or many ranks."""

import pytest
import torch

from tppo.algorithms.aggregation import age_weights, loss_denominator, token_weights

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
