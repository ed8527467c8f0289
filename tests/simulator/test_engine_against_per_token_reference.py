import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import load_experiment, simulate

sys.path.insert(0, str(Path(__file__).parent.parent / "references"))
from per_token_engine import ledger_of, roll_out

TRAINING = {"policy_update_base_s": 0.021, "policy_update_per_token_s": 1.3e-4, "weight_sync_s": 0.0053}
COSTS = {
    "decode_base_s": 0.0101,
    "decode_per_row_s": 2.13e-4,
    "decode_per_context_token_s": 5.7e-6,
    "prefill_base_s": 0.0037,
    "prefill_per_token_s": 1.9e-5,
    "prefill_per_token_context_s": 3.1e-8,
}


def experiment(
    lengths,
    tmp_path,
    *,
    engines,
    max_rows,
    kv_tokens,
    shared,
    window,
    factor,
    threshold,
    ahead,
    steps,
    prompt,
    longest,
    chunk=None,
    samples=None,
):
    table = tmp_path / "lengths.csv"
    table.write_text("n\n" + "\n".join(map(str, lengths)))
    cluster = {"engines": engines, "trainer": "none", "dispatch": "shared_queue" if shared else "round_robin"}
    if samples is not None:
        cluster["prefix_reuse"] = True
    if chunk is not None:
        cluster |= {"prefill": "chunked", "chunk_tokens": chunk}
    if max_rows is not None:
        cluster["max_rows_per_engine"] = max_rows
    if kv_tokens is not None:
        cluster["kv_tokens_per_engine"] = kv_tokens
    schedule = {"kind": "synchronous"} if window is None else {"kind": "truncated", "window": window}
    if factor is not None:
        schedule = {"kind": "oversample", "factor": factor}
    if threshold is not None:
        schedule = {"kind": "tail_batching", "threshold": threshold}
    costs = COSTS
    if ahead is not None:
        schedule = {"kind": "asynchronous", "max_staleness": ahead, "in_flight_update": True}
        cluster |= {"trainer": "separate", "trainer_gpus": 1}
        costs = COSTS | TRAINING
    return load_experiment(
        {
            "workload": {
                "steps": steps,
                "prompts_per_step": len(lengths) // (samples or 1),
                "samples_per_prompt": samples or 1,
                "prompt_tokens": prompt,
                "max_response_tokens": longest,
                "response_tokens": {"kind": "empirical", "file": str(table), "column": "n"},
            },
            "schedule": schedule,
            "cluster": cluster,
            "cost": {"kind": "affine", **costs},
        }
    )


def replay_slowly(
    lengths,
    *,
    engines,
    max_rows,
    kv_tokens,
    shared,
    window,
    factor,
    threshold,
    ahead,
    chunk,
    samples,
    steps,
    prompt,
    longest,
):
    """The step loop by hand: carried rows by id, then fresh ones, step by step."""
    length_of, done_of, next_row, wall, ends, preemptions = {}, {}, 0, 0.0, {}, 0
    ledger, stays, ready = {}, {}, []
    wanted = len(lengths)
    started = wanted if factor is None else math.ceil(factor * wanted)
    for step in range(1, steps + 1):
        carried = sorted(row for row in done_of if done_of[row] < length_of[row])
        limit = window
        if threshold is not None:  # a long round of deferred rows alone, or a short one of fresh rows alone
            long_round = len(carried) >= wanted
            carried = carried[:wanted] if long_round else []
            limit = None if long_round else threshold
        if ahead is not None:
            started = (step + ahead) * wanted - (next_row - len(carried))
        fresh = range(next_row, next_row + max(started - len(carried), 0))
        for row in fresh:
            length_of[row], done_of[row] = min(lengths[row % len(lengths)], longest), 0
        next_row += len(fresh)
        rows = []
        for row in [*carried, *fresh]:
            left = length_of[row] - done_of[row]
            rows.append((row, prompt + done_of[row], left if limit is None else min(left, limit)))
        until, training_s = (wanted if factor is not None else None), None
        if ahead is not None:
            until, trains = max(wanted - len(ready), 0), []

            def training_s(ended, until=until, waiting=ready, trains=trains):
                trains += [*waiting[:wanted], *ended][:wanted]
                tokens = sum(prompt + length_of[row] for row in trains)
                return TRAINING["policy_update_base_s"] + TRAINING["policy_update_per_token_s"] * tokens

        outcome = roll_out(
            rows, engines=engines, max_rows=max_rows, kv_tokens=kv_tokens, costs=COSTS, shared_queue=shared,
            chunk_tokens=chunk,
            shares=None if samples is None else {row: (row // samples, prompt // 16) for row, _, _ in rows},
            wanted=until, then_s=training_s, stays=stays,
        )  # fmt: skip
        for row, _, _ in rows:
            done_of[row] += outcome.tokens[row]
        ends |= {(step, row): wall + outcome.ends[row] for row, _, _ in rows}
        resumed = {row for row, context, _ in rows if context > prompt}
        for cause, seconds in ledger_of(outcome, slots=max_rows, resumed=resumed).items():
            ledger[cause] = ledger.get(cause, 0.0) + seconds
        preemptions += sum(outcome.preemptions.values())
        if ahead is None:
            wall += outcome.seconds
            continue
        stays |= outcome.engine_of
        done = [row for row, _, _ in rows if done_of[row] == length_of[row]]
        done.sort(key=lambda row: (round(outcome.ends[row], 9), outcome.engine_of[row], row))
        ready = [row for row in [*ready, *done] if row not in trains]
        begins = max((outcome.ends[row] for row in trains if row in done), default=0.0)
        tokens = sum(prompt + length_of[row] for row in trains)
        trained = begins + TRAINING["policy_update_base_s"] + TRAINING["policy_update_per_token_s"] * tokens
        wall += max(outcome.seconds, trained) + TRAINING["weight_sync_s"]
    finished = sum(done_of[row] == length_of[row] for row in done_of)
    return wall, ends, preemptions, (finished, sum(done_of.values())), ledger


@st.composite
def cases(draw):
    longest = draw(st.integers(1, 90))
    prompt = draw(st.integers(0, 40))
    samples = draw(st.none() | st.integers(1, 4))
    kind = draw(st.sampled_from(["synchronous", "truncated", "oversample", "tail_batching", "in_flight"]))
    fits_one = 16 * (-(-(prompt + longest + 1) // 16))
    return {
        "lengths": draw(st.lists(st.integers(1, 100), min_size=1, max_size=24 // (samples or 1))) * (samples or 1),
        "engines": draw(st.integers(1, 3)),
        "max_rows": draw(st.none() | st.integers(1, 8)),
        "kv_tokens": draw(st.none() | st.integers(fits_one, 6 * fits_one)),
        "shared": draw(st.booleans()),
        "window": draw(st.integers(1, 100)) if kind == "truncated" else None,
        "factor": draw(st.sampled_from([1.0, 1.25, 1.5, 2.0])) if kind == "oversample" else None,
        "threshold": draw(st.integers(1, 60)) if kind == "tail_batching" else None,
        "ahead": draw(st.integers(1, 3)) if kind == "in_flight" else None,
        "chunk": draw(st.none() | st.integers(1, 120)),
        "samples": samples,
        "steps": draw(st.integers(1, 6)),
        "prompt": prompt,
        "longest": longest,
    }


@given(case=cases())
@settings(max_examples=200, deadline=None)
def test_closed_form_jumps_equal_single_tokens(case, tmp_path_factory):
    result = simulate(experiment(tmp_path=tmp_path_factory.mktemp("w"), **case))
    wall, ends, preemptions, (finished, tokens), ledger = replay_slowly(**case)
    assert (result.summary()["rows_finished"], result.summary()["generated_tokens"]) == (finished, tokens)
    assert result.run.wall_s == pytest.approx(wall, rel=1e-9)
    rows = result.rollouts
    assert dict(zip(zip(rows.step, rows.row, strict=True), rows.t_end, strict=True)) == pytest.approx(ends, rel=1e-9)
    assert result.summary()["preemptions"] == preemptions
    if not case["shared"]:  # while rows wait in a shared queue, a span keeps whether they did at its start
        booked = result.summary()["ledger"]
        for cause, seconds in ledger.items():
            assert booked[cause] == pytest.approx(seconds, abs=1e-9 * wall), cause


def test_heavy_kv_pressure_equals_single_tokens(tmp_path):
    case = {
        "lengths": [60 + 7 * (i % 11) for i in range(40)],
        "engines": 2, "max_rows": None, "kv_tokens": 600, "shared": False,
        "window": 50, "factor": None, "threshold": None, "ahead": None, "chunk": None, "samples": None,
        "steps": 3, "prompt": 20, "longest": 140,
    }  # fmt: skip
    result = simulate(experiment(tmp_path=tmp_path, **case))
    wall, ends, preemptions, _, _ = replay_slowly(**case)
    assert preemptions > 20
    assert result.summary()["preemptions"] == preemptions
    rows = result.rollouts
    assert dict(zip(zip(rows.step, rows.row, strict=True), rows.t_end, strict=True)) == pytest.approx(ends, rel=1e-9)
    assert result.run.wall_s == pytest.approx(wall, rel=1e-9)
