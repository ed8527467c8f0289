"""Families of Hugging Face models: served and trained alike, or refused in one line before anything is written."""

import time

import pytest
import torch
from safetensors.torch import load_file

from profiling.errors import ConfigError
from tests.tppo.families import REFUSED, SERVED, save_family
from tppo.checkpoints.store import checkpoints_of, newest_usable
from tppo.cli import main
from tppo.commands.huggingface import export_huggingface
from tppo.models.policy import load_policy, padding_of
from tppo.rollout.protocol import Request, Sampling
from tppo.rollout.self_check import check_it_can_be_served
from tppo.rollout.torch_engine import TorchEngine
from tppo.start import train


def saved(name, folder):
    kind, sizes, *_ = (SERVED | REFUSED)[name]
    return save_family(kind, sizes, folder / name, bos="bos" in name)


def config_of(make_config, path, **train_settings):
    return make_config(
        "run", model={"path": str(path)}, train={"steps": 2, "checkpoint_every": 1, "keep_last": 0, **train_settings},
        evaluation={"every": 0}, optimizer={"warmup_steps": 0},
    )  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_and_log_probs_equal_a_plain_forward_pass(name, tmp_path):
    model, tokenizer = load_policy(str(saved(name, tmp_path)))
    engine = TorchEngine(
        model, slots=2, max_tokens=64, pad_token_id=padding_of(tokenizer), generator=torch.Generator(),
        clock=time.perf_counter,
    )  # fmt: skip
    texts = ("a1b2=", "a1=", "a3b4c5d6=")
    requests = [Request(row, tokenizer(text)["input_ids"], 0, 20) for row, text in enumerate(texts)]
    assert (requests[0].token_ids[0] == tokenizer.bos_token_id) is ("bos" in name)
    engine.submit(requests, Sampling(temperature=0))
    done = {}
    while ended := engine.run_until_a_row_ends():
        done |= {completion.row: completion for completion in ended}
    for request in requests:
        ids = torch.tensor([[*request.token_ids, *done[request.row].token_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(request.token_ids) - 1 : -1]
        best = logits.log_softmax(-1).max(-1)
        assert best.indices.tolist() == done[request.row].token_ids
        torch.testing.assert_close(torch.tensor(done[request.row].log_probs), best.values, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", SERVED)
def test_two_steps_move_every_parameter_and_a_resumed_run_and_an_export_hold_them(name, make_config, tmp_path):
    path = saved(name, tmp_path)
    config = config_of(make_config, path)
    train(config, show_progress=False)
    last, _ = load_policy(str(checkpoints_of(config.output)[-1] / "policy"))
    before, after = load_policy(str(path))[0].state_dict(), last.state_dict()
    assert [key for key in before if torch.equal(before[key], after[key])] == []
    tied = last.get_input_embeddings().weight is last.get_output_embeddings().weight
    assert tied is bool(last.config.tie_word_embeddings)
    one_more = config_of(make_config, path, steps=3)
    train(one_more, resume=True, show_progress=False)
    whole = make_config("whole", **{
        section: getattr(one_more, section).model_dump()
        for section in ("model", "train", "evaluation", "optimizer")
    })  # fmt: skip
    train(whole, show_progress=False)
    ours, theirs = (load_file(newest_usable(run.output).path / "policy" / "model.safetensors")
                    for run in (one_more, whole))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    exported = export_huggingface(whole.output, tmp_path / "exported", None)
    assert load_policy(str(exported))[0].state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_be_sampled_from_wrongly_is_refused_before_anything_is_written(
    name, make_config, tmp_path, capsys
):
    config = config_of(make_config, saved(name, tmp_path))
    file = tmp_path / "run.toml"
    file.write_text("")
    words = [f"--{s}.{k}={v}" for s in ("data", "rollout") for k, v in getattr(config, s).model_dump().items()
             if isinstance(v, int | float) and not isinstance(v, bool)]  # fmt: skip
    words += ["--model.path", config.model.path, "--model.attention", "eager", "--output", str(config.output)]
    code = main(["train", str(file), *words])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert code == 2
    assert REFUSED[name][2] in line
    assert not config.output.exists()


def test_attention_that_a_model_has_not_is_one_line_that_names_the_setting(tmp_path):
    with pytest.raises(ConfigError, match="attention = 'sdpa': this model has none"):
        load_policy(str(saved("gemma2-caps-logits", tmp_path)))


def test_a_layer_that_looks_elsewhere_while_decoding_is_found(tmp_path):
    """Its masks are right in a plain pass and wrong through a cache: only the comparison shows it."""
    model, _ = load_policy(str(saved("mistral-narrow-window", tmp_path)))
    check_it_can_be_served(model, "it")  # a window of 16 does not show in 7 tokens
    model.config.sliding_window = 4
    with pytest.raises(ConfigError, match="other logits than a plain forward pass"):
        check_it_can_be_served(model, "it")


def test_the_check_takes_milliseconds_and_draws_nothing(tmp_path):
    model, _ = load_policy(str(saved("qwen2", tmp_path)))
    state = torch.get_rng_state()
    check_it_can_be_served(model, "it")
    start = time.thread_time()  # others may have the cores
    check_it_can_be_served(model, "it")
    assert time.thread_time() - start < 0.5
    assert torch.equal(state, torch.get_rng_state())
