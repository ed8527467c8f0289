"""A checkpoint as plain Hugging Face folders: what transformers computes from them is what the run computed."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from profiling.errors import ConfigError, DataError
from tppo.checkpoints.content import restore
from tppo.checkpoints.store import checkpoints_of, newest_usable
from tppo.cli import main
from tppo.commands.huggingface import export_huggingface, value_model_of
from tppo.models.policy import load_policy, token_log_probs
from tppo.models.value import ValueModel
from tppo.start import train
from tppo.state import new_state


@pytest.fixture
def config(make_config):
    config = make_config("run", train={"steps": 4, "checkpoint_every": 2, "keep_last": 0})
    train(config, show_progress=False)
    return config


def state_of(config, checkpoint):
    policy, tokenizer = load_policy(str(checkpoint / "policy"))
    state = new_state(policy, tokenizer, config)
    restore(state, checkpoint)
    return state


def test_transformers_loads_policy_and_value_model_and_computes_what_we_do(config, tmp_path, capsys):
    target = tmp_path / "exported"
    assert main(["export", str(config.output), "--format", "huggingface", "--output", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    state = state_of(config, newest_usable(config.output).path)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    value, facts = AutoModelForTokenClassification.from_pretrained(target / "value", output_loading_info=True)
    assert not any(facts.values()), facts  # no weight is missing, left over or of another shape
    assert value.config.classifier_dropout == 0  # also in training
    assert (target / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(target / "value").get_vocab() == tokenizer.get_vocab()
    rows = [tokenizer("a1b2c3=")["input_ids"], tokenizer("a7b8c9=")["input_ids"]]
    ids = torch.tensor(rows)
    row, column = (
        part.flatten() for part in torch.meshgrid(torch.arange(2), torch.arange(len(rows[0])), indexing="ij")
    )
    with torch.no_grad():
        ours = state.value_model(ids, row, column)
        theirs = value(input_ids=ids).logits.squeeze(-1).flatten()
        assert ours.abs().max() > 0
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)
        before = column < len(rows[0]) - 1
        targets = ids[row[before], column[before] + 1]
        ours = token_log_probs(state.policy, ids, row[before], column[before], targets).log_probs
        theirs = policy(input_ids=ids).logits.log_softmax(-1)[row[before], column[before], targets]
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {**SIZES, "num_key_value_heads": 1, "intermediate_size": 48}),
        ("qwen3", {**SIZES, "num_key_value_heads": 1, "intermediate_size": 48, "head_dim": 16}),
        ("mistral", {**SIZES, "num_key_value_heads": 1, "intermediate_size": 48}),
        ("gpt2", {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    ],
)
def test_value_models_of_other_architectures_are_token_classifiers_too(tmp_path, kind, sizes):
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    value = ValueModel(policy)
    torch.nn.init.normal_(value.head.weight)
    torch.nn.init.normal_(value.head.bias)
    policy.save_pretrained(tmp_path / "policy")
    save_file(value.state_dict(), tmp_path / "value_model.safetensors")
    value_model_of(tmp_path).save_pretrained(tmp_path / "value")
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "value")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        ours = value(ids, torch.zeros(10, dtype=torch.long), torch.arange(10))
        torch.testing.assert_close(loaded(input_ids=ids).logits[0, :, 0], ours, atol=1e-6, rtol=0)


def test_the_card_names_run_step_and_algorithm_and_no_path(config, tmp_path):
    target = export_huggingface(config.output, tmp_path / "exported", "step-000002")
    card = (target / "README.md").read_text()
    for part in ("| run | run |", "| step | 2 |", "| algorithm | tppo |", "AutoModelForTokenClassification"):
        assert part in card
    assert str(tmp_path) not in card


def test_best_last_named_and_single_checkpoints_are_found(config, tmp_path):
    first, last = checkpoints_of(config.output)
    same = {}
    for name, source, choice in (("last", config.output, "last"), ("named", config.output, first.name),
                                 ("alone", first, None), ("best", config.output, "best")):  # fmt: skip
        same[name] = (export_huggingface(source, tmp_path / name, choice) / "model.safetensors").read_bytes()
    assert same["last"] == (last / "policy" / "model.safetensors").read_bytes()
    assert same["named"] == same["alone"] == (first / "policy" / "model.safetensors").read_bytes()
    assert same["best"] in (same["last"], same["named"])


def test_a_recipe_without_a_value_model_exports_the_policy_alone(make_config, tmp_path):
    config = make_config(
        "run", algorithm={"name": "dapo", "max_sampling_rounds": 1}, train={"steps": 1},
        rollout={"prompts_per_step": 2, "samples_per_prompt": 4},
    )  # fmt: skip
    train(config, show_progress=False)
    target = export_huggingface(config.output, tmp_path / "exported", None)
    assert not (target / "value").exists()
    assert "value/" not in (target / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(target)


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(config, tmp_path):
    target = tmp_path / "exported"
    with pytest.raises(ConfigError, match=r"step-000009: .* has step-000002, step-000004; or write best or last"):
        export_huggingface(config.output, target, "step-000009")
    with pytest.raises(DataError, match="no such run directory"):
        export_huggingface(tmp_path / "nowhere", target, None)
    with pytest.raises(ConfigError, match="is a checkpoint itself"):
        export_huggingface(checkpoints_of(config.output)[0], target, "last")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_huggingface(config.output, tmp_path / "taken", None)
    weights = checkpoints_of(config.output)[0] / "value_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"value_model.safetensors is damaged"):
        export_huggingface(config.output, target, "step-000002")
    shutil.rmtree(config.output / "checkpoints")
    with pytest.raises(DataError, match="no checkpoint"):
        export_huggingface(config.output, target, None)
    assert not target.exists()
    assert not list(tmp_path.glob(".exported*"))
    assert main(["export", str(config.output), "--checkpoint", "best"]) == 2
