import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo.algorithms import scan
from tppo.algorithms.advantages import egae, gae, next_unmasked, vtrace_gae
from tppo.algorithms.scan import reverse_linear_recurrence, row_chunks

sys.path.insert(0, str(Path(__file__).parent.parent / "references"))
from slow_advantages import slow_egae, slow_recurrence, slow_vtrace_gae

NAN, INF = float("nan"), float("inf")


def random_batch(seed, rows, time, density):
    """rewards, values, mask with gaps, finished, ratios; each mask has its own density of tokens."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, time, generator=generator)
    values = torch.randn(rows, time, generator=generator)
    mask = torch.rand(rows, time, generator=generator) < density
    finished = torch.rand(rows, generator=generator) < 0.5
    ratios = torch.exp(torch.randn(rows, time, generator=generator) / 2)
    return rewards, values, mask, finished, ratios


def with_padding_on_the_right(mask, seed):
    """`mask` without gaps: each row's tokens first."""
    tokens = torch.randint(0, mask.shape[1] + 1, (len(mask),), generator=torch.Generator().manual_seed(seed))
    return torch.arange(mask.shape[1]) < tokens[:, None]


def assert_within_1e_5(got, slow):
    """Of the largest magnitude, or of 1 if all are smaller."""
    expected = torch.tensor(slow, dtype=torch.float64).reshape(got.shape)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert (got.double() - expected).abs().le(1e-5 * scale).all()


def test_the_recurrence_runs_from_the_last_token_to_the_first():
    # y_2 = 4;  y_1 = 2 + 4/4 = 3;  y_0 = 1 + 3/2 = 5/2. The last decay would weigh what follows: 0
    got = reverse_linear_recurrence(torch.tensor([[0.5, 0.25, 9.0]]), torch.tensor([[1.0, 2.0, 4.0]]))
    assert got.tolist() == [[2.5, 3.0, 4.0]]


def test_what_follows_the_last_token_can_be_given():
    # y_1 = 2 + 8/4 = 4;  y_0 = 1 + 4/2 = 3
    got = reverse_linear_recurrence(torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0, 2.0]]), torch.tensor([8.0]))
    assert got.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("time", [1, 7, 8, 9, 63, 64, 65, 513])
def test_ones_are_counted_exactly_at_every_length(time):
    got = reverse_linear_recurrence(torch.ones(1, 1), torch.ones(2, time))
    assert got.tolist() == [list(range(time, 0, -1))] * 2


def test_half_to_the_power_of_a_long_length_is_no_trouble():
    # 2^-t underflows to 0 and y_t = 1 + y_{t+1}/2 tends to 2
    got = reverse_linear_recurrence(torch.tensor(0.5), torch.ones(1, 5000))
    assert got[0, 0] == 2.0 and got.isfinite().all()


def test_no_time_and_no_rows_give_nothing():
    assert reverse_linear_recurrence(torch.ones(3, 0), torch.ones(3, 0)).shape == (3, 0)
    assert reverse_linear_recurrence(torch.ones(0, 3), torch.ones(0, 3)).shape == (0, 3)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 150))
@settings(max_examples=60, deadline=None)
def test_the_scan_agrees_with_its_slow_twin(seed, rows, time):
    generator = torch.Generator().manual_seed(seed)
    decay, inputs = torch.rand(rows, time, generator=generator), torch.randn(rows, time, generator=generator)
    decay = torch.where(torch.rand(rows, time, generator=generator) < 0.2, decay.round(), decay)  # some 0, some 1
    after = torch.randn(rows, generator=generator)
    slow = [slow_recurrence(d, x, y) for d, x, y in zip(decay.tolist(), inputs.tolist(), after.tolist(), strict=True)]
    assert_within_1e_5(reverse_linear_recurrence(decay, inputs, after), slow)


def test_the_next_unmasked_value_skips_gaps_and_ends_with_what_comes_after():
    # tokens at 1 and 3 of the first row, at 0 of the second
    values = torch.tensor([[1.0, 2.0, NAN, 4.0, INF], [5.0, NAN, NAN, NAN, NAN]])
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    after = torch.tensor([8.0, 9.0])
    assert next_unmasked(values, mask, after).tolist() == [[2.0, 4.0, 4.0, 8.0, 8.0], [9.0] * 5]
    # the second row alone has no gap
    assert next_unmasked(values[1:], mask[1:], after[1:]).tolist() == [[9.0] * 5]


@given(
    st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 100),
    st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.5, 0.97, 1.0]), st.booleans(),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_egae_agrees_with_its_slow_twin(seed, rows, time, density, gamma, gaps):
    rewards, values, mask, finished, _ = random_batch(seed, rows, time, density)
    mask = mask if gaps else with_padding_on_the_right(mask, seed)
    lam = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    lam[0] = 1.0
    lists = rewards.tolist(), values.tolist(), mask.tolist(), finished.tolist()
    got = egae(rewards, values, mask, finished, gamma=gamma, lam=lam)
    assert_within_1e_5(got, slow_egae(*lists, gamma, lam.tolist()))
    got = egae(rewards, values, mask, finished, gamma=gamma, lam=0.95)
    assert_within_1e_5(got, slow_egae(*lists, gamma, [0.95] * rows))


@given(
    st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 100),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]), st.sampled_from([0.5, 1.0]), st.sampled_from([0.5, 1.0, 1.05]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_vtrace_agrees_with_its_slow_twin(seed, rows, time, density, gamma, c_bar):
    rewards, values, mask, _, ratios = random_batch(seed, rows, time, density)
    got = vtrace_gae(rewards, values, mask, ratios, gamma=gamma, lam=0.9, c_bar=c_bar)
    lists = rewards.tolist(), values.tolist(), mask.tolist()
    assert_within_1e_5(got, slow_vtrace_gae(*lists, gamma, [0.9] * rows, ratios.tolist(), c_bar))


def test_vtrace_weighs_what_follows_by_the_next_tokens_ratio():
    # V = 1, _, 4; r_2 = 1; lam = 1; delta = 4-1, _, 1-4 = 3, _, -3; c = min(1, ratios) = 1/4, 1/8, 1/2
    # A_2 = -3;  A_0 = 3 + 1/2 (-3) = 3/2: not 1/4, its own, nor 1/8, the gap's
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1.0, 99.0, 4.0]])
    mask = torch.tensor([[1, 0, 1]], dtype=torch.bool)
    got = vtrace_gae(rewards, values, mask, torch.tensor([[0.25, 0.125, 0.5]]), lam=1.0)
    assert got.tolist() == [[1.5, 0.0, -3.0]]
    # a ratio of 2 is cut to 1: A_0 = 3 - 3; with c_bar = 2 it counts: A_0 = 3 - 6
    assert vtrace_gae(rewards, values, mask, torch.full((1, 3), 2.0), lam=1.0).tolist() == [[0.0, 0.0, -3.0]]
    got = vtrace_gae(rewards, values, mask, torch.full((1, 3), 2.0), lam=1.0, c_bar=2.0)
    assert got.tolist() == [[-3.0, 0.0, -3.0]]


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_vtrace_with_equal_policies_is_gae_bit_for_bit(seed):
    rewards, values, mask, _, _ = random_batch(seed, 3, 40, 0.8)
    assert torch.equal(vtrace_gae(rewards, values, mask, torch.ones(3, 40)), gae(rewards, values, mask))


@given(st.integers(0, 10_000), st.sampled_from([NAN, INF, -INF, 1e30]))
@settings(max_examples=30, deadline=None)
def test_nothing_in_padding_leaks(seed, junk):
    rewards, values, mask, finished, ratios = random_batch(seed, 4, 40, 0.6)
    spoiled = [torch.where(mask, each, junk) for each in (rewards, values, ratios)]
    assert torch.equal(egae(*spoiled[:2], mask, finished), egae(rewards, values, mask, finished))
    clean = vtrace_gae(rewards, values, mask, ratios)
    assert torch.equal(vtrace_gae(*spoiled[:2], mask, spoiled[2]), clean)


def test_a_spoiled_row_stays_alone():
    rewards, values, mask, finished, _ = random_batch(1, 3, 40, 0.8)
    clean = egae(rewards, values, mask, finished)
    values[1] = NAN
    got = egae(rewards, values, mask, finished)
    assert torch.equal(got[[0, 2]], clean[[0, 2]]) and got[1][mask[1]].isnan().all()


@given(st.integers(0, 10_000), st.integers(1, 80), st.integers(1, 600))
@settings(max_examples=40, deadline=None)
def test_wider_padding_on_the_right_changes_no_bit(seed, time, more):
    rewards, values, mask, finished, _ = random_batch(seed, 2, time, 0.8)
    wider = [torch.nn.functional.pad(each, (0, more)) for each in (rewards, values, mask)]
    assert torch.equal(egae(*wider, finished)[:, :time], egae(rewards, values, mask, finished))


def test_arguments_are_left_as_they_were():
    # columns of one row already lie as the scan wants them: no copy stands between it and the caller's memory
    for rows, time in ((1, 5), (5, 1)):
        before = random_batch(2, rows, time, 0.7)
        given_ = [each.clone() for each in before]
        egae(*given_[:4])
        vtrace_gae(*given_[:3], given_[4])
        assert all(torch.equal(a, b) for a, b in zip(given_, before, strict=True))


def test_chunks_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", 30)
    assert [(c.start, c.stop) for c in row_chunks(7, 10)] == [(0, 3), (3, 6), (6, 7)]
    assert [(c.start, c.stop) for c in row_chunks(2, 100)] == [(0, 1), (1, 2)]  # never less than a row
    assert list(row_chunks(0, 10)) == [] and [(c.start, c.stop) for c in row_chunks(2, 0)] == [(0, 2)]


def test_rows_cut_into_chunks_give_the_same_bits(monkeypatch):
    rewards, values, mask, finished, ratios = random_batch(4, 512, 4096, 0.9)
    mask[::2] = with_padding_on_the_right(mask[::2], 4)  # with and without gaps, in one chunk and in several
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", 512 * 4096)
    whole = egae(rewards, values, mask, finished), vtrace_gae(rewards, values, mask, ratios)
    for elements in (4096, 7 * 4096, 2**18):
        monkeypatch.setattr(scan, "CHUNK_ELEMENTS", elements)
        cut = egae(rewards, values, mask, finished), vtrace_gae(rewards, values, mask, ratios)
        assert torch.equal(cut[0], whole[0]) and torch.equal(cut[1], whole[1])


PEAK_OF_A_LONG_BATCH = """
import torch
from tppo.algorithms.advantages import egae

def peak_bytes():
    # VmHWM, not ru_maxrss: the latter starts at what the parent process held
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

torch.set_num_threads(1)
rewards, values = torch.ones(2048, 24576), torch.ones(2048, 24576)
mask = torch.ones(2048, 24576, dtype=torch.bool)
finished = torch.ones(2048, dtype=torch.bool)
mask[:, 100] = False  # a gap in every row: the longer way
egae(rewards[:1], values[:1], mask[:1], finished[:1])
before = peak_bytes()
result = egae(rewards, values, mask, finished)
print(peak_bytes() - before - result.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_memory_beyond_arguments_and_result_is_bounded():
    # a float32 of 2,048 x 24,576 has 201 MB; uncut, the temporaries would take over a gigabyte
    command = [sys.executable, "-c", PEAK_OF_A_LONG_BATCH]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout) < 100e6
