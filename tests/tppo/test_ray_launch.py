"""`tppo train CONFIG --ray ADDRESS --ray.ranks N`: the trainer's ranks, started on the cluster by one command."""

import signal
import subprocess
import sys

import psutil
import pytest

from profiling.errors import ConfigError
from profiling.reader import Run
from profiling.settings import to_toml
from tests.tppo.test_ranks import assert_equal_runs
from tests.waiting import until
from tppo import start
from tppo.checkpoints.store import checkpoints_of
from tppo.cli import main
from tppo.cluster.launch import launches_ranks
from tppo.cluster.places import check_hosts_hold


def run_of(make_config, name, **sections):
    ray = {"address": "local", "engines": 2, "ranks": 2, **sections.pop("ray", {})}
    return make_config(name, ray=ray, rollout={"draws": "row"}, **sections)


def command_of(config):
    """It is written beside its run directory."""
    path = config.output.with_suffix(".toml")
    path.write_text(to_toml(config.model_dump(mode="json")))
    return [sys.executable, "-m", "tppo", "train", str(path)]


@pytest.mark.slow
def test_two_ranks_of_one_command_train_as_one_process(make_config):
    pytest.importorskip("ray", reason="needs the extra ray")
    here = make_config("here", rollout={"draws": "row"}, train={"steps": 3})
    start.train(here, show_progress=False)
    there = run_of(make_config, "there", train={"steps": 3})
    done = subprocess.run(command_of(there), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{there.output}: finished after 3 steps") == 1  # the first rank's, and no other's
    assert_equal_runs(Run(here.output), Run(there.output))


@pytest.mark.slow
def test_sigterm_is_passed_on_and_a_killed_rank_ends_the_run(make_config):
    pytest.importorskip("ray", reason="needs the extra ray")
    config = run_of(make_config, "run", train={"steps": 500, "checkpoint_every": 1})
    command = command_of(config)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        await_checkpoint(config, 1)
        launcher.send_signal(signal.SIGTERM)
        error = launcher.communicate(timeout=500)[1]
    assert launcher.returncode == 128 + signal.SIGTERM
    assert error.count("SIGTERM: saving after the step under way") == 1
    last = checkpoints_of(config.output)[-1]
    assert Run(config.output).trailer["status"] == "interrupted"

    resume = [sys.executable, "-m", "tppo", "train", "--resume", str(config.output)]
    with subprocess.Popen(resume, stderr=subprocess.PIPE, text=True) as launcher:
        await_checkpoint(config, int(last.name[5:]) + 1)
        rank_of("1", config).kill()
        error = launcher.communicate(timeout=500)[1]
    assert launcher.returncode == 1
    assert "rank 0 of 2 lost another" in error
    assert not [own for own in psutil.process_iter(["cmdline"]) if str(config.output) in (own.info["cmdline"] or [])]


def await_checkpoint(config, step):
    until((config.output / "checkpoints" / f"step-{step:06d}").exists, "no checkpoint")


def rank_of(number, config):
    for own in psutil.process_iter(["cmdline"]):
        if str(config.output) in (own.info["cmdline"] or []) and own.environ().get("RANK") == number:
            return own
    raise AssertionError(f"no rank {number}")


@pytest.mark.slow
def test_more_ranks_than_the_cluster_has_cpus_is_one_line(make_config):
    pytest.importorskip("ray", reason="needs the extra ray")
    config = run_of(make_config, "run", ray={"ranks": 4096})
    done = subprocess.run(command_of(config), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("tppo: ray.ranks = 4096: a CPU each, and the cluster has ")
    assert done.stderr.count("\n") == 1
    assert not config.output.exists()


def test_ranks_without_a_cluster_are_refused(make_config, capsys):
    config = run_of(make_config, "run", ray={"address": ""})
    assert main(command_of(config)[3:]) == 2
    assert capsys.readouterr().err == (
        "tppo: ray.ranks = 2: they are started on a cluster; add --ray ADDRESS, or use torchrun\n"
    )


def test_a_rank_starts_no_ranks(make_config, monkeypatch):
    config = run_of(make_config, "run")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launches_ranks(config)
    assert not launches_ranks(run_of(make_config, "alone", ray={"ranks": 1}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launches_ranks(config)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="torchrun has started 3; leave one of the two out"):
        launches_ranks(config)


def test_colocated_engines_that_the_trainers_host_cannot_hold_are_refused_at_once(make_config):
    """Not after a minute of waiting for other runs: no host will ever have them."""
    config = run_of(make_config, "run", ray={"engines": 8, "ranks": 1})
    bundles = [{"CPU": 1.0, "GPU": 4.0, "node:10.0.0.1": 0.001}] * 8
    hosts = {f"node:10.0.0.{n}": {"CPU": 64.0, "GPU": 8.0} for n in range(1, 9)}
    with pytest.raises(
        ConfigError, match=r"need 32 GPUs of the trainer's host \(10.0.0.1\), which has 8; .*--ray.ranks"
    ):
        check_hosts_hold(config, bundles, hosts)
    check_hosts_hold(config, bundles[:2], hosts)
    spread = [{**bundles[0], f"node:10.0.0.{1 + n // 2}": 0.001} for n in range(2, 4)]
    check_hosts_hold(config, spread, hosts)
