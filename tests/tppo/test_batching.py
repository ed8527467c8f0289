from hypothesis import given
from hypothesis import strategies as st

from tppo.batching import LAUNCH_COST_TOKENS, micro_batches, pad_right


def cost(groups, lengths):
    return sum(len(g) * max(lengths[i] for i in g) + LAUNCH_COST_TOKENS for g in groups)


@given(st.lists(st.integers(0, 500), max_size=40), st.integers(1, 3000))
def test_every_row_stands_in_one_group_within_the_budget(lengths, budget):
    groups = micro_batches(lengths, budget)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget


def test_short_and_long_rows_are_kept_apart_when_padding_costs_more_than_a_launch():
    # together: 9 x 500 + 50 = 4550; apart: 8 x 10 + 50 + 500 + 50 = 680
    lengths = [10] * 8 + [500]
    groups = micro_batches(lengths, 10_000)
    assert cost(groups, lengths) == 680


def test_padding_stands_on_the_right():
    assert pad_right([[1], [2, 3]], 9).tolist() == [[1, 9], [2, 3]]
