"""Rollout engines in actors of a local Ray cluster. Workers are started once and used by one test after the other:
importing torch and transformers is most of what they take."""

import json
import os
import signal
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("ray", reason="needs the extra ray")

import ray

from profiling.errors import ConfigError, RunError
from profiling.reader import Run
from simulator import load_experiment, simulate
from simulator.calibrate import calibrate
from tests.tppo.ahead import assert_rolled_out_ahead, training_waits_for_the_rollout_ahead
from tests.waiting import until, until_gone
from tppo import start
from tppo.checkpoints.store import newest_usable
from tppo.cluster import places
from tppo.cluster.member import Member
from tppo.cluster.places import Places, reserved_places
from tppo.cluster.pool import EnginePool
from tppo.cluster.start import make_pool, places_of
from tppo.models.policy import load_policy
from tppo.parallel.ranks import SINGLE
from tppo.rollout.protocol import Request, Sampling
from tppo.rollout.torch_engine import TorchEngine

pytestmark = pytest.mark.slow
ROWS = [
    "step", "row", "context_before", "tokens", "trained_tokens", "finished", "discarded", "policy_version", "reward",
]  # fmt: skip
TIMES = ("time", "clock", "perf", "probe")


class WarmPlaces(Places):
    """Places whose actors outlive a run, and are built again for the next one."""

    idle: list = []  # noqa: RUF012
    busy: list = []  # noqa: RUF012

    def actor(self, cls, bundle, **options):
        living = [actor for actor in WarmPlaces.idle if _lives(actor)]
        WarmPlaces.idle = living[1:]
        made = living[0] if living else ray.remote(num_cpus=0, concurrency_groups={"control": 1})(cls).remote()
        WarmPlaces.busy.append(made)
        return made

    @staticmethod
    def give_back():
        WarmPlaces.idle += WarmPlaces.busy
        WarmPlaces.busy = []


def _lives(actor):
    try:
        ray.get(actor.now.remote(), timeout=100)
    except ray.exceptions.RayError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    WarmPlaces.idle, WarmPlaces.busy = [], []
    ray.shutdown()


@pytest.fixture(autouse=True)
def warm(monkeypatch):
    @contextmanager
    def warm_places_of(config, ranks=SINGLE):
        if not config.ray.address:
            yield None
            return
        yield WarmPlaces(ray, None, [], config.ray.engines, 0)

    monkeypatch.setattr(start, "places_of", warm_places_of)
    yield
    WarmPlaces.give_back()


def pair(make_config, steps=4, own=None, **sections):
    """The same run in one process and on two engines, the latter with [ray] changed by `own`."""
    draws = {"rollout": {"draws": "row", **sections.pop("rollout", {})}}
    here = make_config("here", train={"steps": steps}, **draws, **sections)
    there = make_config(
        "there", train={"steps": steps}, ray={"address": "auto", "engines": 2, **(own or {})}, **draws, **sections
    )
    return here, there


def trained(*configs):
    for config in configs:
        start.train(config, show_progress=False)
    return [Run(config.output) for config in configs]


def assert_same_rows_and_losses(here, there):
    assert there.rollouts[ROWS].equals(here.rollouts[ROWS])
    for ours, theirs in zip(metrics_of(here), metrics_of(there), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5, nan_ok=True)


def metrics_of(run):
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if v is not None and not k.startswith(TIMES) and "timing" not in k}
        for row in rows
    ]


def test_two_engines_give_the_rows_and_losses_of_one_process(make_config):
    here, there = trained(*pair(make_config))
    assert_same_rows_and_losses(here, there)
    for step, rows in there.rollouts.groupby("step"):
        planned = there.rollouts[there.rollouts.step == step]
        assert rows.engine.tolist() == [place % 2 for place in range(len(planned))]
    assert (there.header["engines"], there.header["gpus"], there.header["trainer_gpus"]) == (2, 2, 0)
    assert there.summary["gpu_seconds"] == pytest.approx(2 * there.summary["wall_seconds"])
    inside = there.phases[there.phases.name == "rollout"]
    for record in there.engine.itertuples():
        assert ((inside.t_start <= record.t_start) & (record.t_end <= inside.t_end)).any(), record


def test_a_run_on_engines_apart_is_calibrated_and_replayed(make_config):
    """Separate layout, from a queue that the engines share."""
    own = {"layout": "separate", "dispatch": "shared_queue"}
    here, there = trained(*pair(make_config, steps=8, own=own, rollout={"max_rows_per_engine": 2},
                                value={"pretrain_rows": 0}, evaluation={"every": 0}))  # fmt: skip
    assert_same_rows_and_losses(here, there)
    assert (there.header["engines"], there.header["gpus"], there.header["trainer_gpus"]) == (2, 3, 1)
    assert set(there.rollouts.engine) == {0, 1}
    calibrate([there])
    simulated = simulate(
        load_experiment(
            {
                "workload": {
                    "steps": 8, "prompts_per_step": 8, "max_response_tokens": 24,
                    "response_tokens": {"kind": "run", "path": str(there.path)},
                },
                "schedule": {"kind": "truncated", "window": 10, "trailing_tokens": 2},
                "cluster": {"engines": 2, "trainer": "none", "dispatch": "shared_queue", "max_rows_per_engine": 2},
                "cost": {"decode_base_s": 1.0, "prefill_base_s": 0.5},
            }
        )
    )  # fmt: skip
    columns = ["step", "row", "context_before", "tokens", "finished", "policy_version"]
    got, measured = (r.rollouts[columns].sort_values(["step", "row"], ignore_index=True) for r in (simulated, there))
    assert got.astype("int64").equals(measured.astype("int64"))


def test_oversampling_on_one_engine_stops_where_one_process_does(make_config):
    here, there = trained(
        *pair(make_config, own={"engines": 1}, algorithm={"name": "ppo"}, rollout={"schedule": "oversample"})
    )
    assert_same_rows_and_losses(here, there)


def test_oversampling_on_two_engines_stops_both_and_keeps_every_row(make_config):
    _, config = pair(make_config, algorithm={"name": "ppo"}, rollout={"schedule": "oversample"})
    (there,) = trained(config)
    for step, rows in there.rollouts.groupby("step"):
        assert rows.row.is_unique, step
        assert rows.finished.sum() >= 8
        before = set(there.rollouts[(there.rollouts.step == step - 1) & ~there.rollouts.finished].row)
        assert before <= set(rows.row) or step <= 1


def test_asynchronous_engines_roll_out_while_the_policy_trains(make_config, monkeypatch):
    here, there = pair(make_config, algorithm={"name": "ppo"}, rollout={"schedule": "asynchronous"})
    (one,) = trained(here)
    training_waits_for_the_rollout_ahead(monkeypatch, EnginePool, steps=4)
    (many,) = trained(there)
    assert_same_rows_and_losses(one, many)
    assert_rolled_out_ahead(many, steps=4)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_hangs_changes_nothing(make_config, monkeypatch, number, capfd, withstood):
    # So long that the other worker, which only waits for a core, is not taken for one that hangs.
    own = {"engine_timeout_s": 15.0 if number == signal.SIGSTOP else 600.0}
    here, there = pair(make_config, steps=8, own=own, evaluation={"every": 0})
    victim = signal_in_step(monkeypatch, 4, number)
    assert_same_rows_and_losses(*trained(here, there))
    notes = [record for record in Run(there.output).trace if record["type"] == "note"]
    assert any(note["text"].startswith("engine 1 failed: ") and note["engine"] == 1 for note in notes)
    assert "tppo: engine 1 failed: " in capfd.readouterr().err
    until_gone(victim[0])
    withstood("Ray worker killed, or hangs", lost="nothing: its rows are generated again in the same step")


def test_without_any_engine_left_the_run_saves_every_row_and_goes_on_elsewhere(make_config, monkeypatch):
    here, there = pair(make_config, steps=8, own={"engines": 1, "retries": 0}, evaluation={"every": 0})
    signal_in_step(monkeypatch, 4, signal.SIGKILL, engine=0)
    with pytest.raises(RunError, match=r"holds every unfinished row: go on with --resume"):
        start.train(there, show_progress=False)
    assert newest_usable(there.output).manifest.step >= 3
    on = there.model_copy(update={"ray": there.ray.model_copy(update={"address": ""})})
    start.train(on, resume=True, show_progress=False)
    assert_same_rows_and_losses(*trained(here), Run(there.output))


def signal_in_step(monkeypatch, step, number, engine=1):
    """Signal the process of an engine that has just been called to generate the step's rows. Returns a list that will
    hold its id."""
    submit, advance = EnginePool.submit, Member.advance
    submitted, pids = [], []

    def submitting(pool, requests, sampling):
        submitted.append(len(submitted))  # 0 is the value model's
        submit(pool, requests, sampling)

    def calling(member, sampling):
        advance(member, sampling)
        if submitted[-1] == step and member.engine == engine and not pids:
            pids.append(member.about.pid)
            os.kill(member.about.pid, number)

    monkeypatch.setattr(EnginePool, "submit", submitting)
    monkeypatch.setattr(Member, "advance", calling)
    return pids


@pytest.fixture
def pool(make_config, request):
    """Two engines and the model whose weights they sample from."""
    config = make_config("pool", ray={"address": "auto", "engines": 2, **getattr(request, "param", {})})
    model, tokenizer = load_policy(config.model.path)
    made = make_pool(
        WarmPlaces(ray, None, [], 2, 0),
        config,
        model,
        slots=4,
        max_tokens=90,
        generator=torch.Generator().manual_seed(0),
    )
    return made, model, tokenizer


def sampled(engine, requests, sampling):
    engine.submit(requests, sampling)
    done = {}
    while ended := engine.run_until_a_row_ends():
        done |= {completion.row: completion for completion in ended}
    return {row: done[row].token_ids for row in sorted(done)}


def requests_of(tokenizer, rows=12, budget=24):
    return [Request(row, tokenizer(f"{row % 10}+3+4=").input_ids, 0, budget) for row in range(rows)]


def alone(model, tokenizer):
    return TorchEngine(
        model, slots=12, max_tokens=90, pad_token_id=tokenizer.pad_token_id, generator=torch.Generator(),
        clock=lambda: 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("pool", [{"weight_sync": "object_store"}, {"weight_sync": "gloo"}], indirect=True)
def test_new_weights_reach_every_engine(pool):
    engines, model, tokenizer = pool
    greedy = Sampling(temperature=0.0, stop_token_ids=(tokenizer.eos_token_id,))
    before = sampled(alone(model, tokenizer), requests_of(tokenizer), greedy)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, dims=0))
    expected = sampled(alone(model, tokenizer), requests_of(tokenizer), greedy)
    assert sampled(engines, requests_of(tokenizer), greedy) == before != expected
    engines.update_weights(1)
    assert sampled(engines, requests_of(tokenizer), greedy) == expected
    engines.update_weights(2)  # the same group again
    assert engines.policy_version == 2


@pytest.mark.parametrize("pool", [{"weight_sync": "gloo", "engine_timeout_s": 60.0}], indirect=True)
def test_a_broadcast_goes_to_those_that_live_and_later_to_the_new_one(pool):
    engines, model, tokenizer = pool
    greedy = Sampling(temperature=0.0, stop_token_ids=(tokenizer.eos_token_id,))
    engines.update_weights(1)
    ray.kill(WarmPlaces.busy[1])
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, dims=0))
    engines.update_weights(2)
    expected = sampled(alone(model, tokenizer), requests_of(tokenizer), greedy)
    assert sampled(engines, requests_of(tokenizer), greedy) == expected

    def both_have_them():
        engines.update_weights(3)
        return len(engines._members) == 2

    until(both_have_them, "no other engine has come")
    engines.submit(requests_of(tokenizer), greedy)
    done = []
    while ended := engines.run_until_a_row_ends():
        done += ended
    assert {completion.row: completion.token_ids for completion in done} == expected
    assert {completion.engine for completion in done} == {0, 1}


def test_an_abort_stops_all_engines_and_gives_what_each_row_has(pool):
    engines, model, tokenizer = pool
    by_row = Sampling(stop_token_ids=(tokenizer.eos_token_id,), seed=5, by_row=True)
    whole = sampled(alone(model, tokenizer), requests_of(tokenizer), by_row)
    engines.submit(requests_of(tokenizer), by_row)
    ended = engines.run_until_a_row_ends()
    rest = engines.abort()
    assert sorted(done.row for done in [*ended, *rest]) == list(range(12))
    assert any(done.reason == "aborted" for done in rest)
    for done in [*ended, *rest]:
        assert done.token_ids == whole[done.row][: len(done.token_ids)]
    assert engines.run_until_a_row_ends() == []
    assert sampled(engines, requests_of(tokenizer), by_row) == whole


def test_engines_with_draws_of_their_own_draw_different_numbers_and_the_same_again(pool):
    engines, _, tokenizer = pool
    alike = [Request(row, tokenizer("3+4=").input_ids, 0, 24) for row in range(2)]
    seeded = Sampling(seed=7)
    first = sampled(engines, alike, seeded)
    assert first[0] != first[1]
    assert sampled(engines, alike, seeded) == first


def test_places_are_reserved_and_given_back(make_config):
    config = make_config("places", ray={"address": "auto", "engines": 2})
    with reserved_places(ray, config) as got:
        assert (got.engines, got.gpus_per_engine) == (2, 0)
        until(lambda: free_cpus() == 2, "they are not taken")  # Ray tells of it a little later
    until(lambda: free_cpus() == 4, "the places are still taken")


def free_cpus():
    return ray.available_resources().get("CPU", 0)


def test_a_cluster_that_stays_busy_is_not_waited_for_long(make_config, monkeypatch):
    monkeypatch.setattr(places, "RESERVE_TIMEOUT_S", 0.5)
    other = ray.util.placement_group([{"CPU": 4}])
    assert other.wait(100)
    until(lambda: free_cpus() == 0, "the cluster is not busy")
    busy = r"1 CPUs and 0 GPUs in 1 places .* not to be had within 0.5 s; 0 CPUs and 0 GPUs are free"
    with pytest.raises(ConfigError, match=busy), reserved_places(ray, make_config("busy", ray={"address": "auto"})):
        pass
    ray.util.remove_placement_group(other)


def test_too_large_a_run_is_refused_before_anything_is_written(make_config, monkeypatch):
    monkeypatch.setattr(start, "places_of", places_of)
    config = make_config("large", ray={"address": "auto", "engines": 8})
    with pytest.raises(ConfigError, match="with 1 CPUs each they need 8, and the cluster has 4"):
        start.train(config, show_progress=False)
    assert not config.output.exists()
