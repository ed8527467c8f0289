"""Cases whose answer is known beforehand, and runs that cannot go on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiling.errors import ConfigError, ConservationError
from simulator import load_experiment, simulate
from simulator.cluster import TrainingRun
from simulator.engine import Engine
from simulator.experiment import Experiment
from tppo.schedule import Synchronous

COSTS = {"decode_base_s": 0.008, "decode_per_row_s": 2e-5, "decode_per_context_token_s": 5e-8,
         "prefill_base_s": 0.01, "prefill_per_token_s": 1e-5, "prefill_per_token_context_s": 1e-9}  # fmt: skip


def experiment(rows, length, engines=1, prompt=100, **cluster):
    return load_experiment(
        {
            "workload": {"steps": 2, "prompts_per_step": rows, "prompt_tokens": prompt, "max_response_tokens": 5000,
                         "response_tokens": {"kind": "fixed", "value": length}},
            "schedule": {"kind": "synchronous"},
            "cluster": {"engines": engines, "trainer": "none", **cluster}, "cost": COSTS,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"rows": 25_000_001}, "= 50,000,002 rows: more than 50,000,000; simulate fewer steps"),
        ({"rows": 8, "trainer": "separate", "trainer_gpus": 16_385}, "cluster.trainer_gpus = 16385: .* less than"),
        ({"rows": 8, "engines": 16_385}, "cluster.engines = 16385: .* less than or equal to 16384"),
        ({"rows": 8, "engines": 4097, "gpus_per_engine": 4}, "4097 engines of 4 GPUs .* are 16388: more than 16384"),
    ],
)
def test_what_no_machine_could_keep_is_refused_before_it_tries(own, message):
    with pytest.raises(ConfigError, match=message):
        experiment(length=1, **own)


def test_equal_lengths_have_no_tail():
    summary = simulate(experiment(rows=24, length=700, engines=4)).summary()
    assert summary["tail_seconds"] == 0
    assert summary["ledger"]["wait_tail"] == 0
    assert summary["ledger"]["decode_underfilled"] == 0
    assert summary["engine_idle_fraction"] == 0


def test_one_long_row_is_a_closed_form():
    # n steps of one row: n (c0 + c1) + c2 (n P + n (n - 1) / 2), after a prefill of P tokens and P (P + 1) / 2 pairs.
    n, p = 4321, 100
    decode = n * (0.008 + 2e-5) + 5e-8 * (n * p + n * (n - 1) / 2)
    prefill = 0.01 + 1e-5 * p + 1e-9 * p * (p + 1) / 2
    result = simulate(experiment(rows=1, length=n))
    assert result.run.wall_s == pytest.approx(2 * (prefill + decode), rel=1e-12)


@given(
    rows=st.integers(1, 40), length=st.integers(1, 300), prompt=st.integers(0, 64), engines=st.integers(1, 12),
    slots=st.none() | st.integers(1, 8), dispatch=st.sampled_from(["round_robin", "shared_queue"]),
    prefill=st.sampled_from(["together", "chunked"]), reuse=st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
@pytest.mark.slow
def test_more_engines_never_lengthen_a_rollout_without_a_tail(
    rows, length, prompt, engines, slots, dispatch, prefill, reuse
):
    own = {"dispatch": dispatch, "prefill": prefill, "prefix_reuse": reuse}
    if slots is not None:
        own["max_rows_per_engine"] = slots
    fewer, more = (simulate(experiment(rows, length, n, prompt, **own)).run.wall_s for n in (engines, engines + 1))
    assert more <= fewer * (1 + 1e-12)


def test_a_clock_beyond_a_traces_numbers_is_one_line():
    schedule, cluster = {"kind": "synchronous"}, {"max_rows_per_engine": 4}
    own = load_experiment(
        {"workload": WORKLOAD, "schedule": schedule, "cluster": cluster, "cost": {"decode_base_s": 1e18}}
    )
    with pytest.raises(ConfigError, match=r"the run takes .*e\+.* s, more than a trace can hold"):
        simulate(own)


def test_the_longest_prompt_decides_whether_a_row_fits():
    def with_prompts(prompt_tokens, length):
        return {"workload": {**WORKLOAD, "prompt_tokens": prompt_tokens,
                             "prompt_lengths": {"kind": "fixed", "value": length}},
                "schedule": {"kind": "synchronous"}, "cluster": {"kv_tokens_per_engine": 1000},
                "cost": {"decode_base_s": 1.0}}  # fmt: skip

    load_experiment(with_prompts(5000, 10))
    with pytest.raises(ConfigError, match=r"cannot hold one row of 2100 tokens"):
        load_experiment(with_prompts(10, 2000))


WORKLOAD = {"steps": 2, "prompts_per_step": 4, "prompt_tokens": 8, "max_response_tokens": 100,
            "response_tokens": {"kind": "fixed", "value": 50}}  # fmt: skip


class NeverEnds(Synchronous):
    def on_row_end(self, state, event):
        return super().on_row_end(state, event)[:1]


@pytest.mark.parametrize("kv", [None, 5200])
def test_a_step_that_a_schedule_does_not_end_is_a_stall_with_its_state(monkeypatch, kv):
    monkeypatch.setattr(Experiment, "make_schedule", lambda self: NeverEnds())
    own = {} if kv is None else {"kv_tokens_per_engine": kv}
    with pytest.raises(ConservationError) as error:
        simulate(experiment(rows=3, length=10, **own))
    assert "step 1: the rollout stalled at " in str(error.value)
    assert "3 of 3 rows wanted have finished, 0 wait, and schedule 'synchronous' has not ended" in str(error.value)


def test_a_stall_names_the_rows_that_wait_and_for_what(monkeypatch):
    """An engine that stops with rows in its queue: row 1 onwards never run."""
    monkeypatch.setattr(Engine, "next_span", lambda self, now: None)
    with pytest.raises(ConservationError) as error:
        simulate(experiment(rows=7, length=10, kv_tokens_per_engine=5200, prefill="chunked"))
    # ceil(101 / 16) = 7 blocks a row; 5,200 tokens are 325 blocks.
    assert "0 of 7 rows wanted have finished, 7 wait" in str(error.value)
    assert "free KV blocks by engine: 325; row 0 waits for 7 blocks" in str(error.value)


def test_blocks_that_nobody_gives_back_are_named(monkeypatch):
    monkeypatch.setattr(Engine, "_leave", lambda self, job: self._running.pop(job.order))
    with pytest.raises(ConservationError) as error:
        simulate(experiment(rows=200, length=10, kv_tokens_per_engine=5200))
    assert "no row runs, but" in str(error.value)
    assert "KV blocks are in use: row" in str(error.value)


def test_a_training_that_never_gets_its_rows_says_after_which_step(monkeypatch):
    def stops_after_one_rollout(self):
        yield self.env.timeout(1.0)

    monkeypatch.setattr(TrainingRun, "roll_out", stops_after_one_rollout)
    with pytest.raises(ConservationError, match="the run stalled after step 0 of 2: 0 rows wait for a rollout"):
        simulate(experiment(rows=2, length=3))
