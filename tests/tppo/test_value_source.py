"""Where a value model starts: a run's checkpoint, a reward model, or a refusal in one line."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from profiling.errors import ConfigError
from tppo.checkpoints.store import newest_usable
from tppo.commands.huggingface import export_huggingface
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import load_policy
from tppo.models.value_source import from_reward_model, value_model_of
from tppo.start import train
from tppo.state import new_state


def save_reward_model(path, kind=AutoModelForSequenceClassification, *, labels=1, tokens=None, **sizes):
    tokenizer = character_tokenizer()
    config = AutoConfig.for_model(
        "llama", vocab_size=tokens or len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_labels=labels, pad_token_id=tokenizer.pad_token_id,
        **{"max_position_embeddings": 256, **sizes},
    )  # fmt: skip
    model = kind.from_config(config)
    with torch.no_grad():
        model.score.weight.fill_(0.25)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model.eval()


def read_everywhere(value_model, ids):
    row, column = torch.meshgrid(torch.arange(ids.shape[0]), torch.arange(ids.shape[1]), indexing="ij")
    with torch.no_grad():
        return value_model(ids, row.flatten(), column.flatten()).view(ids.shape)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_reward_model_of_other_sizes_gives_its_backbone_and_head(kind, tmp_path):
    reward_model = save_reward_model(tmp_path / "reward", kind)
    ids = torch.arange(2, 14).view(2, 6)
    values = read_everywhere(from_reward_model(str(tmp_path / "reward"), character_tokenizer()), ids)
    with torch.no_grad():
        theirs = reward_model(input_ids=ids).logits
    expected = theirs.squeeze(-1) if kind is AutoModelForTokenClassification else theirs
    torch.testing.assert_close(values if expected.shape == ids.shape else values[:, -1:], expected)
    assert values.abs().max() > 0


def test_a_run_starts_from_a_reward_model_resumes_and_exports_it_and_another_run_takes_it_over(make_config, tmp_path):
    save_reward_model(tmp_path / "reward")
    value = {"path": str(tmp_path / "reward")}
    whole = make_config("whole", value=value, train={"steps": 2, "checkpoint_every": 1})
    train(whole, show_progress=False)
    half = make_config("half", value=value, train={"steps": 1, "checkpoint_every": 1})
    train(half, show_progress=False)
    train(
        make_config("half", value=value, train={"steps": 2, "checkpoint_every": 1}), resume=True, show_progress=False
    )
    ours, theirs = (newest_usable(config.output).path / "value_model.safetensors" for config in (whole, half))
    assert ours.read_bytes() == theirs.read_bytes()
    exported = export_huggingface(whole.output, tmp_path / "exported", None) / "value"
    policy, tokenizer = load_policy(whole.model.path)
    ids = torch.arange(2, 14).view(2, 6)
    values = []
    for path in (newest_usable(whole.output).path, exported):
        config = make_config("next", value={"path": str(path)})
        values.append(read_everywhere(value_model_of(config, policy, tokenizer), ids))
    torch.testing.assert_close(values[0], values[1])
    assert values[0].abs().max() > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": 2}, "has 2 outputs"),
        ({"tokens": 10}, "has 10 tokens"),
        ({"max_position_embeddings": 24}, "has 24 positions"),
    ],
)
def test_a_reward_model_that_does_not_fit_is_one_line_and_nothing_is_written(change, words, make_config, tmp_path):
    save_reward_model(tmp_path / "reward", **change)
    config = make_config("run", value={"path": str(tmp_path / "reward")})
    with pytest.raises(ConfigError, match=f"value.path: .*{words}") as caught:
        train(config, show_progress=False)
    assert "\n" not in str(caught.value)
    assert not config.output.exists()


def test_another_tokenizer_no_reward_model_and_pickled_weights_are_refused(tiny_model, tmp_path, make_config):
    policy, tokenizer = load_policy(str(tiny_model))

    def refused(path, words):
        with pytest.raises(ConfigError, match=words):
            new_state(policy, tokenizer, make_config("run", value={"path": str(path)}))

    refused(tiny_model, "Qwen2ForCausalLM is no reward model")
    refused(tmp_path / "nowhere", "holds no value model for this policy")
    other = tmp_path / "other"
    save_reward_model(other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    refused(other, "has another tokenizer than the policy")
    pickled = tmp_path / "pickled"
    model = save_reward_model(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refused(pickled, "holds no value model for this policy: .*no file named model.safetensors")


def test_code_that_comes_with_a_model_runs_only_where_the_user_says_so(tiny_model, tmp_path):
    import shutil

    path = shutil.copytree(tiny_model, tmp_path / "theirs")
    content = json.loads((path / "config.json").read_text())
    content |= {"model_type": "theirs", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (path / "config.json").write_text(json.dumps(content))
    marker = tmp_path / "executed"
    (path / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match=r"set model\.trust_remote_code = true if you trust"):
        load_policy(str(path))
    assert not marker.exists()
    with pytest.raises((ConfigError, AttributeError)):  # this code defines no model
        load_policy(str(path), trust_remote_code=True)
    assert marker.exists()
