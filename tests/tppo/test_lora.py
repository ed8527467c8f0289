"""Adapters: only they train, engines and checkpoints get merged weights, and a resumed run is the undisturbed one."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from profiling.errors import ConfigError, DataError
from tests.tppo.killing import assert_same_run, train_seeded
from tppo.checkpoints.store import newest_usable
from tppo.cluster.packing import chunks_of, layouts_of, unpack
from tppo.config import ModelConfig
from tppo.models.dropout import Draws, draw_masks
from tppo.models.lora import adapted_layers, adapters_off, add_adapters, plain_weights
from tppo.models.policy import load_policy
from tppo.parallel.ranks import joined_ranks
from tppo.start import train, trainer_for
from tppo.state import new_state

pytest.importorskip("peft")


@pytest.fixture
def adapted(tiny_model):
    """The tiny model with adapters of rank 4 whose B is not zero any more."""
    model, _ = load_policy(str(tiny_model))
    add_adapters(model, ModelConfig(path=str(tiny_model), lora_rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def lora_config(make_config, tiny_model, name="run", **sections):
    model = {"path": str(tiny_model), "lora_rank": 4, **sections.pop("model", {})}
    sections["train"] = {"steps": 4, "checkpoint_every": 2, "keep_last": 0, **sections.get("train", {})}
    return make_config(name, model=model, **sections)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 14).view(2, 6)).logits


def test_merged_weights_in_a_plain_model_compute_what_adapters_do(adapted, tiny_model):
    plain, _ = load_policy(str(tiny_model))
    started = logits(plain)
    plain.load_state_dict(dict(plain_weights(adapted)))
    assert (logits(adapted) - started).abs().max() > 0.01
    torch.testing.assert_close(logits(plain), logits(adapted), atol=1e-5, rtol=1e-4)


def test_an_engine_elsewhere_is_sent_merged_weights(adapted, tiny_model):
    engine = load_policy(str(tiny_model))[0]
    layouts = layouts_of(adapted, torch.float32, chunk_bytes=4000)  # several tensors a chunk, several chunks
    assert len(layouts) > 2
    for layout, flat in chunks_of(adapted, layouts, "cpu"):
        unpack(engine, layout, flat, keep=False)
    expected = dict(plain_weights(adapted))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in engine.state_dict().items())
    assert any(not torch.equal(t, load_policy(str(tiny_model))[0].state_dict()[n]) for n, t in expected.items())


def test_with_its_adapters_off_the_model_is_the_one_that_it_started_as(adapted, tiny_model):
    on = logits(adapted)
    with adapters_off(adapted):
        assert torch.equal(logits(adapted), logits(load_policy(str(tiny_model))[0]))
    assert torch.equal(logits(adapted), on)


def test_every_linear_layer_of_the_decoder_is_adapted_or_those_named(adapted, tiny_model):
    kinds = {name.rsplit(".", 1)[1] for name, _ in adapted_layers(adapted)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model, _ = load_policy(str(tiny_model))
    add_adapters(model, ModelConfig(lora_rank=2, lora_targets=("q_proj", "v_proj")), seed=0)
    assert {name.rsplit(".", 1)[1] for name, _ in adapted_layers(model)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("targets", "words"),
    [(("no_such",), "model.lora_targets"), (("lm_head",), "output layer"), (("embed_tokens",), "no linear layer")],
)
def test_targets_that_cannot_be_adapted_are_refused_in_one_line(targets, words, tiny_model):
    model, _ = load_policy(str(tiny_model))
    with pytest.raises(ConfigError, match=words) as caught:
        add_adapters(model, ModelConfig(lora_rank=2, lora_targets=targets), seed=0)
    assert "\n" not in str(caught.value)


def test_without_peft_one_line_says_what_to_install(tiny_model, monkeypatch):
    import tppo.models.lora as lora

    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="install the extra `lora`"):
        add_adapters(load_policy(str(tiny_model))[0], ModelConfig(lora_rank=2), seed=0)


def test_dropout_is_in_passes_with_gradient_only(tiny_model):
    model, _ = load_policy(str(tiny_model))
    add_adapters(model, ModelConfig(lora_rank=4, lora_dropout=0.5), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    assert torch.equal(logits(model), logits(model))
    draw_masks(model, Draws(seed=0, rows=[0, 1], tokens=[6, 6]))
    assert not torch.equal(model(input_ids=torch.arange(2, 14).view(2, 6)).logits, logits(model))


def test_only_adapters_train_and_only_they_are_in_the_optimiser(make_config, tiny_model):
    config = lora_config(make_config, tiny_model, train={"steps": 2}, algorithm={"kl_coef": 0.1})
    before = load_policy(str(tiny_model))[0].state_dict()
    with trainer_for(config) as trainer:
        held = [p for group in trainer.state.policy_optimizer.param_groups for p in group["params"]]
        names = {id(p): name for name, p in trainer.state.policy.named_parameters()}
        assert {names[id(p)].split(".")[-3] for p in held} == {"lora_A", "lora_B"}
        assert trainer.state.reference is trainer.state.policy
        started = {name: p.clone() for name, p in trainer.state.policy.named_parameters()}
        trainer.run(show_progress=False)
        for name, parameter in trainer.state.policy.named_parameters():
            assert torch.equal(parameter, started[name]) is (".lora_" not in name), name
        engine = dict(trainer.engine.model.named_parameters())
        for name, weight in plain_weights(trainer.state.policy):
            assert torch.equal(engine[name], weight), name
    after = load_file(newest_usable(config.output).path / "policy" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj.weight" in name}
    metrics = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["actor/kl_loss"] for row in metrics if "actor/kl_loss" in row][-1] > 0


@pytest.mark.parametrize("name", ["tppo", "ppo-ewma"])
@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(name, make_config, tiny_model):
    extra = {"algorithm": {"name": name, "kl_coef": 0.05, "trailing_tokens": 2}, "model": {"lora_dropout": 0.1}}
    whole = lora_config(make_config, tiny_model, "whole", **extra)
    train_seeded(whole)
    half = lora_config(make_config, tiny_model, "half", train={"steps": 2}, **extra)
    train_seeded(half)
    train_seeded(lora_config(make_config, tiny_model, "half", **extra), resume=True)
    assert_same_run(whole.output, half.output)
    ours, theirs = (load_file(newest_usable(c.output).path / "adapters.safetensors") for c in (whole, half))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_base_that_has_changed_is_refused(make_config, tiny_model, tmp_path):
    import shutil

    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = lora_config(make_config, base, train={"steps": 2})
    train(config, show_progress=False)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="no longer holds the weights that the run started from"):
        train(lora_config(make_config, base), resume=True, show_progress=False)


def test_a_sharded_policy_trains_its_adapters_alone(make_config, tiny_model):
    """One rank that computes in bfloat16 is a group of shards, as one GPU is."""
    config = lora_config(
        make_config, tiny_model, train={"steps": 2, "checkpoint_every": 0}, model={"dtype": "bfloat16"},
        algorithm={"kl_coef": 0.1},
    )  # fmt: skip
    train(config, show_progress=False)
    checkpoint = newest_usable(config.output).path
    before, after = (load_policy(str(path))[0].state_dict() for path in (tiny_model, checkpoint / "policy"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "_proj.weight" in name
    }
    longer = lora_config(make_config, tiny_model, train={"steps": 3}, model={"dtype": "bfloat16"},
                         algorithm={"kl_coef": 0.1})  # fmt: skip
    train(longer, resume=True, show_progress=False)
    policy, tokenizer = load_policy(str(tiny_model))
    with joined_ranks(dtype="bfloat16") as ranks:
        state = new_state(policy, tokenizer, longer, ranks)
        assert sum(p.requires_grad for p in state.policy.parameters()) == 2 * 2 * 7  # A and B, layers, projections


@pytest.mark.slow
def test_a_run_without_adapters_never_imports_peft():
    assert "tppo.models.lora" in sys.modules
    import subprocess

    code = "import sys, tppo.start; print([name for name in sys.modules if name.split('.')[0] == 'peft'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_two_ranks_train_the_adapters_that_one_trains(make_config, tiny_model, tmp_path):
    """The same rows (draws by row), shared out; gradients are summed in another order."""
    import subprocess

    from profiling.settings import to_toml

    found = []
    for ranks in (1, 2):
        config = lora_config(
            make_config, tiny_model, f"ranks{ranks}", train={"steps": 2, "mini_batches": 2},
            rollout={"draws": "row"}, algorithm={"kl_coef": 0.1}, model={"lora_targets": ["q_proj", "up_proj"]},
        )  # fmt: skip
        file = tmp_path / f"{ranks}.toml"
        file.write_text(to_toml(config.model_dump(mode="json")))
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if ranks == 2 else []
        subprocess.run(
            [sys.executable, *launcher, "-m", "tppo", "train", str(file)], check=True, capture_output=True, timeout=500
        )
        found.append(load_file(newest_usable(config.output).path / "adapters.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, alone in found[0].items():
        torch.testing.assert_close(found[1][name], alone, atol=2e-5, rtol=1e-3)
    assert any(weight.abs().max() > 1e-5 for name, weight in found[0].items() if ".lora_B." in name)
