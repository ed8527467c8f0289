"""Rollout engines on a real GPU."""

import copy
import time

import pytest
import torch

from tppo.models.policy import load_policy
from tppo.rollout.protocol import Request, Sampling
from tppo.rollout.torch_engine import TorchEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"),
]
GREEDY = Sampling(temperature=0)


def run_all(engine, requests, sampling):
    engine.submit(requests, sampling)
    completions = {}
    while ended := engine.run_until_a_row_ends():
        completions |= {completion.row: completion for completion in ended}
    return completions


def engine_on(model, tokenizer, **options):
    return TorchEngine(
        model, slots=4, max_tokens=64, pad_token_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(0), clock=time.perf_counter, **options,
    )  # fmt: skip


@pytest.fixture
def loaded(tiny_model):
    return load_policy(str(tiny_model))


def requests_of(tokenizer, budget=20):
    texts = ("a1b2=", "a1=", "a3b4c5d6=", "a9b9=", "a7b1c2=", "a0=")
    return [Request(row, tokenizer(text)["input_ids"], 0, budget) for row, text in enumerate(texts)]


@pytest.mark.parametrize("keep_kv", [False, True])
def test_the_gpu_answers_as_the_cpu_does(loaded, keep_kv):
    model, tokenizer = loaded
    requests = requests_of(tokenizer)
    expected = run_all(engine_on(model, tokenizer), requests, GREEDY)
    on_gpu = engine_on(copy.deepcopy(model).cuda(), tokenizer, keep_kv=keep_kv)
    first = run_all(on_gpu, [Request(r.row, r.token_ids, 0, 8) for r in requests], GREEDY)
    rest = [Request(r.row, [*r.token_ids, *first[r.row].token_ids], 8, 12) for r in requests]
    for row, done in run_all(on_gpu, rest, GREEDY).items():
        assert first[row].token_ids + done.token_ids == expected[row].token_ids
        log_probs = torch.tensor(first[row].log_probs + done.log_probs)
        torch.testing.assert_close(log_probs, torch.tensor(expected[row].log_probs), atol=1e-3, rtol=0)


def test_half_precision_on_the_gpu_follows_the_trained_weights(loaded):
    model, tokenizer = loaded
    trained = copy.deepcopy(model).cuda()
    engine = engine_on(copy.deepcopy(trained).to(torch.bfloat16), tokenizer, trained=trained)
    with torch.no_grad():
        trained.lm_head.weight.mul_(0.5)
    engine.update_weights(1)
    done = run_all(engine, requests_of(tokenizer), Sampling(seed=1))
    for request in requests_of(tokenizer):
        ids = torch.tensor([[*request.token_ids, *done[request.row].token_ids]], device="cuda")
        with torch.no_grad():
            logits = trained(input_ids=ids).logits[0, len(request.token_ids) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, ids[0, len(request.token_ids) :, None])[:, 0].cpu()
        torch.testing.assert_close(torch.tensor(done[request.row].log_probs), exact, atol=0.1, rtol=0)


def test_released_memory_is_given_back(loaded):
    model, tokenizer = loaded
    engine = engine_on(copy.deepcopy(model).cuda(), tokenizer)
    run_all(engine, requests_of(tokenizer), GREEDY)
    before = torch.cuda.memory_allocated()
    engine.release_memory()
    assert torch.cuda.memory_allocated() < before


def test_vllm_sleeps_and_wakes_with_new_weights(loaded, tiny_model):
    pytest.importorskip("vllm", reason="needs the extra vllm")
    from tppo.rollout.vllm_engine import VllmEngine

    model, tokenizer = loaded
    engine = VllmEngine(
        model.cuda(), str(tiny_model), slots=4, max_tokens=64, temperature=1.0, dtype="float32", eager=True,
        generator=torch.Generator().manual_seed(0), clock=time.perf_counter, sleep=True, gpu_memory_utilization=0.2,
    )  # fmt: skip
    requests = requests_of(tokenizer)
    before = run_all(engine, requests, GREEDY)
    free = torch.cuda.mem_get_info()[0]
    engine.release_memory()
    assert torch.cuda.mem_get_info()[0] > free
    engine.update_weights(1)
    after = run_all(engine, requests, GREEDY)
    assert {row: done.token_ids for row, done in before.items()} == {r: d.token_ids for r, d in after.items()}
