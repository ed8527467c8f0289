"""A run on several ranks is the run of one: same rows, same losses. Gloo on the CPU."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from profiling.errors import ConfigError, RunError
from profiling.hosts import Host, HostNames
from profiling.reader import Run
from profiling.settings import to_toml
from tests.tppo.ranks import RankCrashed, on_ranks, when
from tests.tppo.test_value_source import save_reward_model
from tppo.checkpoints.weights import read_weights
from tppo.models import value_source
from tppo.parallel.clocks import Offset, notes_of, offsets_to_main
from tppo.parallel.ranks import SINGLE, Ranks, joined_ranks
from tppo.parallel.shard import bring_weights
from tppo.rollout.torch_engine import TorchEngine
from tppo.start import train

HOSTS = [Host("this boot", "near"), Host("another boot", "far")]
ROWS = ["step", "row", "group", "policy_version", "prompt_tokens", "context_before", "tokens", "trained_tokens",
        "finished", "discarded", "reward"]  # fmt: skip
APART = ("time", "timing", "clock", "throughput", "padding")
"""Parts of names of metrics that depend on how work is shared out."""


def settings_of(algorithm):
    """What makes every branch run: several windows, micro-batches, mini-batches, all loss terms."""
    own = {
        "tppo": {"algorithm": {"kl_coef": 0.1, "entropy_coef": 0.01}},
        "tppo, detached": {"algorithm": {"prefix": "detached", "old_log_probs": "recomputed"}},
        "ppo-ewma": {},
        "geppo": {},
        "vapo": {"model": {"activation_checkpointing": True}},
        "dapo": {
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 16},
            "data": {"median_steps": 1, "sigma": 0.3, "max_steps": 2},
        },
    }[algorithm]
    name = algorithm.split(",")[0]
    return {
        **own,
        "algorithm": {"name": name, "trailing_tokens": 2, "max_sampling_rounds": 2, **own.get("algorithm", {})},
        "rollout": {"draws": "row", **own.get("rollout", {})},
        "train": {"steps": 3, "micro_batch_tokens": 60},
    }


def assert_equal_runs(one, other):
    rows = [run.rollouts[ROWS] for run in (one, other)]
    pd.testing.assert_frame_equal(*rows)  # in the same order, too
    for mine, theirs in zip(one.metrics.to_dict("records"), other.metrics.to_dict("records"), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if any(part in name for part in APART):
                continue
            if value is None or (isinstance(value, float) and math.isnan(value)):
                assert theirs[name] is None or math.isnan(theirs[name]), name
            else:
                assert theirs[name] == pytest.approx(value, rel=1e-3 if "rollout_corr" in name else 1e-5, abs=1e-5), (
                    name
                )
    for file in ("policy/model.safetensors", "value_model.safetensors", "proximal_policy.safetensors"):
        paths = [max((run.path / "checkpoints").glob("step-*")) / file for run in (one, other)]
        if paths[0].exists():
            weights = [read_weights(path) for path in paths]
            assert weights[0].keys() == weights[1].keys()
            for name, tensor in weights[0].items():
                torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "world"),
    [("tppo", 2), ("tppo", 4), ("tppo, detached", 2), ("ppo-ewma", 2), ("geppo", 2), ("vapo", 2), ("dapo", 3)],
)
def test_ranks_train_on_the_same_rows_with_the_same_losses_as_one_process(
    make_config, answering_model, algorithm, world
):
    own = settings_of(algorithm)
    if algorithm == "dapo":  # which trains only where some of a prompt's answers are right
        own["model"] = {"path": str(answering_model)}
    config = make_config("one", **own)
    train(config, show_progress=False)
    others = make_config("many", **own)
    on_ranks(world, lambda rank: train(others, show_progress=False))
    one, many = Run(config.output), Run(others.output)
    assert_equal_runs(one, many)
    assert set(many.rollouts.engine) == set(range(world))
    assert set(many.engine.engine) == set(range(world))
    assert many.summary["gpu_seconds"] == pytest.approx(world * many.summary["wall_seconds"])
    assert sum(many.summary["ledger"].values()) == pytest.approx(many.summary["gpu_seconds"])
    counted = [[r for r in run.trace if r["type"] == "work"] for run in (one, many)]
    exact = ("name", "step", "tokens", "pairs", "outputs", "backward_tokens", "backward_pairs", "updates")
    sums = [pd.DataFrame(records)[list(exact)] for records in counted]
    pd.testing.assert_frame_equal(*sums)


@pytest.mark.parametrize("value", ["policy", "checkpoint", "reward model"])
def test_only_the_first_rank_reads_weights(make_config, tmp_path, value):
    """So that a host of eight does not hold eight whole models. Policy, reference and value model."""
    own = settings_of("tppo")
    if value == "checkpoint":
        before = make_config("before", **{**own, "train": {**own["train"], "checkpoint_every": 1}})
        train(before, show_progress=False)
        own["value"] = {"path": str(before.output / "checkpoints" / "step-000003")}
    elif value == "reward model":
        save_reward_model(tmp_path / "reward")
        own["value"] = {"path": str(tmp_path / "reward")}
    config, others = make_config("one", **own), make_config("many", **own)
    train(config, show_progress=False)

    def refused(*arguments, **options):
        raise AssertionError("weights are read")

    def work(rank):
        if rank > 0:
            for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
                kind.from_pretrained = refused
            value_source.read_weights = refused
        train(others, show_progress=False)

    on_ranks(2, work)
    assert_equal_runs(Run(config.output), Run(others.output))


def test_what_is_brought_to_other_ranks_is_all_tensors_and_tied_ones_stay_one():
    def work(rank):
        with joined_ranks(device="cpu") as ranks, torch.device("meta" if rank else "cpu"):
            model = torch.nn.Linear(3, 2)
            model.tied, model.plain = model.weight, torch.arange(4) + 1
            model.register_buffer("mask", torch.tensor([True, False]))
            bring_weights(model, ranks, torch.device("cpu"))
            assert model.tied is model.weight
            assert (model.weight.shape, model.weight.requires_grad) == ((2, 3), True)
            own = (model.weight, model.bias, model.plain, model.mask)
            everyones = ranks.gather([tensor.tolist() for tensor in own])
            assert everyones[0] == everyones[1]
            assert everyones[1][2:] == [[1, 2, 3, 4], [True, False]]

    on_ranks(2, work)


def test_weights_that_only_the_first_rank_finds_wanting_are_one_line_on_all(make_config, tmp_path):
    save_reward_model(tmp_path / "reward")
    (tmp_path / "reward" / "model.safetensors").write_bytes(b"no weights")
    config = make_config("run", **settings_of("tppo"), value={"path": str(tmp_path / "reward")})

    def work(rank):
        with pytest.raises(ConfigError, match=r"value.path: .*reward holds no value model for this policy"):
            train(config, show_progress=False)

    on_ranks(2, work)
    assert not config.output.exists()


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_in_another_directory(make_config, capsys):
    def settings(steps):
        return {**settings_of("tppo"), "train": {"steps": steps, "micro_batch_tokens": 60}}

    whole = make_config("whole", **settings(5))
    train(whole, show_progress=False)
    expected = Run(whole.output).rollouts.query("step > 3")[ROWS].reset_index(drop=True)
    first = make_config("first", **settings(3))
    on_ranks(4, lambda rank: train(first, show_progress=False))
    before = sorted((path, path.stat().st_mtime_ns) for path in first.output.rglob("*"))
    with pytest.raises(ConfigError, match=r"counts 4 engines of 1, and .* 1 engine of 1 now; .* --resume .* --output"):
        train(make_config("first", **settings(5)), resume=True, show_progress=False)
    for world in (1, 2):
        then = make_config(f"then-{world}", **settings(5))
        if world == 1:
            train(then, resume=first.output, show_progress=False)
        else:
            on_ranks(world, lambda rank, then=then: train(then, resume=first.output, show_progress=False))
        run = Run(then.output)
        pd.testing.assert_frame_equal(run.rollouts[ROWS].reset_index(drop=True), expected)
        losses = [each.metrics.query("step > 3")["actor/pg_loss"].tolist() for each in (run, Run(whole.output))]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        assert run.header["resumed_from"]["step"] == 3
        assert run.summary["gpu_seconds"] == pytest.approx(world * run.summary["wall_seconds"])
    assert sorted((path, path.stat().st_mtime_ns) for path in first.output.rglob("*")) == before
    on_ranks(4, lambda rank: train(make_config("first", **settings(5)), resume=True, show_progress=False))
    pd.testing.assert_frame_equal(Run(first.output).rollouts.query("step > 3")[ROWS].reset_index(drop=True), expected)


def test_bfloat16_passes_train_float32_weights(make_config):
    """One process, whose model is sharded over itself for the sake of its types."""
    config = make_config("half", **{**settings_of("tppo"), "model": {"dtype": "bfloat16"}})
    exact = make_config("exact", **settings_of("tppo"))
    on_ranks(1, lambda rank: train(config, show_progress=False))
    train(exact, show_progress=False)
    half, full = Run(config.output), Run(exact.output)
    weights = load_file(max((half.path / "checkpoints").glob("step-*")) / "policy" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    ours, theirs = (run.metrics.query("step == 1")["actor/pg_loss"].item() for run in (half, full))
    assert ours != theirs
    assert ours == pytest.approx(theirs, abs=0.03)
    assert half.metrics["rollout_corr/log_prob_diff_max"].max() < 0.3


def test_replicas_of_shards_train_alike(make_config):
    config, others = (
        make_config(name, **settings_of("tppo"), parallel={"replicas": replicas})
        for name, replicas in (("one", 1), ("many", 2))
    )
    train(config, show_progress=False)
    on_ranks(4, lambda rank: train(others, show_progress=False))
    assert_equal_runs(Run(config.output), Run(others.output))


def test_sigterm_to_one_rank_ends_all_after_the_same_step_and_saves(make_config, tmp_path):
    config = make_config("run", **{**settings_of("tppo"), "train": {"steps": 1000}})

    def work(rank):
        if rank == 1:
            when(config.output / "rollouts" / "step-000002.parquet", lambda: os.kill(os.getpid(), signal.SIGTERM))
        outcome = train(config, show_progress=False)
        assert (outcome.status, outcome.signal) == ("interrupted", signal.SIGTERM)
        (tmp_path / f"{rank}").write_text(str(outcome.steps))

    on_ranks(2, work)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    run = Run(config.output)
    assert run.trailer["status"] == "interrupted"
    assert list((run.path / "checkpoints").glob("step-*"))


def test_an_engine_that_fails_on_one_rank_ends_all_with_a_checkpoint_of_every_row(make_config):
    def settings(steps):
        return {**settings_of("tppo"), "train": {"steps": steps, "micro_batch_tokens": 60}}

    whole = make_config("whole", **settings(4))
    train(whole, show_progress=False)
    config = make_config("run", **settings(4))

    def work(rank):
        submit = TorchEngine.submit

        def failing(engine, requests, sampling):
            failing.calls += 1
            if rank == 1 and failing.calls == 6:  # evaluations, value pre-training, steps 1 and 2 came before
                raise MemoryError("no more memory")
            return submit(engine, requests, sampling)

        failing.calls = 0
        TorchEngine.submit = failing
        with pytest.raises(RunError, match="no more memory; the checkpoint of step 2 holds every unfinished row"):
            train(config, show_progress=False)

    on_ranks(2, work)
    on_ranks(2, lambda rank: train(config, resume=True, show_progress=False))
    assert_equal_runs(Run(whole.output), Run(config.output))


def test_a_crash_is_told_from_a_failure():
    with pytest.raises(RankCrashed, match=r"\[0, -11\]"):
        on_ranks(2, lambda rank: os.kill(os.getpid(), signal.SIGSEGV) if rank else None)
    with pytest.raises(AssertionError) as failed:
        on_ranks(2, lambda rank: 1 / rank)
    assert failed.type is AssertionError


def test_a_rank_that_is_killed_takes_the_others_with_it_and_the_last_checkpoint_is_whole(
    make_config, tmp_path, withstood
):
    def settings(steps):
        return {**settings_of("tppo"), "train": {"steps": steps, "micro_batch_tokens": 60, "checkpoint_every": 1}}

    config = make_config("run", **settings(1000))

    def work(rank):
        if rank == 1:
            when(config.output / "checkpoints" / "step-000002", lambda: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(RunError, match=r"rank 0 of 2 lost another: .* go on from the last checkpoint"):
            train(config, show_progress=False)

    with pytest.raises(AssertionError, match=f"{signal.SIGKILL}"):
        on_ranks(2, work)
    step = max(int(path.name[5:]) for path in (config.output / "checkpoints").glob("step-*"))
    longer = make_config("run", **settings(step + 2))
    on_ranks(2, lambda rank: train(longer, resume=True, show_progress=False))
    rows = Run(config.output).rollouts
    assert rows.step.max() == step + 2
    for _, visits in rows[rows.step > 0].groupby("row"):
        assert visits.step.diff().dropna().eq(1).all()
    withstood("SIGKILL of one of two ranks", lost="nothing: the steps since the last checkpoint are done again")


@pytest.mark.slow
def test_torchrun_starts_the_command(make_config, tmp_path):
    config = make_config("run", **settings_of("tppo"))
    values = config.model_dump(mode="json")
    (tmp_path / "config.toml").write_text(to_toml(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tppo"]
    done = subprocess.run([*command, "train", str(tmp_path / "config.toml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 3 steps") == 1
    assert Run(config.output).header["ranks"] == 2
    assert "UserWarning" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": {"schedule": "asynchronous"}, "algorithm": {"name": "ppo"}}, "decides by what all engines do"),
        ({"rollout": {"draws": "engine"}}, "engines of 3 ranks would draw the same numbers"),
        ({"parallel": {"replicas": 2}}, "parallel.replicas = 2: the 3 ranks cannot be divided"),
        ({"rollout": {"prompts_per_step": 2}}, "2 rows: fewer than the 3 ranks"),
        ({"model": {"path": "nowhere"}}, "no model can be loaded"),
    ],
)
def test_what_ranks_cannot_do_is_one_line_on_all_of_them(make_config, settings, message):
    config = make_config("run", **settings)

    def work(rank):
        with pytest.raises(ConfigError, match=message):
            train(config, show_progress=False)

    on_ranks(3, work)
    assert not config.output.exists()


def test_a_run_that_is_there_is_refused_on_all_ranks(make_config):
    config = make_config("run", train={"steps": 1})
    train(config, show_progress=False)

    def work(rank):
        with pytest.raises(ConfigError, match="already holds a run"):
            train(config, show_progress=False)

    on_ranks(2, work)


def test_environment_variables_that_are_no_numbers_are_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 'two' in the environment: not a number"), joined_ranks():
        pass


def test_every_item_is_shared_out_once_and_all_ranks_compute_as_many():
    sizes = [5, 1, 9, 2, 2, 7, 3]
    shares = [Ranks(rank, 3).share(range(7), sizes) for rank in range(3)]
    assert sorted(item for share in shares for item, counts in share if counts) == list(range(7))
    assert len({len(share) for share in shares}) == 1
    loads = [sum(sizes[item] for item, counts in share if counts) for share in shares]
    assert max(loads) <= 11  # 29 in all; the largest goes first
    assert {item for share in shares for item, counts in share if not counts} <= {1}  # the smallest
    assert SINGLE.share("abc", [1, 1, 1]) == [("a", True), ("b", True), ("c", True)]
    assert Ranks(1, 2).share([], []) == []


def test_a_rank_on_another_host_learns_the_first_ones_clock(tmp_path):
    """Its clock is made to run 1,234.5 s behind; what the exchange finds is that, to within its own uncertainty."""

    def work(rank):
        with joined_ranks(device="cpu") as ranks:
            behind = 1234.5 if rank == 1 else 0.0
            found = offsets_to_main(ranks, HOSTS, clock=lambda: time.perf_counter() - behind)
        (tmp_path / str(rank)).write_text(json.dumps([(o.seconds, o.uncertainty_s) for o in found]))

    on_ranks(2, work)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    (first, _), (offset, uncertainty) = json.loads((tmp_path / "0").read_text())
    assert first == 0
    assert 0 < uncertainty < 0.05
    assert offset == pytest.approx(1234.5, abs=uncertainty)
    (note,) = notes_of(HOSTS, [Offset(0.0, 0.0), Offset(offset, uncertainty)], HostNames(HOSTS))
    assert f"rank 1 is on another host, far: {offset:+.6f} s" in note["text"]
    assert note["host"] == "far"
    assert notes_of(HOSTS[:1] * 2, [Offset(0.0, 0.0), Offset(0.0, 0.0)], HostNames(HOSTS)) == []


def test_a_port_in_use_is_one_line():
    def work(rank):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            os.environ |= {"WORLD_SIZE": "2", "MASTER_PORT": str(taken.getsockname()[1])}
            del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
            refused = pytest.raises(ConfigError, match=r"the 2 ranks cannot join: .*; start them with torchrun")
            with refused as error, joined_ranks(device="cpu"):
                pass
        assert "\n" not in str(error.value)
        assert "address already in use" in str(error.value)

    on_ranks(1, work)
