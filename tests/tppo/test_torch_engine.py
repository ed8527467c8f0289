import copy
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scipy.stats import chisquare, kstest

from tppo.models.policy import load_policy, token_log_probs
from tppo.rollout.protocol import Request, Sampling
from tppo.rollout.sampling import draw, truncated, uniform_of
from tppo.rollout.torch_engine import TorchEngine


@pytest.fixture
def loaded(tiny_model):
    return load_policy(str(tiny_model))


def engine_for(loaded, *, slots, seed=0, **options):
    model, tokenizer = loaded
    return TorchEngine(
        model, slots=slots, max_tokens=64, pad_token_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(seed), clock=time.perf_counter, **options,
    )  # fmt: skip


GREEDY = Sampling(temperature=0)


def run_all(engine, requests, sampling):
    engine.submit(requests, sampling)
    completions = {}
    while ended := engine.run_until_a_row_ends():
        completions |= {completion.row: completion for completion in ended}
    return completions


def prompts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in ("a1b2=", "a1=", "a3b4c5d6=", "a9b9=", "a7b1c2=", "a0=")]


def greedy_for(loaded, **options):
    """Greedy, and ending at the tokenizer's end of sequence."""
    return Sampling(temperature=0, stop_token_ids=(loaded[1].eos_token_id,), **options)


def test_greedy_tokens_and_log_probs_equal_a_plain_forward_pass(loaded):
    model, tokenizer = loaded
    requests = [Request(i, ids, 0, 20) for i, ids in enumerate(prompts(tokenizer))]
    completions = run_all(engine_for(loaded, slots=3), requests, greedy_for(loaded))
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


@pytest.mark.parametrize("keep_kv", [False, True])
def test_a_resumed_row_continues_as_if_never_cut(loaded, keep_kv):
    _, tokenizer = loaded
    ids = prompts(tokenizer)
    whole = run_all(engine_for(loaded, slots=6), [Request(i, p, 0, 21) for i, p in enumerate(ids)], GREEDY)
    engine = engine_for(loaded, slots=4, keep_kv=keep_kv)
    first = run_all(engine, [Request(i, p, 0, 8) for i, p in enumerate(ids)], GREEDY)
    engine.update_weights(1)
    engine.take_records()
    resumed = [Request(i, [*p, *first[i].token_ids], 8, 13) for i, p in enumerate(ids)]
    second = run_all(engine, resumed, GREEDY)
    for i in range(len(ids)):
        assert (first[i].policy_version, second[i].policy_version) == (0, 1)
        assert first[i].token_ids + second[i].token_ids == whole[i].token_ids
        joined = torch.tensor(first[i].log_probs + second[i].log_probs)
        torch.testing.assert_close(joined, torch.tensor(whole[i].log_probs), atol=1e-5, rtol=1e-5)
    prefilled = sum(record["resumed_tokens"] for record in engine.take_records())
    assert prefilled == (0 if keep_kv else sum(len(request.token_ids) for request in resumed))


def test_kept_keys_and_values_are_those_of_the_policy_that_computed_them(loaded):
    """After a weight update: stale keys behind the kept row, fresh ones behind the prefilled row."""
    model, tokenizer = loaded
    ids, log_probs = tokenizer("a1b2c3=")["input_ids"], {}
    for keep_kv in (False, True):
        changed = copy.deepcopy(model)
        engine = engine_for((changed, tokenizer), slots=1, keep_kv=keep_kv)
        first = run_all(engine, [Request(0, ids, 0, 8)], GREEDY)[0]
        with torch.no_grad():
            for weight in changed.parameters():
                weight.mul_(1.3)
        engine.update_weights(1)
        known = [*ids, *first.token_ids]
        second = run_all(engine, [Request(0, known, 8, 1)], GREEDY)[0]
        with torch.no_grad():
            fresh = changed(input_ids=torch.tensor([known])).logits[0, -1].log_softmax(-1)[second.token_ids[0]]
        log_probs[keep_kv] = abs(second.log_probs[0] - fresh.item())
    assert log_probs[False] < 1e-4 < log_probs[True]


def test_what_is_kept_for_a_row_that_does_not_continue_is_forgotten(loaded):
    _, tokenizer = loaded
    engine = engine_for(loaded, slots=2, keep_kv=True)
    run_all(engine, [Request(i, ids, 0, 4) for i, ids in enumerate(prompts(tokenizer))], GREEDY)
    assert len(engine._parked) == 6
    run_all(engine, [Request(9, prompts(tokenizer)[0], 0, 4)], GREEDY)
    assert sorted(engine._parked) == [9]


def test_the_number_of_slots_never_changes_a_greedy_answer(loaded):
    _, tokenizer = loaded
    requests = [Request(i, ids, 0, 3 + 4 * i) for i, ids in enumerate(prompts(tokenizer))]
    answers = [run_all(engine_for(loaded, slots=slots), requests, greedy_for(loaded)) for slots in (1, 2, 6)]
    for row in range(6):
        assert len({tuple(answer[row].token_ids) for answer in answers}) == 1


@pytest.mark.slow
def test_a_compiled_engine_gives_the_same_greedy_answers(loaded):
    requests = [Request(i, ids, 0, 12) for i, ids in enumerate(prompts(loaded[1]))]
    plain = run_all(engine_for(loaded, slots=4), requests, GREEDY)
    compiled = run_all(engine_for(loaded, slots=4, compiled=True), requests, GREEDY)
    assert {row: done.token_ids for row, done in plain.items()} == {r: d.token_ids for r, d in compiled.items()}


def test_samples_follow_the_models_distribution(loaded):
    """One token after one prompt, 4,000 times: frequencies against probabilities, within five standard errors."""
    model, tokenizer = loaded
    ids = tokenizer("a1b2=")["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    fifth = whole.sort(descending=True).values[4]
    nucleus = whole.where(whole >= fifth, 0)
    enough = (nucleus.sum() - fifth / 2).item()  # between what four and five tokens hold
    for sampling, p in ((Sampling(), whole), (Sampling(top_k=5), nucleus), (Sampling(top_p=enough), nucleus)):
        draws = run_all(engine_for(loaded, slots=500, seed=5), [Request(i, ids, 0, 1) for i in range(4000)], sampling)
        counts = torch.bincount(torch.tensor([draws[i].token_ids[0] for i in range(4000)]), minlength=len(tokenizer))
        q = p / p.sum()
        error = (q * (1 - q) / 4000).sqrt()
        assert ((counts / 4000 - q).abs() <= 5 * error + 1e-3).all()
        assert (counts[p == 0] == 0).all()
        reported = torch.tensor([draws[i].log_probs[0] for i in range(4000)])
        expected = whole.log()[[draws[i].token_ids[0] for i in range(4000)]]  # of the whole distribution
        torch.testing.assert_close(reported, expected, atol=1e-5, rtol=1e-5)


def test_top_k_and_top_p_keep_what_their_definitions_say():
    probs = torch.tensor([[0.5, 0.125, 0.25, 0.125]])
    assert truncated(probs, 2, 1.0).tolist() == [[0.5, 0.0, 0.25, 0.0]]
    assert truncated(probs, 3, 1.0).tolist() == [[0.5, 0.125, 0.25, 0.0]]  # a tie: the lower id
    assert truncated(probs, 0, 0.5).tolist() == [[0.5, 0.0, 0.0, 0.0]]  # exactly reached
    assert truncated(probs, 0, 0.51).tolist() == [[0.5, 0.0, 0.25, 0.0]]
    # Top-k first: 0.5 of 0.75 is two thirds, which reaches 0.6.
    assert truncated(probs, 2, 0.6).tolist() == [[0.5, 0.0, 0.0, 0.0]]
    assert truncated(probs, 9, 1.0) is probs
    assert truncated(probs, 0, 1e-9).tolist() == [[0.5, 0.0, 0.0, 0.0]]  # the likeliest is always kept


def test_a_row_ends_with_the_first_stop_token_and_keeps_it(loaded):
    ids = prompts(loaded[1])[0]
    free = run_all(engine_for(loaded, slots=1), [Request(0, ids, 0, 20)], GREEDY)[0]
    assert free.reason == "budget"
    stop = free.token_ids[6]
    place = free.token_ids.index(stop)
    sampling = Sampling(temperature=0, stop_token_ids=(10_000, stop))
    stopped = run_all(engine_for(loaded, slots=1), [Request(0, ids, 0, 20)], sampling)[0]
    assert (stopped.token_ids, stopped.reason) == (free.token_ids[: place + 1], "stop")


def test_a_seed_repeats_its_draws_and_leaves_the_engines_own_alone(loaded):
    requests = [Request(i, ids, 0, 10) for i, ids in enumerate(prompts(loaded[1]))]

    def tokens(engine, seed):
        return [done.token_ids for _, done in sorted(run_all(engine, requests, Sampling(seed=seed)).items())]

    engine, other = engine_for(loaded, slots=3), engine_for(loaded, slots=3)
    assert tokens(engine, 7) == tokens(engine, 7) != tokens(engine, 8)
    assert tokens(engine, None) == tokens(other, None)
    assert tokens(engine, None) != tokens(engine, None)


def test_sampled_log_probs_equal_those_of_training(loaded):
    model, tokenizer = loaded
    request = Request(0, tokenizer("a1b2=")["input_ids"], 0, 15)
    done = run_all(engine_for(loaded, slots=1), [request], Sampling(temperature=0.7, top_p=0.9))[0]
    ids = torch.tensor([[*request.token_ids, *done.token_ids][:-1]])
    first = len(request.token_ids) - 1
    column = torch.arange(first, first + len(done.token_ids))
    row = torch.zeros_like(column)
    got = token_log_probs(model, ids, row, column, torch.tensor(done.token_ids), temperature=0.7)
    torch.testing.assert_close(torch.tensor(done.log_probs), got.log_probs.detach(), atol=1e-5, rtol=1e-5)
    assert (got.entropy > 0).all()


@pytest.mark.parametrize("keep_kv", [False, True])
def test_aborted_rows_come_back_with_what_they_have_and_go_on(loaded, keep_kv):
    ids = prompts(loaded[1])
    whole = run_all(engine_for(loaded, slots=6), [Request(i, p, 0, 21) for i, p in enumerate(ids)], GREEDY)
    engine = engine_for(loaded, slots=3, keep_kv=keep_kv)
    engine.submit([Request(i, p, 0, 5 if i == 1 else 21) for i, p in enumerate(ids)], GREEDY)
    ended = engine.run_until_a_row_ends()
    assert [(done.row, done.reason, len(done.token_ids)) for done in ended] == [(1, "budget", 5)]
    aborted = engine.abort()
    assert [(done.row, done.reason, len(done.token_ids)) for done in aborted] == [
        (0, "aborted", 5), (2, "aborted", 5), (3, "aborted", 0), (4, "aborted", 0), (5, "aborted", 0)
    ]  # fmt: skip
    assert engine.run_until_a_row_ends() == []
    engine.update_weights(1)
    tokens = {done.row: done.token_ids for done in (*ended, *aborted)}
    rest = [Request(i, [*p, *tokens[i]], len(tokens[i]), 21 - len(tokens[i])) for i, p in enumerate(ids)]
    for row, done in run_all(engine, rest, GREEDY).items():
        assert tokens[row] + done.token_ids == whole[row].token_ids


def test_weights_and_memory_change_only_between_rollouts(loaded):
    engine = engine_for(loaded, slots=1)
    engine.submit([Request(0, prompts(loaded[1])[0], 0, 4)], GREEDY)
    with pytest.raises(RuntimeError, match="weights may change only between rollouts"):
        engine.update_weights(1)
    with pytest.raises(RuntimeError, match="memory may be released only between rollouts"):
        engine.release_memory()
    with pytest.raises(ValueError, match="sampled otherwise"):
        engine.submit([Request(1, prompts(loaded[1])[1], 0, 4)], Sampling(temperature=0.5))


def test_released_memory_comes_back_with_the_next_rollout(loaded):
    requests = [Request(i, ids, 0, 8) for i, ids in enumerate(prompts(loaded[1]))]
    engine = engine_for(loaded, slots=2)
    first = run_all(engine, requests, GREEDY)
    engine.release_memory()
    assert engine._cache is None
    assert [d.token_ids for d in first.values()] == [d.token_ids for d in run_all(engine, requests, GREEDY).values()]


def test_an_engine_with_its_own_copy_follows_the_trained_model_when_told(loaded):
    model, tokenizer = loaded
    copied = copy.deepcopy(model).to(torch.bfloat16)
    engine = engine_for((copied, tokenizer), slots=2, trained=model)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    before = run_all(engine, [Request(0, prompts(tokenizer)[0], 0, 1)], GREEDY)[0].log_probs
    engine.update_weights(1)
    after = run_all(engine, [Request(0, prompts(tokenizer)[0], 0, 1)], GREEDY)[0].log_probs
    assert engine.model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(engine.model.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))
    assert before != after


def test_records_hold_every_token_and_adjoin(loaded):
    _, tokenizer = loaded
    engine = engine_for(loaded, slots=4)
    requests = [Request(i, ids, 0, 20) for i, ids in enumerate(prompts(tokenizer))]
    completions = run_all(engine, requests, Sampling())
    records = engine.take_records()
    decode = [r for r in records if r["kind"] == "decode"]
    assert sum(r["steps"] * r["batch"] for r in decode) == sum(len(c.token_ids) for c in completions.values())
    assert sum(r["fresh_tokens"] for r in records) == sum(map(len, prompts(tokenizer)))
    for before, after in pairwise(records):
        assert before["t_end"] == after["t_start"]
    assert engine.take_records() == []


def test_a_row_that_does_not_fit_is_refused(loaded):
    with pytest.raises(ValueError, match="do not fit a slot of 64"):
        engine_for(loaded, slots=1).submit([Request(0, [1] * 60, 0, 10)], GREEDY)


def test_draws_by_row_do_not_depend_on_what_runs_beside(loaded):
    requests = [Request(10 * i, ids, 0, 12) for i, ids in enumerate(prompts(loaded[1]))]
    sampling = Sampling(seed=5, by_row=True)
    together = run_all(engine_for(loaded, slots=6), requests, sampling)
    narrow = run_all(engine_for(loaded, slots=2, seed=9), requests, sampling)
    alone = {k: v for one in requests for k, v in run_all(engine_for(loaded, slots=1), [one], sampling).items()}
    tokens = [{row: done.token_ids for row, done in each.items()} for each in (together, narrow, alone)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert len({tuple(own) for own in tokens[0].values()}) == 6
    other = run_all(engine_for(loaded, slots=6), requests, Sampling(seed=6, by_row=True))
    assert {row: done.token_ids for row, done in other.items()} != tokens[0]
    # A row that is cut and goes on draws what it would have drawn.
    first = run_all(engine_for(loaded, slots=1), [replace(requests[1], budget_tokens=5)], sampling)[10].token_ids
    rest = Request(10, [*requests[1].token_ids, *first], 5, 7)
    assert [*first, *run_all(engine_for(loaded, slots=1), [rest], sampling)[10].token_ids] == tokens[0][10]


def test_draws_by_row_follow_the_policy():
    rows = torch.arange(40_000)
    u = uniform_of(3, rows % 200, rows // 200)
    assert kstest(u.numpy(), "uniform").pvalue > 0.01
    assert abs(float(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([u[:-200], u[200:]]))[0, 1])) < 0.02
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, -3.0])
    drawn, log_probs = draw(
        logits.repeat(40_000, 1), Sampling(seed=1, by_row=True, temperature=0.7), None, rows, rows % 7
    )
    p = (logits.double() / 0.7).softmax(-1)
    assert chisquare(torch.bincount(drawn, minlength=5), 40_000 * p).pvalue > 0.01
    torch.testing.assert_close(log_probs.exp(), p[drawn].float())
    cut, _ = draw(logits.repeat(4_000, 1), Sampling(seed=1, by_row=True, top_k=2), None, rows[:4_000], rows[:4_000])
    assert set(cut.tolist()) == {0, 2}
