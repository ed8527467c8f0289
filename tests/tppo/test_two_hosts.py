"""One command for a run on several hosts. The hosts are network namespaces of this machine with a cable between them:
each has its address, its name, its Ray and nothing of the other's loopback. They share a kernel and the disk."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from profiling.reader import Run
from tests.tppo.test_ranks import assert_equal_runs
from tests.tppo.test_ray_launch import command_of, run_of
from tppo import start

pytestmark = pytest.mark.slow
HOSTS = {"tppo-host-1": "10.213.77.1", "tppo-host-2": "10.213.77.2"}
PORT = 6399
OF_RAY = {"RAY_AUTH_MODE": "disabled", "RAY_DISABLE_IMPORT_WARNING": "1"}


def on_host(host, *words, **options):
    named = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh"]
    command = ["ip", "netns", "exec", host, *named, *map(str, words)]
    return subprocess.run(command, env=os.environ | OF_RAY, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a Ray cluster of both hosts, a CPU each."""
    pytest.importorskip("ray", reason="needs the extra ray")
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2: two hosts are two network namespaces")
    first, second = HOSTS
    made = [subprocess.run(["ip", "netns", "add", host], capture_output=True, text=True) for host in HOSTS]
    if any(done.returncode for done in made):
        pytest.skip(f"no network namespaces here: {made[0].stderr.strip()}")
    ray = Path(sys.executable).with_name("ray")
    folder = tmp_path_factory.mktemp("r")  # a short name: sockets are in it
    try:
        subprocess.run(["ip", "link", "add", "cable0", "netns", first, "type", "veth", "peer", "name", "cable1",
                        "netns", second], check=True)  # fmt: skip
        for place, (host, own) in enumerate(HOSTS.items()):
            on_host(host, "ip", "addr", "add", f"{own}/24", "dev", f"cable{place}", check=True)
            for link in ("lo", f"cable{place}"):
                on_host(host, "ip", "link", "set", link, "up", check=True)
        common = ["--num-cpus", 1, "--disable-usage-stats"]
        on_host(first, ray, "start", "--head", "--node-ip-address", HOSTS[first], "--port", PORT, *common,
                "--include-dashboard", "false", "--temp-dir", folder, check=True)  # fmt: skip
        on_host(second, ray, "start", "--address", f"{HOSTS[first]}:{PORT}", "--node-ip-address", HOSTS[second],
                *common, check=True)  # fmt: skip
        yield f"{HOSTS[first]}:{PORT}"
    finally:
        for host in HOSTS:
            for pid in on_host(host, "ip", "netns", "pids", host).stdout.split():
                subprocess.run(["kill", "-9", pid])
            subprocess.run(["ip", "netns", "del", host])


def test_a_rank_and_an_engine_on_each_of_two_hosts_train_as_one_process(address, make_config):
    here = make_config("here", rollout={"draws": "row"}, train={"steps": 3})
    start.train(here, show_progress=False)
    there = run_of(make_config, "there", train={"steps": 3}, ray={"address": address})
    done = on_host(next(iter(HOSTS)), *command_of(there), timeout=1000)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(Run(here.output), Run(there.output))
    assert set(Run(there.output).engine.engine) == {0, 1}


def test_a_host_that_has_engines_alone_is_sampled_too(address, make_config):
    """One process trains, on the first host; each host has the CPU of one engine."""
    config = run_of(make_config, "run", train={"steps": 2}, profile={"sampler": True, "interval_s": 0.2},
                    ray={"address": address, "ranks": 1, "engines": 2, "layout": "separate"})  # fmt: skip
    began = time.perf_counter()
    done = on_host(next(iter(HOSTS)), *command_of(config), timeout=1000)
    took_s = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    run = Run(config.output)
    (note,) = [record for record in run.trace if record["type"] == "note" and "host" in record]
    assert note["engine"] in {0, 1}
    assert note["host"] == "tppo-host-2"
    assert set(run.devices.device) == {"host", "host tppo-host-2"}
    assert run.unsampled_hosts == []
    assert run.devices.t.between(-0.1, took_s).all()  # on one clock; a busy machine ends samplers late
