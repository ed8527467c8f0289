import time
from itertools import pairwise

import pytest
import torch

from tppo.models.policy import load_policy, token_log_probs
from tppo.rollout.protocol import Request
from tppo.rollout.torch_engine import TorchEngine


@pytest.fixture
def loaded(tiny_model):
    return load_policy(str(tiny_model))


def engine_for(loaded, *, slots, temperature=1.0, seed=0, eos=None):
    model, tokenizer = loaded
    return TorchEngine(
        model, slots=slots, max_tokens=64, eos_token_id=tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=tokenizer.pad_token_id, generator=torch.Generator().manual_seed(seed),
        clock=time.perf_counter, temperature=temperature,
    )  # fmt: skip


def run_all(engine, requests):
    engine.submit(requests)
    completions = {}
    while ended := engine.run_until_a_row_ends():
        completions |= {completion.row: completion for completion in ended}
    return completions


def prompts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in ("a1b2=", "a1=", "a3b4c5d6=", "a9b9=", "a7b1c2=", "a0=")]


def test_greedy_tokens_and_log_probs_equal_a_plain_forward_pass(loaded):
    model, tokenizer = loaded
    requests = [Request(i, ids, 0, 20) for i, ids in enumerate(prompts(tokenizer))]
    completions = run_all(engine_for(loaded, slots=3, temperature=0), requests)
    assert sorted(completions) == list(range(6))
    for request in requests:
        done = completions[request.row]
        ids = torch.tensor([[*request.token_ids, *done.token_ids]])
        first = len(request.token_ids) - 1
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, first:-1]
        assert logits.argmax(-1).tolist() == done.token_ids
        expected = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.log_probs), expected, atol=1e-5, rtol=1e-5)


def test_a_resumed_row_continues_as_if_never_cut(loaded):
    _, tokenizer = loaded
    ids = prompts(tokenizer)
    whole = run_all(
        engine_for(loaded, slots=6, temperature=0, eos=-1), [Request(i, p, 0, 21) for i, p in enumerate(ids)]
    )
    engine = engine_for(loaded, slots=6, temperature=0, eos=-1)
    first = run_all(engine, [Request(i, p, 0, 8) for i, p in enumerate(ids)])
    engine.update_weights()
    resumed = [Request(i, [*p, *first[i].token_ids], 8, 13) for i, p in enumerate(ids)]
    second = run_all(engine, resumed)
    for i in range(len(ids)):
        assert first[i].token_ids + second[i].token_ids == whole[i].token_ids
        joined = torch.tensor(first[i].log_probs + second[i].log_probs)
        torch.testing.assert_close(joined, torch.tensor(whole[i].log_probs), atol=1e-5, rtol=1e-5)


def test_the_number_of_slots_never_changes_a_greedy_answer(loaded):
    _, tokenizer = loaded
    requests = [Request(i, ids, 0, 3 + 4 * i) for i, ids in enumerate(prompts(tokenizer))]
    answers = [run_all(engine_for(loaded, slots=slots, temperature=0), requests) for slots in (1, 2, 6)]
    for row in range(6):
        assert len({tuple(answer[row].token_ids) for answer in answers}) == 1


def test_samples_follow_the_models_distribution(loaded):
    """One token after one prompt, 4,000 times: frequencies against probabilities, within five standard errors."""
    model, tokenizer = loaded
    ids = tokenizer("a1b2=")["input_ids"]
    draws = run_all(engine_for(loaded, slots=500, seed=5), [Request(i, ids, 0, 1) for i in range(4000)])
    counts = torch.bincount(torch.tensor([draws[i].token_ids[0] for i in range(4000)]), minlength=len(tokenizer))
    with torch.no_grad():
        p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    error = (p * (1 - p) / 4000).sqrt()
    assert ((counts / 4000 - p).abs() <= 5 * error + 1e-3).all()


def test_sampled_log_probs_equal_those_of_training(loaded):
    model, tokenizer = loaded
    request = Request(0, tokenizer("a1b2=")["input_ids"], 0, 15)
    done = run_all(engine_for(loaded, slots=1, temperature=0.7), [request])[0]
    ids = torch.tensor([[*request.token_ids, *done.token_ids][:-1]])
    first = len(request.token_ids) - 1
    column = torch.arange(first, first + len(done.token_ids))
    row = torch.zeros_like(column)
    got = token_log_probs(model, ids, row, column, torch.tensor(done.token_ids), temperature=0.7)
    torch.testing.assert_close(torch.tensor(done.log_probs), got.log_probs.detach(), atol=1e-5, rtol=1e-5)
    assert (got.entropy > 0).all()


def test_records_hold_every_token_and_adjoin(loaded):
    _, tokenizer = loaded
    engine = engine_for(loaded, slots=4)
    completions = run_all(engine, [Request(i, ids, 0, 20) for i, ids in enumerate(prompts(tokenizer))])
    records = engine.take_records()
    decode = [r for r in records if r["kind"] == "decode"]
    assert sum(r["steps"] * r["batch"] for r in decode) == sum(len(c.token_ids) for c in completions.values())
    assert sum(r["fresh_tokens"] for r in records) == sum(map(len, prompts(tokenizer)))
    for before, after in pairwise(records):
        assert before["t_end"] == after["t_start"]
    assert engine.take_records() == []


def test_a_row_that_does_not_fit_is_refused(loaded):
    with pytest.raises(ValueError, match="do not fit a slot of 64"):
        engine_for(loaded, slots=1).submit([Request(0, [1] * 60, 0, 10)])
