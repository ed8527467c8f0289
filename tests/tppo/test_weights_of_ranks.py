"""Weights that several ranks write together: each tensor once, in files that are read like those of one process, by
transformers, an export, an evaluation and a run of another number of ranks."""

import json
import resource
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from profiling.errors import RunError
from profiling.reader import Run
from tests.tppo.families import SIZES, save_family
from tests.tppo.ranks import on_ranks
from tests.tppo.test_checkpoints import content_of, state_of
from tests.tppo.test_ranks import settings_of
from tppo.checkpoints.content import save_checkpoint
from tppo.checkpoints.store import checkpoints_of, newest_usable
from tppo.checkpoints.weights import own_names, read_weights, weight_files
from tppo.cli import main
from tppo.commands.huggingface import export_huggingface
from tppo.models.policy import load_policy
from tppo.models.value_source import value_model_of
from tppo.parallel.ranks import SINGLE, Ranks, joined_ranks
from tppo.start import train
from tppo.state import loaded, new_state

MODELS = {
    "tied": ("qwen2", {**SIZES, "tie_word_embeddings": True}),
    "experts": ("qwen3_moe", {**SIZES, "head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4,
                              "num_experts_per_tok": 2}),
    "one layer": ("qwen2", {**SIZES, "num_hidden_layers": 1, "tie_word_embeddings": True}),
}  # fmt: skip


def parts_of(tensors, world):
    return [own_names(tensors, Ranks(rank, world)) for rank in range(world)]


def bytes_of(tensors, names):
    return sum(tensors[name].nbytes for name in names)


def test_each_tensor_is_in_one_part_and_the_parts_are_of_one_size():
    # 40 each outside of layers, 10 + 6 in each of four layers: 144 numbers in all, 72 for each of two ranks
    tensors = {"embed.weight": torch.empty(40), "head.weight": torch.empty(40)}
    for layer in range(4):
        tensors |= {f"layers.{layer}.a": torch.empty(10), f"layers.{layer}.b": torch.empty(6)}
    first, second = parts_of(tensors, 2)
    assert first == {"embed.weight", "layers.0.a", "layers.0.b", "layers.2.a", "layers.2.b"}
    assert first | second == tensors.keys()
    assert not first & second
    assert bytes_of(tensors, first) == bytes_of(tensors, second) == 72 * 4
    assert [len(part) for part in parts_of(tensors, 8)] == [1, 1, 2, 2, 2, 2, 0, 0]
    assert own_names(tensors, SINGLE) == tensors.keys()


def test_parts_of_a_model_of_32b_are_nearly_an_eighth_each():
    layer = 5120 * (2 * 5120 + 2 * 1024 + 3 * 25_600)
    sizes = {f"model.layers.{n}.weight": layer for n in range(64)}
    sizes |= {"model.embed_tokens.weight": 151_936 * 5120, "lm_head.weight": 151_936 * 5120}
    tensors = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    parts = [bytes_of(tensors, part) for part in parts_of(tensors, 8)]
    assert sum(parts) == 4 * sum(sizes.values())
    assert max(parts) < 1.1 * sum(parts) / 8


def test_a_file_and_its_parts_are_read_alike(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2)}
    path = tmp_path / "value_model.safetensors"
    assert weight_files(path) == []
    for number, name in enumerate(tensors, start=1):
        save_file({name: tensors[name]}, tmp_path / f"value_model-0000{number}-of-00002.safetensors")
    in_parts = read_weights(path)
    save_file(tensors, path)
    for found in (in_parts, read_weights(path)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert weight_files(path) == [path]


@pytest.mark.parametrize(("name", "world"), [("tied", 2), ("experts", 3), ("one layer", 4)])
def test_parts_have_what_one_process_writes_and_transformers_reads_them(name, world, make_config, tmp_path):
    """One layer makes three parts: an embedding that is the head as well, a layer, a norm. A fourth rank has none."""
    path = save_family(*MODELS[name], tmp_path / "model")
    config = make_config("run", model={"path": str(path)})

    def work(rank):
        with joined_ranks(device="cpu") as ranks:
            state = new_state(*loaded(str(path), config, ranks), config, ranks)
            save_checkpoint(config.output, state, algorithm="tppo", offsets={}, time_s=0.0, ranks=ranks)

    on_ranks(world, work)
    (checkpoint,) = checkpoints_of(config.output)
    parts = min(world, 3)
    files = [checkpoint / "policy" / f"model-{n:05d}-of-{parts:05d}.safetensors" for n in range(1, parts + 1)]
    assert weight_files(checkpoint / "policy" / "model.safetensors") == files
    whole, index = load_file(path / "model.safetensors"), {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        for tensor, values in load_file(file).items():
            assert torch.equal(values, whole[tensor]), tensor
            assert tensor not in index
            index[tensor] = file.name
    assert index.keys() == whole.keys()
    total_bytes = bytes_of(whole, whole)
    written = json.loads((checkpoint / "policy" / "model.safetensors.index.json").read_text())
    assert written == {"metadata": {"total_size": total_bytes}, "weight_map": index}
    read, facts = AutoModelForCausalLM.from_pretrained(checkpoint / "policy", output_loading_info=True)
    assert not any(facts.values()), facts
    expected = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(values, expected[tensor]) for tensor, values in read.state_dict().items())
    assert (read.lm_head.weight is read.model.embed_tokens.weight) is (name != "experts")


@pytest.fixture
def of_two_ranks(make_config):
    """A run of all kinds of weights."""
    config = make_config("run", **settings_of("ppo-ewma"), evaluation={"every": 0, "problems": 4, "samples": 2})
    on_ranks(2, lambda rank: train(config, show_progress=False))
    return config


def test_what_two_ranks_wrote_one_process_restores_exports_evaluates_and_starts_from(
    of_two_ranks, make_config, tmp_path, capsys
):
    checkpoint = newest_usable(of_two_ranks.output).path
    names = [path.name for path in checkpoint.rglob("*.safetensors") if "-of-" in path.name]
    assert sorted(name for name in names if not name.startswith("shard")) == [
        f"{stem}-0000{n}-of-00002.safetensors" for stem in ("model", "proximal_policy", "value_model") for n in (1, 2)
    ]
    value = read_weights(checkpoint / "value_model.safetensors")
    proximal = read_weights(checkpoint / "proximal_policy.safetensors")
    state = state_of(of_two_ranks)
    assert all(torch.equal(tensor, value[name]) for name, tensor in state.value_model.state_dict().items())
    assert all(torch.equal(tensor, proximal[name]) for name, tensor in state.proximal.state().items())

    exported = export_huggingface(of_two_ranks.output, tmp_path / "exported", None)
    theirs = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.policy.state_dict().items())
    classifier = AutoModelForTokenClassification.from_pretrained(exported / "value").state_dict()
    assert torch.equal(classifier["score.weight"], value["head.weight"])

    assert main(["eval", str(of_two_ranks.output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3

    next_run = make_config("next", value={"path": str(checkpoint)})
    taken_over = value_model_of(next_run, *load_policy(next_run.model.path)).state_dict()
    assert all(torch.equal(tensor, value[name]) for name, tensor in taken_over.items())


def test_a_run_of_two_ranks_goes_on_in_one_process(of_two_ranks, make_config):
    settings = {**settings_of("ppo-ewma"), "train": {"steps": 4, "micro_batch_tokens": 60}, "evaluation": {"every": 0}}
    whole, rest = make_config("whole", **settings), make_config("rest", **settings)
    train(whole, show_progress=False)
    train(rest, resume=of_two_ranks.output, show_progress=False)
    losses = [Run(run.output).metrics.query("step > 3")["actor/pg_loss"].tolist() for run in (whole, rest)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_adapters_of_two_ranks_go_on_in_one_process(make_config):
    pytest.importorskip("peft")
    settings = {**settings_of("tppo"), "model": {"lora_rank": 2}, "evaluation": {"every": 0}}
    config = make_config("run", **settings)
    on_ranks(2, lambda rank: train(config, show_progress=False))
    rest = make_config("rest", **{**settings, "train": {"steps": 4}})
    assert train(rest, resume=config.output, show_progress=False).status == "finished"


def test_a_disk_that_is_full_for_the_second_rank_ends_both_and_leaves_the_checkpoints_before(make_config, withstood):
    """A file-size limit of the second rank's process stands for it."""

    def settings(steps):
        return {**settings_of("tppo"), "train": {"steps": steps, "micro_batch_tokens": 60, "checkpoint_every": 1}}

    on_ranks(2, lambda rank: train(make_config("run", **settings(2)), show_progress=False))
    longer = make_config("run", **settings(3))
    before = content_of(longer.output / "checkpoints")

    def work(rank):
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(RunError, match=r"step-000003: the checkpoint cannot be written: .*make room") as error:
            train(longer, resume=True, show_progress=False)
        assert "\n" not in str(error.value)

    on_ranks(2, work)
    assert content_of(longer.output / "checkpoints") == before
    on_ranks(2, lambda rank: train(longer, resume=True, show_progress=False))
    assert newest_usable(longer.output).path.name == "step-000003"
    withstood("full disk in a save, for one of two ranks",
              lost="nothing: the steps since the last checkpoint are done again")  # fmt: skip
