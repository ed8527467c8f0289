"""FSDP ranks that train and engines of a Ray cluster that generate, together. Two ranks over gloo; two engines that
outlive a run, because importing torch and transformers is most of what they take."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="needs the extra ray")

import ray

from profiling.errors import ConfigError, RunError
from profiling.hosts import Host
from profiling.reader import Run
from profiling.settings import to_toml
from tests.tppo.ranks import on_ranks, when
from tests.tppo.test_ranks import assert_equal_runs
from tests.waiting import until_gone
from tppo import start
from tppo.cluster import places, sync
from tppo.cluster.hosts import Home, hosts_of
from tppo.cluster.packing import layouts_of
from tppo.cluster.places import Places, as_seen_here, bundles_of, check_it_is_there, gpus_of_ranks
from tppo.cluster.pool import EnginePool
from tppo.parallel.ranks import SINGLE

pytestmark = pytest.mark.slow
RANKS = 2


class LastingPlaces(Places):
    """Each engine is an actor with a name, found again by the next run. One that died starts anew."""

    def actor(self, cls, bundle, **options):
        made = ray.remote(num_cpus=0, concurrency_groups={"control": 1})(cls)
        own = {"name": f"engine-{bundle}", "lifetime": "detached", "get_if_exists": True}
        for _ in range(1000):
            actor = made.options(**own).remote()
            try:
                ray.get(actor.now.remote())
                return actor
            except ray.exceptions.RayError:
                time.sleep(0.1)
        raise AssertionError("no engine starts")


@pytest.fixture(scope="module")
def cluster():
    """Its address."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="ranks")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def with_lasting_engines(address):
    """From now on this process, a rank, has them."""

    @contextmanager
    def places_of(config, ranks=SINGLE):
        if not ranks.main:
            yield None
            return
        ray.init(address=address, namespace="ranks", log_to_driver=False)
        yield LastingPlaces(ray, None, [], config.ray.engines, 0)
        ray.shutdown()

    start.places_of = places_of


def train_on_ranks(cluster, config, *, resume=False, before=lambda rank: None):
    def work(rank):
        with_lasting_engines(cluster)
        before(rank)
        start.train(config, resume=resume, show_progress=False)

    on_ranks(RANKS, work)
    return Run(config.output)


def pair(make_config, *, steps=3, ray=None, **sections):
    """The same run in one process, and for ranks and engines."""
    own = {
        **sections,
        "rollout": {"draws": "row", **sections.get("rollout", {})},
        "train": {"steps": steps, "micro_batch_tokens": 60, **sections.get("train", {})},
    }
    there = {"address": "auto", "engines": 2, **(ray or {})}
    return make_config("here", **own), make_config("there", **own, ray=there)


SETTINGS = {
    "tppo": {"algorithm": {"kl_coef": 0.1, "entropy_coef": 0.01}},
    "asynchronous": {"algorithm": {"name": "ppo"}, "rollout": {"schedule": "asynchronous"}},
    "oversample": {"algorithm": {"name": "ppo"}, "rollout": {"schedule": "oversample"}, "ray": {"engines": 1}},
    "adapters": {"model": {"lora_rank": 2}, "ray": {"layout": "separate", "weight_sync": "gloo"}},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_ranks_with_a_clusters_engines_give_the_rows_and_losses_of_one_process(make_config, cluster, kind):
    if kind == "adapters":
        pytest.importorskip("peft", reason="needs the extra lora")
    here, there = pair(make_config, **SETTINGS[kind])
    start.train(here, show_progress=False)
    one, many = Run(here.output), train_on_ranks(cluster, there)
    assert_equal_runs(one, many)
    engines, trainers = there.ray.engines, RANKS if there.ray.layout == "separate" else 0
    assert set(many.engine.engine) == set(range(engines))
    header = many.header
    assert (header["ranks"], header["trainer_gpus"], header["gpus"]) == (RANKS, trainers, engines + trainers)
    assert many.summary["gpu_seconds"] == pytest.approx((engines + trainers) * many.summary["wall_seconds"])


def kill_engine(pool, number):
    """At once: what it has been given it does not even begin. Ray's own way may be slower than the engine."""
    (pid,) = (member.about.pid for member in pool._members if member.engine == number)
    os.kill(pid, signal.SIGKILL)
    until_gone(pid)


def dies_in_submission(engine, number):
    """In a rank: the engine dies when rows are submitted for the n-th time."""
    submit = EnginePool.submit
    calls = []

    def deadly(pool, requests, sampling):
        submit(pool, requests, sampling)
        calls.append(0)
        if len(calls) == number:
            kill_engine(pool, engine)

    EnginePool.submit = deadly


@pytest.mark.parametrize("engines", [1, 2])
def test_an_engine_that_dies_with_rows_changes_nothing(make_config, cluster, engines):
    """Another takes them; where it was the only one, its replacement gets the last weights from the object store."""
    here, there = pair(make_config, steps=4, evaluation={"every": 0}, ray={"engines": engines})
    start.train(here, show_progress=False)

    many = train_on_ranks(cluster, there, before=lambda rank: dies_in_submission(0, 3))  # value model, steps 1 and 2
    assert_equal_runs(Run(here.output), many)
    (note,) = (record for record in many.trace if "engine 0 failed" in record.get("text", ""))
    assert note["rows"] == len(many.rollouts.query("step == 2")) / engines


@pytest.mark.parametrize("path", ["object_store", "gloo"])
def test_an_engine_that_dies_between_two_chunks_of_weights_leaves_no_rank_waiting(make_config, cluster, path):
    """Ranks gather to the end, and once more for those that live."""
    here, there = pair(make_config, steps=3, evaluation={"every": 0}, ray={"weight_sync": path})
    start.train(here, show_progress=False)

    def before(rank):
        gathered = sync.gathered_chunks
        sync.layouts_of = lambda model, dtype: layouts_of(model, dtype, chunk_bytes=4000)
        calls, pools = [], []
        update_weights = EnginePool.update_weights

        def remembered(pool, version):
            pools[:] = [pool]
            update_weights(pool, version)

        EnginePool.update_weights = remembered

        @contextmanager
        def deadly(*arguments):
            calls.append(0)

            def some_die(chunks):
                for number, chunk in enumerate(chunks):
                    if len(calls) == 3 and number == 1:
                        kill_engine(pools[0], 1)
                        if path == "gloo":
                            raise RuntimeError("a broadcast that lost a member")
                    yield chunk

            with gathered(*arguments) as chunks:
                yield some_die(chunks)

        sync.gathered_chunks = deadly

    many = train_on_ranks(cluster, there, before=before)
    assert_equal_runs(Run(here.output), many)
    assert any("engine 1 failed" in record.get("text", "") for record in many.trace)


def test_without_an_engine_all_ranks_end_with_every_row_saved_and_a_resumed_run_equals(make_config, cluster):
    here, there = pair(make_config, steps=6, evaluation={"every": 0}, ray={"engines": 1, "retries": 0})
    start.train(here, show_progress=False)

    def work(rank):
        with_lasting_engines(cluster)
        dies_in_submission(0, 5)  # the value model's, steps 1 to 4
        with pytest.raises(RunError, match=r"no rollout engine on the cluster is left .* holds every unfinished row"):
            start.train(there, show_progress=False)

    on_ranks(RANKS, work)
    assert_equal_runs(Run(here.output), train_on_ranks(cluster, there, resume=True))


def test_sigterm_to_the_rank_without_engines_saves_and_a_resumed_run_equals(make_config, cluster):
    own = {"algorithm": {"name": "ppo"}, "rollout": {"schedule": "asynchronous"}, "evaluation": {"every": 0}}
    _, endless = pair(make_config, steps=1000, **own)

    def before(rank):
        if rank == 1:
            when(endless.output / "rollouts" / "step-000003.parquet", lambda: os.kill(os.getpid(), signal.SIGTERM))

    steps = train_on_ranks(cluster, endless, before=before).rollouts.step.max()
    assert 3 <= steps < 1000
    here, there = pair(make_config, steps=int(steps) + 2, **own)
    start.train(here, show_progress=False)
    assert_equal_runs(Run(here.output), train_on_ranks(cluster, there, resume=True))


def test_a_rank_that_is_killed_ends_the_one_that_drives_the_engines(make_config, cluster):
    _, there = pair(make_config, steps=1000, train={"checkpoint_every": 1}, evaluation={"every": 0})

    def work(rank):
        with_lasting_engines(cluster)
        if rank == 1:
            when(there.output / "checkpoints" / "step-000002", lambda: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(RunError, match=r"rank 0 of 2 lost another: .* go on from the last checkpoint"):
            start.train(there, show_progress=False)

    with pytest.raises(AssertionError, match=f"{signal.SIGKILL}"):
        on_ranks(RANKS, work)
    assert (there.output / "checkpoints" / "step-000002").exists()


def test_what_the_first_rank_finds_wrong_with_the_cluster_is_one_line_on_all(make_config, cluster):
    _, large = pair(make_config, ray={"engines": 8, "address": cluster})
    _, nowhere = pair(make_config, ray={"address": "127.0.0.1:1"})

    def work(rank):
        with pytest.raises(ConfigError, match="with 1 CPUs each they need 8, and the cluster has 4") as refused:
            start.train(large, show_progress=False)
        assert "\n" not in str(refused.value)
        assert ("ray" in sys.modules) == (rank == 0)

    on_ranks(RANKS, work)

    def again(rank):
        with pytest.raises(ConfigError, match=r"--ray 127.0.0.1:1: no Ray cluster answers there"):
            start.train(nowhere, show_progress=False)

    on_ranks(RANKS, again)
    assert not large.output.exists()


def test_torchrun_starts_ranks_and_a_cluster_of_this_machine(make_config, tmp_path):
    here, there = pair(make_config, steps=2)
    (tmp_path / "config.toml").write_text(
        to_toml(here.model_copy(update={"output": there.output}).model_dump(mode="json"))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tppo"]
    words = ["train", str(tmp_path / "config.toml"), "--ray", "local", "--ray.engines", "2"]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 2 steps") == 1
    start.train(here, show_progress=False)
    assert_equal_runs(Run(here.output), Run(there.output))


def test_colocated_engines_of_two_hosts_are_where_their_ranks_are(make_config):
    def of(engines, gpus, layout="colocated"):
        vllm = {"tensor_parallel": gpus}
        return make_config("run", ray={"address": "auto", "engines": engines, "layout": layout}, vllm=vllm,
                           rollout={"engine": "vllm"})  # fmt: skip

    two = ["node:a"] * 4 + ["node:b"] * 4
    on_a, on_b = ({"CPU": 1, "GPU": 2, host: 0.001} for host in ("node:a", "node:b"))
    assert bundles_of(of(4, 2), on_gpus=True, hosts=two) == [on_a, on_a, on_b, on_b]
    without = [{"CPU": 1, host: 0.001} for host in ("node:a", "node:a", "node:b")]
    assert bundles_of(of(3, 2), on_gpus=False, hosts=two) == without  # engine i beside rank 8 i / 3 = 0, 2, 5
    with pytest.raises(ConfigError) as refused:
        bundles_of(of(3, 2), on_gpus=True, hosts=two)
    assert str(refused.value) == (
        "ray.engines = 3: colocated, 3 x 2 GPUs must be those of the 8 ranks; make ray.engines x ray.gpus_per_engine "
        '= 8, or set ray.layout = "separate"'
    )
    with pytest.raises(ConfigError, match=r"ray.gpus_per_engine = 2: an engine is on one host, .* --nproc-per-node"):
        bundles_of(of(3, 2), on_gpus=True, hosts=["node:a"] * 3 + ["node:b"] * 3)


def test_separate_engines_leave_every_rank_a_gpu_of_its_host(make_config):
    config = make_config("run", ray={"address": "auto", "engines": 2, "layout": "separate"})
    kept = [{"CPU": 0, "GPU": 2, "node:a": 0.001}, {"CPU": 0, "GPU": 1, "node:b": 0.001}]
    bundles = bundles_of(config, on_gpus=True, hosts=["node:a", "node:a", "node:b"])
    assert bundles == [*2 * [{"CPU": 1, "GPU": 1}], *kept]
    with pytest.raises(ConfigError, match="with 1 GPUs each and 3 for the trainer they need 5, and the cluster has 4"):
        check_it_is_there(config, bundles, {"CPU": 64, "GPU": 4})


def test_ranks_compute_on_the_gpus_that_were_reserved_for_them_or_their_engines(monkeypatch):
    """Which are the engines' where no bundle is the trainer's own."""
    numbers = {0: [3, 1], 1: [0, 2], 2: [7, 5]}
    monkeypatch.setattr(places, "reserved_gpus", lambda got, bundle: list(numbers[bundle]))
    engines = [{"GPU": 2, "node:a": 0.001}, {"GPU": 2, "node:a": 0.001}, {"GPU": 2, "node:b": 0.001}]
    colocated = Places(None, None, engines, 3, 2)
    assert gpus_of_ranks(colocated, ["node:a"] * 4 + ["node:b"] * 2) == (3, 1, 0, 2, 7, 5)
    assert gpus_of_ranks(Places(None, None, engines[:2], 2, 2), ["node:a"]) == (3,)
    separate = Places(None, None, [{"GPU": 2}, *engines[1:]], 1, 2)
    assert gpus_of_ranks(separate, ["node:b", "node:a", "node:a", "node:b"]) == (7, 0, 2, 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,5")
    assert [as_seen_here(gpu) for gpu in (7, 5)] == [1, 2]


def test_a_rank_is_found_among_the_clusters_hosts_by_its_addresses():
    """Processes of one boot are on one host, whatever addresses it has."""
    nodes = [{"NodeManagerAddress": "10.0.0.1", "Alive": True}, {"NodeManagerAddress": "10.0.0.2", "Alive": True},
             {"NodeManagerAddress": "10.0.0.3", "Alive": False}]  # fmt: skip
    util = SimpleNamespace(
        client=SimpleNamespace(ray=SimpleNamespace(is_connected=lambda: False)), get_node_ip_address=lambda: "10.0.0.1"
    )
    cluster = SimpleNamespace(nodes=lambda: nodes, util=util)
    first, other = Home(Host("x", "a"), frozenset()), Home(Host("y", "b"), frozenset({"172.17.0.1", "10.0.0.2"}))
    assert hosts_of([first, first, other], cluster, "auto") == ["node:10.0.0.1", "node:10.0.0.1", "node:10.0.0.2"]
    gone = Home(Host("z", "c"), frozenset({"10.0.0.3"}))
    with pytest.raises(ConfigError, match=r"--ray auto: rank 1 is on c, which is no host of this cluster; run `ray s"):
        hosts_of([first, gone], cluster, "auto")
