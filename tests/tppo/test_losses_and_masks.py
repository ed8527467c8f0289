import math

import pytest
import torch

from tppo.algorithms.aggregation import token_weights
from tppo.algorithms.masks import drop_trailing, window_mask
from tppo.algorithms.objectives import clipped_loss, k1_kl, value_loss


def test_token_mean_weighs_every_token_alike():
    weights = token_weights(torch.tensor([[True, True, True], [True, False, False]]), "token-mean")
    assert weights.tolist() == [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]


def test_sequence_mean_weighs_every_row_alike_and_skips_empty_rows():
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert token_weights(mask, "sequence-mean").tolist() == [[0.25, 0.25], [0.5, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_an_empty_mask_weighs_nothing(aggregation):
    assert token_weights(torch.zeros(2, 2, dtype=torch.bool), aggregation).sum() == 0


def loss_at(ratio, advantage, **options):
    old = torch.zeros(1)
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    result = clipped_loss(new, old, torch.tensor([advantage]), torch.ones(1), clip=(0.2, 0.28), **options)
    result.loss.backward()
    return result, new.grad.item()


def test_inside_the_trust_region_the_loss_is_minus_ratio_times_advantage():
    result, gradient = loss_at(1.1, 2.0)
    assert result.loss.item() == pytest.approx(-2.2)
    assert gradient == pytest.approx(-2.2)  # d/d log pi of -r A
    assert result.clipped_low + result.clipped_high == 0


def test_a_good_token_stops_pulling_above_the_upper_clip_and_a_bad_one_below_the_lower():
    for ratio, advantage, value in ((1.5, 2.0, -1.28 * 2), (0.5, -2.0, 0.8 * 2)):
        result, gradient = loss_at(ratio, advantage)
        assert result.loss.item() == pytest.approx(value)
        assert gradient == 0
        assert result.clipped_low + result.clipped_high == 1


def test_a_bad_token_with_a_high_ratio_keeps_pulling_unless_dual_clip_bounds_it():
    assert loss_at(20.0, -1.0)[0].loss.item() == pytest.approx(20.0, rel=1e-5)
    bounded, gradient = loss_at(20.0, -1.0, dual_clip=10.0)
    assert bounded.loss.item() == pytest.approx(10.0)
    assert gradient == 0


def test_the_ratio_is_the_plain_exponential_of_the_difference_and_kl_its_negative():
    assert loss_at(0.9, 1.0)[0].loss.item() == pytest.approx(-0.9)
    assert k1_kl(torch.tensor([math.log(0.9)]), torch.zeros(1)).item() == pytest.approx(-math.log(0.9))


def test_an_absurd_log_ratio_stays_finite():
    new = torch.tensor([500.0], requires_grad=True)
    result = clipped_loss(new, torch.zeros(1), torch.tensor([-1.0]), torch.ones(1), clip=(0.2, 0.2))
    assert torch.isfinite(result.loss)


def test_the_value_loss_is_half_the_weighted_squared_error():
    loss = value_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]))
    assert loss.item() == 0.5 * (0.5 * 1 + 0.5 * 4)


def test_value_clipping_takes_the_larger_error():
    # V = 2, old = 0, clip 1/2: held at 0.5. Target 2: errors 0 and 2.25.
    loss = value_loss(torch.tensor([2.0]), torch.tensor([2.0]), torch.ones(1), old_values=torch.zeros(1), clip=0.5)
    assert loss.item() == 0.5 * 2.25


def test_trailing_tokens_of_truncated_rows_do_not_train():
    tokens = torch.tensor([4, 4, 1])
    mask = window_mask(tokens, 4)
    got = drop_trailing(mask, tokens, torch.tensor([True, False, False]), trailing=2)
    assert got.tolist() == [[True] * 4, [True, True, False, False], [False] * 4]
