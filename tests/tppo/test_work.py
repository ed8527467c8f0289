"""What training passes computed, against torch's own count and against the rows of a run."""

import json

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from profiling.model_flops import training_bytes, training_flops
from profiling.reader import Run
from tppo.learner.work import Work
from tppo.metrics import model_flops_utilisation
from tppo.models.policy import describe_model, load_policy, token_log_probs
from tppo.start import train

MODEL = {"parameters": 1000, "embedding_parameters": 100, "lm_head_parameters": 100, "layers": 2, "heads": 3,
         "head_dim": 4, "bytes_per_parameter": 4}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_the_flops_of_a_pass_and_its_way_back_are_those_that_torch_counts(tiny_model, tied):
    """Rows of one length: no padding. torch counts attention over the square: n^2 pairs a row, not n (n + 1) / 2."""
    policy = load_policy(str(tiny_model))[0]
    policy.set_attn_implementation("eager")
    if tied:
        policy.lm_head.weight = policy.model.embed_tokens.weight
    rows, time = 3, 12
    input_ids = torch.randint(2, 60, (rows, time))
    row, column = torch.arange(rows).repeat_interleave(5), torch.arange(4, 9).repeat(rows)
    with FlopCounterMode(display=False) as counted:
        scored = token_log_probs(policy, input_ids, row, column, torch.full((15,), 7))
        scored.log_probs.sum().backward()
    work = Work()
    work.forward([time] * rows, outputs=15)
    work.backward([time] * rows, outputs=15)
    square = rows * time * time
    assert (work.pairs, work.backward_pairs) == (rows * 78, rows * 78)
    ours = training_flops(
        describe_model(policy), pd.Series({**vars_of(work), "pairs": square, "backward_pairs": square}), policy=True
    )
    # The biases of the projections are additions that neither counts; the first layer's input gets a gradient too.
    biases = 2 * sum(p.numel() for n, p in policy.named_parameters() if p.ndim == 1) * 3 * rows * time
    assert ours - biases == pytest.approx(counted.get_total_flops(), rel=2e-3)


def vars_of(work):
    return {name: getattr(work, name) for name in work.__slots__}


def test_flops_and_bytes_by_hand():
    # trunk 800. Forward: 10 tokens, 55 pairs, 4 outputs; back through the last 6 tokens: 55 - 10 = 45 pairs
    work = Work()
    work.forward([10], outputs=4)
    work.backward([10], outputs=4, detached=[4])
    work.updates = 1
    counts = pd.Series(vars_of(work))
    # policy: 2 x 800 x (10 + 12) + 96 x (55 + 90) + 2 x 100 x (4 + 8) = 35,200 + 13,920 + 2,400
    assert training_flops(MODEL, counts, policy=True) == 51_520
    assert training_flops(MODEL, counts, policy=False) == 49_120
    # policy: 4 x (900 x (1 + 3) + 7 x 1,000); value model, without the output layer: 4 x (800 x 4 + 7 x 900)
    assert training_bytes(MODEL, counts, policy=True) == 42_400
    assert training_bytes(MODEL, counts, policy=False) == 38_000


def test_mfu_is_the_flops_of_the_passes_over_what_the_peak_gives_in_their_time():
    # the pass of the test above, as a policy's: 51,520 FLOPs in 2 s; as a value model's 49,120 in 1 s; peak 1e5 / s
    work = Work()
    work.forward([10], outputs=4)
    work.backward([10], outputs=4, detached=[4])
    seconds = {"update_policy": 2.0, "update_value": 1.0, "rollout": 7.0}
    both = {"update_policy": work, "update_value": work}
    found = model_flops_utilisation(both, seconds, MODEL, 100_000.0)
    assert found == {
        "perf/mfu/actor": pytest.approx(0.2576),
        "perf/mfu/critic": pytest.approx(0.4912),
        "perf/mfu": pytest.approx((51_520 + 49_120) / 300_000),
    }
    assert set(model_flops_utilisation(both, seconds, MODEL, None).values()) == {None}
    assert set(model_flops_utilisation({}, seconds, MODEL, 1e5).values()) == {None}


def test_a_runs_mfu_is_below_one_and_null_without_a_peak(make_config):
    config = make_config("run", profile={"sampler": False, "peak_flops": 1e11}, train={"steps": 2})
    train(config, show_progress=False)
    steps = Run(config.output).metrics.query("step >= 1")
    assert steps["perf/mfu"].between(1e-6, 0.9).all()
    train(make_config("other", train={"steps": 1}), show_progress=False)
    assert Run(config.output.with_name("other")).metrics["perf/mfu"].isna().all()


@pytest.mark.parametrize("prefix", ["gradient", "detached"])
def test_a_run_records_the_work_of_its_training_phases(make_config, prefix):
    config = make_config("run", algorithm={"prefix": prefix, "old_log_probs": "recomputed"}, train={"epochs": 2})
    train(config, show_progress=False)
    run = Run(config.output)
    records = pd.DataFrame([record for record in run.trace if record["type"] == "work"])
    rows = run.rollouts[run.rollouts.step >= 1]
    resumed = 0
    for step, own in rows.groupby("step"):
        done = records[records.step == step].set_index("name")
        tokens = (own.context_before + own.tokens - 1).sum()  # the last token predicts nothing
        pairs = sum(n * (n + 1) // 2 for n in own.context_before + own.tokens - 1)
        assert done.tokens["logprob_forward"] == done.tokens["value_forward"] == tokens
        assert done.pairs["logprob_forward"] == pairs
        assert done.outputs["logprob_forward"] == own.tokens.sum()
        assert done.backward_passes["logprob_forward"] == done.updates["logprob_forward"] == 0
        update = done.loc["update_policy"]
        trained = own[own.trained_tokens > 0]
        whole = trained.context_before + trained.tokens - 1
        assert update.tokens == 2 * whole.sum()
        assert update.outputs == update.backward_outputs == 2 * trained.trained_tokens.sum()
        earlier = (trained.context_before > trained.prompt_tokens) * (trained.context_before - 1)
        resumed += earlier.sum()
        assert update.backward_tokens == update.tokens - (2 * earlier.sum() if prefix == "detached" else 0)
        assert update.updates == 4
        finished = own[own.finished]
        if len(finished):
            assert done.tokens["update_value"] == (finished.context_before + finished.tokens - 1).sum()
    assert resumed > 0
    waste = run.metrics.query("step >= 1")["perf/padding_waste"].to_list()
    sums = records[records.step >= 1].groupby("step")[["tokens", "computed"]].sum()
    assert waste == pytest.approx((1 - sums.tokens / sums.computed).to_list())
    json.dumps([record for record in run.trace if record["type"] == "work"])


@pytest.mark.parametrize(
    ("kind", "own", "expected"),
    [
        ("qwen2", {}, None),
        ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 8}, "experts"),
        ("mixtral", {"num_local_experts": 2}, "experts"),
        ("mistral", {"sliding_window": 4096}, None),  # looked up by its sizes alone
        ("gemma2", {"head_dim": 8}, "layers that look back less far"),
    ],
)
def test_what_formulas_do_not_count_is_named_and_has_no_utilisation(kind, own, expected):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8,
             "num_hidden_layers": 2, "vocab_size": 32}  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **own))
    about = describe_model(model)
    assert about["uncounted"] == expected
    work = {
        "update_policy": Work(
            passes=1, tokens=10, pairs=55, backward_passes=1, backward_tokens=10, backward_pairs=55, updates=1
        )
    }
    found = model_flops_utilisation(work, {"update_policy": 1.0}, about, peak_flops=1e9)
    assert (found["perf/mfu"] is None) == (expected is not None)
