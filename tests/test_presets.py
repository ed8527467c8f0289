"""Every file in configs/ that `tppo train` reads: it validates, and its modules fit the GPUs that it names."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from profiling.errors import ConfigError
from profiling.model_memory import ACTIVATIONS, ON_ITS_WAY, SHARE, STATES, Pass, training_needs
from profiling.settings import check_settings, read_toml, to_toml
from simulator.hardware import load_gpu
from simulator.models import load_model
from tests.tppo.families import SIZES
from tests.tppo.test_value_source import save_reward_model
from tppo.cli import main
from tppo.commands import check
from tppo.commands.check import config_json_of, run_check
from tppo.config import RunConfig
from tppo.models import memory
from tppo.models.policy import load_policy
from tppo.regimes import load_regime
from tppo.warmstart import warm_start

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path for path in (ROOT / "configs").glob("*.toml") if "[model]" in path.read_text())
CHECKS = [
    (path, *found) for path in PRESETS for found in re.findall(r"--check --gpu (\S+) --gpus (\d+)", path.read_text())
]
REAL = [check for check in CHECKS if check[0].name != "demo.toml"]


def config_at(path):
    return check_settings(read_toml(path), RunConfig, where=str(path))


def parts_at(config, card, gpus):
    return check.parts_of(check.built_sizes(config), check.plan_sizes(config), config, card, gpus)


def small_demo(folder):
    """The demo's preset, and a model of its sizes where it expects one."""
    folder.mkdir(exist_ok=True)
    small = load_regime("short").warm_start
    sizes = {
        "model_type": "qwen2", "vocab_size": 64, "hidden_size": small.hidden_size, "num_hidden_layers": small.layers,
        "intermediate_size": small.intermediate_size, "num_attention_heads": small.heads,
        "num_key_value_heads": small.kv_heads, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    config = config_at(ROOT / "configs" / "demo.toml")
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_validates_and_names_the_commands_that_start_and_check_it(path):
    config_at(path)
    assert re.search(rf"tppo train configs/{re.escape(path.name)}$", path.read_text(), re.MULTILINE)
    assert any(path == checked for checked, *_ in CHECKS)


@pytest.mark.parametrize(("path", "gpu", "gpus"), REAL, ids=lambda value: getattr(value, "stem", value))
def test_a_preset_fits_the_gpus_that_it_names_and_the_plan_counts_the_same(path, gpu, gpus, capsys):
    assert main(["train", str(path), "--check", "--gpu", gpu, "--gpus", gpus]) == 0
    shown = capsys.readouterr().out
    assert "weights, gradients, moments" in shown
    assert len(re.findall(r"[+-]0\.0\d%", shown)) == 6  # every part


@pytest.mark.slow
@pytest.mark.parametrize(("path", "gpu", "gpus"), CHECKS, ids=lambda value: getattr(value, "stem", value))
def test_the_plan_of_a_preset_says_the_memory_that_its_modules_have(path, gpu, gpus, tmp_path, capsys):
    config = config_at(path)
    if path.name == "demo.toml":
        config = small_demo(tmp_path / "model")
        path = tmp_path / "demo.toml"
        path.write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
    words = ["--gpu", gpu, "--gpus", gpus, "--extrapolate", "--draws", "10", "--json"]
    assert main(["plan", "--config", str(path), *words]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    built = check.phases_of(check.built_sizes(config), config, load_gpu(gpu), int(gpus))
    assert len(rows) == 2
    for row in rows:
        assert row["fault"] is None
        for phase, parts in built.items():
            said = row["memory_gb"][phase]
            assert said == pytest.approx({part: size / 1e9 for part, size in parts.items()}, rel=0.02), phase
            assert sum(said.values()) == pytest.approx(sum(parts.values()) / 1e9, rel=0.02)
            assert row["memory_headroom_gb"] <= 0.95 * load_gpu(gpu).memory_bytes / 1e9 - sum(said.values()) + 1e-9


@pytest.mark.parametrize("path", [p for p in PRESETS if p.stem != "demo"], ids=lambda path: path.stem)
def test_the_modules_on_the_meta_device_have_the_parameters_of_the_plan_s_formulas(path):
    config = config_at(path)
    source = config_json_of(config.model.path)
    built = memory.build(json.loads(source.read_text()), config)
    model = load_model(source)
    assert sum(p.numel() for p in built.policy.parameters()) == model.parameters
    head = model.hidden + 1
    assert sum(p.numel() for p in built.value_model.parameters()) == model.backbone_parameters + head
    assert all(p.device.type == "meta" for p in built.policy.parameters())


def test_the_demo_s_preset_is_what_the_demo_trains(monkeypatch, tmp_path, capsys):
    preset = config_at(ROOT / "configs" / "demo.toml")
    regime = load_regime("short")
    expected = regime.run_config("tppo", 0, Path(preset.model.path), preset.output)
    assert preset == expected
    folder = tmp_path / Path(preset.model.path).name
    folder.mkdir()  # named after the settings of the model: found, not trained
    assert warm_start(regime.warm_start, regime.data, regime.task(0), tmp_path, lambda step, loss: None) == folder
    config = small_demo(folder)
    run_check(config, gpu="RTX-4090", gpus=1, where="demo")
    assert "training: 0." in capsys.readouterr().out


def test_the_paper_s_settings_are_those_of_its_section():
    config = config_at(ROOT / "configs" / "paper-32b.toml")
    rollout, evaluation = config.rollout, config.evaluation
    assert (rollout.prompts_per_step, rollout.samples_per_prompt) == (512, 16)
    assert config.rows_per_step / config.train.mini_batches == 512
    assert (rollout.max_response_tokens, rollout.window) == (24 * 1024, 8 * 1024)
    assert (evaluation.samples, evaluation.temperature, evaluation.top_p) == (32, 1.0, 0.7)
    assert (config.optimizer.policy_lr, config.optimizer.value_lr, config.optimizer.weight_decay) == (1e-6, 2e-6, 0.1)
    assert (config.algorithm.kl_coef, config.algorithm.entropy_coef) == (0, 0)
    assert (config.reward.right, config.reward.wrong) == (1, -1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gpu RTX-4090 --gpus 8", "rollout needs"),
        (
            "--gpu H100-SXM --gpus 4",
            "usable; what lowers it: a lower rollout.max_rows_per_engine, a lower",
        ),
        ("--gpus 8", "--check: name the GPU"),
        ("--gpu H100-SXM --gpus 0", "--gpus 0"),
        ("--gpu H100-SXM --gpus 8 --parallel.replicas 3", "does not divide"),
        ("--gpu H100-SXM --gpus 8 --model.path me/unknown", "--check needs its config.json"),
        ("--gpu NOTHING --gpus 8", "NOTHING"),
        ("--gpu H100-SXM --gpus 8 --data.task arithmetic --data.sigma -1", "data.sigma"),
        ("--gpu H100-SXM --gpus 8 --rollout.engine vllm", "vLLM is one engine of 1 GPUs in a process that trains on"),
        ("--gpu H100-SXM --gpus 8 --ray local --ray.engines 4", "4 engines of 1 must be on the GPUs that train"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(words, expected, capsys):
    code = main(["train", str(ROOT / "configs" / "qwen2.5-7b-8gpu.toml"), "--check", *shlex.split(words)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert expected in line


@pytest.mark.parametrize("name", ["paper-32b", "qwen2.5-7b-8gpu", "qwen2.5-0.5b-1gpu"])
def test_a_preset_of_a_base_model_stops_at_its_templates_end_and_asks_for_an_answer_wherever_it_asks(name):
    config = config_at(ROOT / "configs" / f"{name}.toml")
    assert config.rollout.stop_token_ids == (151645,)
    asks = config.evaluation.prompt_template or config.data.prompt_template
    assert "Answer:" in asks or "\\boxed{}" in asks  # DAPO-Math-17K's training prompts bring the first


def test_gpus_of_a_cluster_hold_shards_and_parts_of_engines_or_one_of_both():
    # 16 engines of 4. A share of 0.65 is 0.65 x 85.52 GB = 55.59; 151 936 x 5120 float32 numbers are 3.11 GB
    config = config_at(ROOT / "configs" / "paper-32b.toml")
    card = load_gpu("H100-SXM")

    def gb(gpus, layout):
        ray = config.ray.model_copy(update={"layout": layout})
        parts = parts_at(config.model_copy(update={"ray": ray}), card, gpus)
        return {part.name: (round(part.built / 1e9, 2), part.phases) for part in parts}

    states, engine, weight = STATES, SHARE, ON_ITS_WAY
    both = gb(64, "colocated")
    assert both[engine] == (55.59, ("rollout",))
    assert both[states][1] == ("rollout", "training")
    assert both[weight] == (3.11, ("rollout",))
    apart = gb(64 + 32, "separate")  # 32 train
    assert apart[engine] == (55.59, ("rollout",))
    assert apart[states] == (pytest.approx(2 * both[states][0], abs=0.02), ("training",))
    assert apart[weight] == (3.11, ("training",))


@pytest.mark.parametrize(
    ("name", "words", "phase", "named"),
    [
        ("paper-32b", "--gpus 64 --vllm.gpu_memory_utilization 0.8", "rollout", {"vllm.gpu_memory_utilization",
         "more GPUs", "parallel.cpu_offload = true"}),
        ("paper-32b", "--gpus 32 --ray.engines 8 --vllm.gpu_memory_utilization 0.5", "training",
         {"train.micro_batch_tokens together with rollout.window", "rollout.max_response_tokens",
          "more GPUs", "parallel.cpu_offload = true"}),
        ("paper-32b", "--gpus 64 --rollout.release_memory false", "training",
         {"rollout.release_memory = true", "vllm.gpu_memory_utilization", "rollout.max_response_tokens", "more GPUs",
          "parallel.cpu_offload = true", "train.micro_batch_tokens together with rollout.window"}),
        ("qwen2.5-7b-8gpu", "--gpus 8 --model.activation_checkpointing false", "training",
         {"model.activation_checkpointing = true", "rollout.max_response_tokens", "train.micro_batch_tokens",
          "more GPUs", "parallel.cpu_offload = true"}),
        ("qwen2.5-7b-8gpu", "--gpus 8 --rollout.max_rows_per_engine 128", "rollout",
         {"rollout.max_rows_per_engine", "rollout.max_response_tokens", "more GPUs", "parallel.cpu_offload = true"}),
        ("qwen2.5-0.5b-1gpu", "--gpus 1 --train.micro_batch_tokens 8192", "training",
         {"model.activation_checkpointing = true", "train.micro_batch_tokens", "more GPUs"}),
    ],
)  # fmt: skip
def test_what_a_refusal_advises_lowers_the_phase_that_does_not_fit(name, words, phase, named, capsys):
    gpu = "RTX-4090" if "0.5b" in name else "H100-SXM"
    path = str(ROOT / "configs" / f"{name}.toml")
    assert main(["train", path, "--check", "--gpu", gpu, *shlex.split(words)]) == 2
    error = capsys.readouterr().err.strip()
    assert f"{phase} needs" in error
    advised = error.split("what lowers it: ")[1].split(", ")
    assert {remedy.removeprefix("a lower ") for remedy in advised} == named


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("[model]\npath = 'm'\nlora_rank = 4", "model.lora_rank = 4"),
        ("[model]\npath = 'm'\n[parallel]\nreplicas = 2", "parallel.replicas = 2"),
        ("[model]\npath = 'm'\n[algorithm]\nname = 'ppo-ewma'", "algorithm.name = ppo-ewma"),
        ("[model]\npath = 'm'\n[rollout]\nengine = 'vllm'\n[ray]\naddress = 'auto'\nlayout = 'separate'",
         "ray.layout = separate"),
    ],
)  # fmt: skip
def test_a_configuration_that_the_plan_counts_no_memory_for_is_one_line(words, name, tmp_path, capsys):
    path = tmp_path / "own.toml"
    path.write_text(words)
    assert main(["plan", "--config", str(path), "--gpu", "H100-SXM", "--gpus", "8"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{path}: {name}: tppo plan counts no memory for it" in line


def test_a_model_is_known_by_the_names_that_the_plan_knows():
    for name in ("Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", "qwen/qwen2.5-7b"):
        assert config_json_of(name) == config_json_of("Qwen2.5-7B")


def test_the_cache_has_room_for_the_rows_that_a_schedule_starts():
    config, card = config_at(ROOT / "configs" / "qwen2.5-7b-8gpu.toml"), load_gpu("H100-SXM")
    more = config.rollout.model_copy(update={"schedule": "oversample", "oversample_factor": 1.5})
    more = more.model_copy(update={"max_rows_per_engine": None})
    whole = config.rollout.model_copy(update={"max_rows_per_engine": None})

    def rows_in(rollout):
        parts = parts_at(config.model_copy(update={"rollout": rollout}), card, 8)
        return next(int(part.name.split()[2]) for part in parts if part.name.startswith("KV cache"))

    assert rows_in(more) == 1.5 * rows_in(whole)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "--gpus 128",
            "--gpus 128: colocated, 16 engines of 4 must be on the GPUs that train; set ray.engines = 32, or",
        ),
        ("--gpus 64 --ray.layout separate", "16 separate engines of 4 leave none to train on; take more GPUs"),
        ("--gpus 64 --ray.engines 64 --vllm.tensor_parallel 1", "do not hold an engine's part of the weights and the"),
    ],
)
def test_engines_that_the_gpus_of_a_cluster_cannot_have_are_one_line(words, expected, capsys):
    path = str(ROOT / "configs" / "paper-32b.toml")
    assert main(["train", path, "--check", "--gpu", "H100-SXM", *shlex.split(words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line


def test_adapters_references_and_offloading_change_the_states_as_counted_by_hand():
    # Linear layers a layer: q, o 32 x 32; k, v 32 x 16; three MLP matrices 32 x 48. Rank 2: 2 (in + out) each.
    values = {"model_type": "qwen2", "vocab_size": 64, **SIZES, "tie_word_embeddings": True}

    def states(shards=1, **sections):
        config = RunConfig.model_validate({"model": {"path": "it", **sections.pop("model", {})}, **sections})
        built = memory.build(values, config)
        offloaded = config.parallel.cpu_offload
        own = Pass(shards=shards, tokens=16, logit_tokens=16, checkpointed=False, cpu_offload=offloaded)
        return training_needs(memory.sizes_of(built, config), own)[STATES], built

    plain, built = states()
    policy = sum(p.numel() for p in built.policy.parameters())
    value = policy + 32 + 1  # tied: the head alone is new
    assert plain == 16 * (policy + value)
    assert states(shards=4)[0] == plain / 4
    adapters = 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert states(model={"lora_rank": 2})[0] == 4 * policy + 16 * (adapters + value)
    assert states(algorithm={"name": "tppo", "kl_coef": 0.1})[0] == plain + 4 * policy
    assert states(algorithm={"name": "ppo-ewma"})[0] == plain + 8 * policy
    assert states(algorithm={"name": "dapo"}, rollout={"samples_per_prompt": 2})[0] == 16 * policy
    assert states(parallel={"cpu_offload": True})[0] == 0


def test_a_value_model_from_elsewhere_is_counted_with_its_own_sizes(tmp_path):
    reward_model = save_reward_model(tmp_path / "reward")
    own = sum(p.numel() for p in reward_model.base_model.parameters()) + reward_model.config.hidden_size + 1
    values = {"model_type": "qwen2", "vocab_size": 64, **SIZES}
    config = RunConfig.model_validate({"model": {"path": "it"}, "value": {"path": str(tmp_path / "reward")}})
    built = memory.build(values, config)
    assert sum(p.numel() for p in built.value_model.parameters()) == own
    missing = RunConfig.model_validate({"model": {"path": "it"}, "value": {"path": str(tmp_path / "none")}})
    with pytest.raises(ConfigError, match=r"value.path: .*none holds no value model"):
        memory.build(values, missing)


def test_activations_counted_on_the_meta_device_are_those_that_a_real_pass_keeps(tiny_model):
    """On a CPU the same tensors are kept; attention's differ a little by its kernel."""
    policy, _ = load_policy(str(tiny_model))
    values = json.loads((tiny_model / "config.json").read_text())
    config = RunConfig.model_validate({"model": {"path": str(tiny_model)}})
    built = memory.build(values, config)
    counted = 16 * memory.kept_bytes_per_token(built.policy)
    own, kept = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = torch.zeros(1, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    layer = policy.base_model.layers[0].to(torch.bfloat16)
    own |= {p.untyped_storage().data_ptr() for p in layer.parameters()}
    places = torch.arange(16)[None]
    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: alive.append(t) or keep(t), lambda t: t):
        turned = policy.base_model.rotary_emb(hidden, places)
        layer(hidden, attention_mask=None, position_ids=places, position_embeddings=turned)
    assert counted == pytest.approx(sum(kept.values()), rel=0.15)
    sizes = memory.sizes_of(built, config)

    def activations(checkpointed):
        own = Pass(shards=1, tokens=16, logit_tokens=1, checkpointed=checkpointed)
        return training_needs(sizes, own)[ACTIVATIONS]

    assert activations(False) == sizes.layers * counted
    assert activations(True) == sizes.layers * 16 * 32 * 2 + counted


def test_what_the_modules_and_the_plan_disagree_on_is_said(monkeypatch):
    path = ROOT / "configs" / "qwen2.5-7b-8gpu.toml"
    sizes = check.plan_sizes(config_at(path))
    monkeypatch.setattr(check, "plan_sizes", lambda config: replace(sizes, trained=0.97 * sizes.trained))
    with pytest.raises(ConfigError, match="more than 2% apart"):
        run_check(config_at(path), gpu="H100-SXM", gpus=8, where=str(path))


def test_models_whose_activations_cannot_be_counted_are_one_line(tmp_path):
    config = RunConfig.model_validate({"model": {"path": "it"}})
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    with pytest.raises(ConfigError, match="rotary positions only"):
        memory.sizes_of(memory.build(gpt2, config), config)
