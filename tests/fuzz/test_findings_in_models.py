"""What generated files have found in model directories and in runs that go on from them, each as small as it gets."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.checkpoint_files import with_checksums
from tests.fuzz.oracle import write_files
from tests.fuzz.test_findings import refused
from tests.fuzz.trained_files import FOLDER, QUICK, RUN, as_policy, as_value_model, model, reward_model, trained
from tppo.checkpoints.manifest import read_manifest
from tppo.cli import main
from tppo.commands.huggingface import export_huggingface
from tppo.data.problem import Problem, prompt_ids
from tppo.models.policy import load_policy
from tppo.resume import check_problems_are_the_same


@pytest.fixture
def policy_folder(tmp_path):
    write_files(tmp_path / "model", model())
    return tmp_path / "model"


@pytest.fixture
def run(tmp_path):
    write_files(tmp_path / RUN, trained_alone())
    return tmp_path / RUN


def trained_alone():
    return {name.removeprefix(f"{RUN}/"): content for name, content in trained().items()}


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


WRONG = [
    ({"rms_norm_eps": None}, "rms_norm_eps"),
    ({"hidden_act": 0}, "hidden_act"),
    ({"hidden_size": "x"}, ""),
    ({"num_attention_heads": 0}, ""),
    ({"rope_parameters": 0}, ""),
    ({"model_type": 0}, ""),
    ({"architectures": 0}, ""),
    ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers is 1000000000, and no model has more"),
    ({"vocab_size": 10**9}, "its config.json describes 16,0"),
    ({"hidden_size": 2**62, "num_attention_heads": 2**20}, ""),
]


@pytest.mark.parametrize(("values", "word"), WRONG, ids=[str(values) for values, _ in WRONG])
def test_settings_of_a_model_that_cannot_be_are_one_line(policy_folder, tmp_path, capsys, values, word):
    change(policy_folder / "config.json", **values)
    if set(values) != {"architectures"}:
        refused(lambda: as_policy(policy_folder), str(policy_folder), word)
    config = tmp_path / "t.toml"
    config.write_text(f'model.path = "{policy_folder}"\ndata.max_steps = 2\n')
    assert main(["train", str(config), "--check", "--gpu", "H100-SXM"]) in (0, 2)
    assert "--debug" not in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"num_hidden_layers": 10**9}, {"vocab_size": 2**40}, {"architectures": [0]}])
def test_settings_of_a_reward_model_that_cannot_be_are_one_line(tmp_path, values):
    write_files(tmp_path / "own", reward_model())
    change(tmp_path / "own" / "config.json", **values)
    refused(lambda: as_value_model(tmp_path / "own"), f"value.path: {tmp_path}/own holds no value model")


def test_a_policy_that_lacks_weights_is_not_filled_up_at_random(policy_folder):
    weights = load_file(policy_folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, policy_folder / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: as_policy(policy_folder), "it lacks weights: model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"0", b"\xff", b"[" * 50_000])
def test_a_file_of_a_model_that_is_none_is_one_line(policy_folder, name, content):
    (policy_folder / name).write_bytes(content)
    refused(lambda: as_policy(policy_folder), str(policy_folder))


def test_settings_of_a_tokenizer_that_fail_in_use_are_met_on_loading(policy_folder):
    change(policy_folder / "tokenizer_config.json", model_max_length="")
    refused(lambda: as_policy(policy_folder), "one of its files holds what cannot stand there")


def test_a_tokenizer_without_its_table_makes_no_prompts(policy_folder):
    (policy_folder / "tokenizer.json").unlink()
    _, tokenizer = load_policy(str(policy_folder))
    refused(lambda: prompt_ids(tokenizer, Problem("1+1=", "2")), "no tokens of the prompt '1+1='")


def test_a_token_beyond_the_models_table_is_found_though_the_vocabulary_is_small(policy_folder, capsys):
    table = json.loads((policy_folder / "tokenizer.json").read_text())
    last = max(table["model"]["vocab"], key=table["model"]["vocab"].get)
    table["model"]["vocab"][last] = 100_000
    (policy_folder / "tokenizer.json").write_text(json.dumps(table))
    assert main(["eval", str(policy_folder), "--data", "arithmetic", *QUICK]) == 2
    assert "its tokenizer has 100001 tokens, its model only" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_refused(policy_folder, capsys):
    weights = {name: torch.full_like(own, torch.nan) for name, own in load_file(
        policy_folder / "model.safetensors").items()}  # fmt: skip
    save_file(weights, policy_folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["eval", str(policy_folder), "--data", "arithmetic", *QUICK]) == 2
    assert "its logits are not finite numbers; are its weights whole?" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "0", '"x"', "{"])
def test_a_json_file_of_a_run_that_is_no_table_is_one_line(run, content, capsys):
    (run / "model.json").write_text(content)
    assert main(["train", "--resume", str(run), "--train.steps", "2"]) == 2
    assert f"{run}/model.json: " in capsys.readouterr().err
    (run / FOLDER / "manifest.json").write_text(content)
    refused(lambda: read_manifest(run / FOLDER), "manifest.json: ")
    (run / "data.json").write_text(content)

    class Problems:
        fingerprint = "of others"

    refused(lambda: check_problems_are_the_same(run, Problems()), "data.json: ")


def test_a_value_model_larger_than_its_file_is_not_exported(run, tmp_path):
    shutil.copytree(run / FOLDER / "policy", run / FOLDER / "value_config")
    change(run / FOLDER / "value_config" / "config.json", hidden_size=2**30)
    with_checksums(run / FOLDER)
    refused(
        lambda: export_huggingface(run, tmp_path / "out", None), "transformers has no token classifier that it fits"
    )
    assert not (tmp_path / "out").exists()
