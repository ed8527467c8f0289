"""`tppo train CONFIG --ray ADDRESS`: what it refuses, and what it leaves behind."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from profiling.errors import ConfigError
from profiling.reader import Run
from tests.waiting import until
from tppo.checkpoints.store import checkpoints_of
from tppo.cli import main
from tppo.cluster.places import bundles_of, check_it_is_there
from tppo.cluster.start import backend_of
from tppo.config import RunConfig


def config_of(make_config, **own):
    sections = {name: own.pop(name) for name in ("rollout", "vllm", "model") if name in own}
    return make_config("run", ray={"address": "auto", **own}, **sections)


@pytest.fixture
def toml(tmp_path, tiny_model):
    path = tmp_path / "run.toml"
    path.write_text(f'output = "{tmp_path / "run"}"\n[model]\npath = "{tiny_model}"\n')
    return path


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port"])
def test_an_address_where_nobody_answers_is_one_line(toml, capsys, address):
    pytest.importorskip("ray", reason="needs the extra ray")
    assert main(["train", str(toml), "--ray", address]) == 2
    error = capsys.readouterr().err
    assert f"--ray {address}: no Ray cluster answers there: " in error
    assert error.count("\n") == 1
    assert not (toml.parent / "run").exists()


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_is_told_from_one_that_is_not_there(toml):
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        address = ray.get_runtime_context().gcs_address
        without = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
        command = [sys.executable, "-m", "tppo", "train", str(toml), "--ray", address]
        done = subprocess.run(command, env=without, capture_output=True, text=True)
    finally:
        ray.shutdown()
    assert done.returncode == 2
    assert "asks for a token: set RAY_AUTH_MODE=token" in done.stderr


@pytest.mark.slow
def test_auto_without_a_cluster_is_one_line(toml, capsys, monkeypatch):
    pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["train", str(toml), "--ray", "auto"]) == 2
    assert "--ray auto: no Ray cluster answers there: " in capsys.readouterr().err


def test_ray_that_is_not_installed_is_one_line(toml, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["train", str(toml), "--ray", "local"]) == 2
    assert capsys.readouterr().err == (
        "tppo: --ray: Ray is not installed; install the extra `ray`, or leave --ray out\n"
    )


@pytest.mark.slow
def test_without_an_address_nothing_of_ray_is_imported():
    code = (
        "import sys, tppo.start\nfrom tppo.config import RunConfig\n"
        "with tppo.start.places_of(RunConfig()) as places: assert places is None\n"
        "assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"engines": 9}, "ray.engines = 9: a step has only 8 rows; lower it"),
        (
            {"gpus_per_engine": 2},
            "ray.gpus_per_engine = 2: vLLM splits its weights over vllm.tensor_parallel = 1",
        ),
        ({"engines": 0}, "greater than 0"),
        ({"layout": "mixed"}, "'colocated' or 'separate'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make_config, own, message):
    with pytest.raises(ValueError, match="ray") as refused:
        config_of(make_config, **own)
    assert message in str(refused.value)


def test_a_colocated_engine_asks_for_the_trainers_host_and_whole_gpus(make_config):
    config = config_of(make_config, engines=2, cpus_per_engine=3, gpus_per_engine=4, vllm={"tensor_parallel": 4})
    assert bundles_of(config, on_gpus=True, hosts=["node:a"]) == 2 * [{"CPU": 3, "GPU": 4, "node:a": 0.001}]
    assert bundles_of(config, on_gpus=False, hosts=["node:a"]) == 2 * [{"CPU": 3, "node:a": 0.001}]
    with pytest.raises(ConfigError, match=r'ray.layout = "colocated": the trainer is outside the cluster'):
        bundles_of(config, on_gpus=True, hosts=[])


def test_separate_engines_leave_a_gpu_of_the_trainers_host_to_it(make_config):
    config = config_of(make_config, engines=2, layout="separate")
    trainer = {"CPU": 0, "GPU": 1, "node:a": 0.001}
    assert bundles_of(config, on_gpus=True, hosts=["node:a"]) == [*2 * [{"CPU": 1, "GPU": 1}], trainer]
    assert bundles_of(config, on_gpus=True, hosts=[]) == 2 * [{"CPU": 1, "GPU": 1}]
    assert bundles_of(config, on_gpus=False, hosts=["node:a"]) == 2 * [{"CPU": 1}]


def test_too_few_gpus_or_cpus_are_one_line_with_both_numbers(make_config):
    config = config_of(make_config, engines=4, layout="separate")
    bundles = bundles_of(config, on_gpus=True, hosts=["node:a"])
    with pytest.raises(ConfigError) as refused:
        check_it_is_there(config, bundles, {"CPU": 64, "GPU": 4})
    assert str(refused.value) == (
        "ray.engines = 4: with 1 GPUs each and 1 for the trainer they need 5, and the cluster has 4; lower it, or "
        "ray.gpus_per_engine"
    )
    with pytest.raises(ConfigError, match="with 1 CPUs each they need 4, and the cluster has 2; lower it"):
        check_it_is_there(config, bundles, {"CPU": 2, "GPU": 8})
    check_it_is_there(config, bundles, {"CPU": 4, "GPU": 5})


def test_weights_are_broadcast_where_trainer_and_engines_have_gpus_of_their_own(make_config):
    separate = config_of(make_config, layout="separate")
    assert backend_of(separate, on_gpus=True) == "nccl"
    assert backend_of(separate, on_gpus=False) is None
    assert backend_of(config_of(make_config), on_gpus=True) is None
    assert backend_of(config_of(make_config, layout="separate", weight_sync="gloo"), on_gpus=False) == "gloo"
    with pytest.raises(ConfigError, match=r'ray.weight_sync = "nccl": is for layout = "separate"'):
        backend_of(config_of(make_config, weight_sync="nccl"), on_gpus=True)


def test_vllm_may_run_ahead_in_processes_of_its_own(make_config):
    own = {"rollout": {"engine": "vllm", "schedule": "asynchronous"}, "algorithm": {"name": "ppo"}}
    with pytest.raises(ValueError, match="give it processes of its own with --ray"):
        make_config("run", **own)
    assert isinstance(make_config("run", ray={"address": "auto"}, **own), RunConfig)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to_group", "code"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)])
def test_a_signal_saves_and_leaves_no_process_behind(toml, number, to_group, code):
    """Ctrl-C reaches every process of the terminal's group."""
    pytest.importorskip("ray", reason="needs the extra ray")
    output = toml.parent / "run"
    command = [
        sys.executable, "-m", "tppo", "train", str(toml), "--ray", "local", "--train.steps", "100000",
        "--rollout.max_response_tokens", "24", "--data.max_steps", "6", "--profile.sampler", "false",
        "--evaluation.every", "0", "--value.pretrain_rows", "0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip

    def two_steps_are_done():
        assert process.poll() is None, process.stderr.read()
        return (output / "rollouts" / "step-000002.parquet").exists()

    until(two_steps_are_done, "no step")
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in name_of(child) for child in children)
    (os.killpg if to_group else os.kill)(process.pid, number)
    said = process.communicate(timeout=500)[1]
    assert process.returncode == code, said
    assert "saving after the step under way" in said
    assert Run(output).trailer["status"] == "interrupted"
    assert checkpoints_of(output)
    _, alive = psutil.wait_procs(children, timeout=200)
    assert alive == []


def name_of(process):
    """Ray starts processes that it ends again."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""
