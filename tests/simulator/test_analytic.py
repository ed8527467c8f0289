"""The analytic cost model by hand arithmetic, its agreement with another tool's tables, and what it refuses."""

import math

import numpy as np
import pytest

from benchmarks.cost_model import agreement
from profiling.errors import ConfigError
from simulator import load_experiment, simulate
from simulator.analytic import AnalyticCosts, AnalyticEngineCosts
from simulator.cost_settings import AnalyticCostSettings
from simulator.costs import resolve
from simulator.hardware import Gpu, gpu_names, gpu_reported_as, load_gpu
from simulator.hardware.efficiency import Efficiency, load_efficiency, peaks_only
from simulator.models import load_model

GPU = Gpu(name="toy", family="hopper", bf16_flops=1e15, memory_bytes=80e9, memory_bytes_per_s=2e12,
          link_bytes_per_s=800e9, network_bytes_per_s=40e9)  # fmt: skip
FACTORS = load_efficiency("hopper", "vllm")[0].model_copy(
    update={
        "weight_bandwidth": 0.8, "kv_bandwidth": 0.9, "decode_gemm": 0.5, "roofline_norm": 2.0, "step_s": 3e-4,
        "layer_s": 1e-5,
        "row_s": 2e-6, "collective_s": 4e-6, "collective_per_doubling_s": 1e-6, "link": 0.5, "prefill_gemm": 0.5,
        "prefill_attention": 0.25, "prefill_layer_s": 2e-5, "prefill_step_s": 1e-3, "prefill_collective_s": 6e-6,
        "train_gemm": 0.4, "train_attention": 0.2, "network": 0.5, "optimizer_bandwidth": 0.5,
        "engine_overhead_bytes": 4e9,
    }
)  # fmt: skip
MODEL = load_model("Qwen2.5-7B")
LINEAR = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)  # q and o, k and v, three of the MLP
TABLE = 152064 * 3584


def test_a_decode_step_by_hand():
    # 30 rows, 60,000 tokens of context, two GPUs.
    memory = 2 * (LINEAR + TABLE) / 2 / (2e12 * 0.8)
    arithmetic = 2 * (LINEAR + TABLE) * 30 / 2 / (1e15 * 0.5)
    products = math.hypot(memory, arithmetic)
    cache = 60_000 * (28 * 2 * 512 * 2) / 2 / (2e12 * 0.9)
    sent = 30 * 3584 * 2 * 2 * (2 - 1) / 2 / (400e9 * 0.5)
    expected = products + cache + 2 * 28 * (4e-6 + sent) + 28 * 1e-5 + 30 * 2e-6 + 3e-4
    costs = AnalyticEngineCosts(MODEL, GPU, FACTORS, tensor_parallel=2)
    assert costs.decode_s(batch=30, context_tokens=60_000, steps=1) == pytest.approx(expected, rel=1e-12)
    four = AnalyticEngineCosts(MODEL, GPU, FACTORS, tensor_parallel=4)
    assert four.parts(30).all_reduce == pytest.approx(2 * 28 * (5e-6 + sent * 2 * 3 / 4))


def test_many_decode_steps_are_single_ones_in_turn():
    costs = AnalyticEngineCosts(MODEL, GPU, FACTORS)
    single = sum(costs.decode_s(batch=7, context_tokens=1000 + 7 * step, steps=1) for step in range(50))
    assert costs.decode_s(batch=7, context_tokens=1000, steps=50) == pytest.approx(single, rel=1e-12)
    batches = np.array([1, 7, 300])
    assert costs.step_s(batches) == pytest.approx([costs.step_s(int(batch)) for batch in batches])


def test_a_prefill_by_hand():
    tokens, pairs = 4096, 4096 * 4097 // 2
    products = 2 * LINEAR * tokens / (1e15 * 0.5)
    attention = 28 * 4 * 28 * 128 * pairs / (1e15 * 0.25)
    expected = products + attention + 28 * 2e-5 + 1e-3
    costs = AnalyticEngineCosts(MODEL, GPU, FACTORS)
    assert costs.prefill_s(tokens=tokens, pairs=pairs) == pytest.approx(expected, rel=1e-12)
    assert costs.prefill_s(tokens=0, pairs=0) == 0
    # One token reads every weight all the same.
    assert costs.prefill_s(tokens=1, pairs=1) > 2 * LINEAR / (2e12 * 0.8)


def test_latent_attention_is_near_the_ridge_and_takes_the_longer_of_memory_and_arithmetic():
    model = load_model("DeepSeek-V3")
    memory = 61 * 576 * 2 / (2e12 * 0.9)
    flops = 2 * 61 * 128 * (576 + 512)
    assert AnalyticEngineCosts(model, GPU, FACTORS).context_token_s == pytest.approx(memory)
    slower = FACTORS.model_copy(update={"decode_gemm": 0.3})
    assert flops / 3e14 > memory
    assert AnalyticEngineCosts(model, GPU, slower).context_token_s == pytest.approx(flops / 3e14)
    # Two GPUs share the heads, and each keeps the whole latent cache.
    assert AnalyticEngineCosts(model, GPU, slower, tensor_parallel=2).context_token_s == pytest.approx(memory)
    assert AnalyticEngineCosts(MODEL, GPU, FACTORS).context_token_s == pytest.approx(28 * 2 * 512 * 2 / (2e12 * 0.9))


def test_experts_make_a_decode_step_read_more_as_the_batch_grows():
    costs = AnalyticEngineCosts(load_model("Qwen3-30B-A3B"), GPU, FACTORS)
    one, ten, many = (float(costs.parts(batch).products) for batch in (1, 10, 200))
    assert ten > 3 * one  # 8 of 128 experts against about 61
    assert many < 3 * ten


def test_whole_experts_on_each_gpu_wait_for_the_busiest():
    """30 rows x 8 experts on 4 GPUs: 60 tokens each on average, sqrt(2 x 60 x ln 4) = 12.9 more on the busiest."""
    model = load_model("Qwen3-30B-A3B")
    sliced, whole = (
        AnalyticEngineCosts(model, GPU, FACTORS, tensor_parallel=4, expert_parallel=own) for own in (False, True)
    )
    uneven = math.sqrt(2 * 60 * math.log(4)) / 60
    experts = model.expert_parameters_read(30)
    more = min(experts * uneven, 48 * 128 * model.expert_parameters - experts)  # there are no more than all of them
    memory = 2 * (model.parameters_read(30) + more + model.embedding_parameters) / 4 / (2e12 * 0.8)
    active = 48 * 8 * model.expert_parameters
    arithmetic = 2 * 30 * (model.active_parameters + active * uneven) / 4 / (1e15 * 0.5)
    assert float(whole.parts(30).products) == pytest.approx(math.hypot(memory, arithmetic))
    assert float(sliced.parts(30).products) < float(whole.parts(30).products) < 1.3 * float(sliced.parts(30).products)
    # A dense model has none, and one GPU holds all.
    dense = AnalyticEngineCosts(MODEL, GPU, FACTORS, tensor_parallel=2, expert_parallel=True)
    assert dense.step_s(9) == AnalyticEngineCosts(MODEL, GPU, FACTORS, tensor_parallel=2).step_s(9)
    alone = AnalyticEngineCosts(model, GPU, FACTORS, expert_parallel=True)
    assert float(alone.step_s(9)) == pytest.approx(float(AnalyticEngineCosts(model, GPU, FACTORS).step_s(9)))


def settings(**changes):
    return AnalyticCostSettings(kind="analytic", model="Qwen2.5-7B", gpu="H100-SXM", **changes)


def costs_of(engine_gpus=1, trainer_gpus=8, engines=8, **changes):
    costs = AnalyticCosts(settings(**changes), engine_gpus=engine_gpus, trainer_gpus=trainer_gpus, engines=engines)
    costs.gpu, costs.efficiency = GPU, FACTORS
    costs.engine.gpu = GPU
    return costs


def test_the_cache_gets_what_weights_and_overhead_leave():
    left = 0.9 * 80e9 - 2 * MODEL.parameters - 4e9
    assert costs_of().kv_tokens(25_000) == int(left / 57344)
    half = 0.9 * 80e9 - MODEL.parameters - 4e9
    assert costs_of(engine_gpus=2).kv_tokens(25_000) == int(half / 28672)
    # More GPUs than heads of keys and values: each holds a whole head.
    eight = AnalyticCosts(settings(), engine_gpus=4, trainer_gpus=8, engines=2)
    assert eight.cache_bytes_per_token == 57344 / 4


def test_training_costs_by_hand():
    tokens = 1e6
    phases = costs_of(micro_batch_tokens=10**9).phases(tokens)
    work = 2 * (LINEAR + TABLE) / (8 * 1e15 * 0.4)
    pair = 28 * 4 * 28 * 128 / (8 * 1e15 * 0.2)
    assert phases.policy_update_per_token_s == pytest.approx(4 * work)
    assert phases.policy_update_per_token_context_s == pytest.approx(4 * pair)
    assert phases.logprob_forward_per_token_s == pytest.approx(work)
    assert phases.policy_update_base_s == pytest.approx(16 * MODEL.parameters * 30 / 8 / (2e12 * 0.5))
    assert phases.value_forward_per_token_s == pytest.approx(2 * LINEAR / (8 * 1e15 * 0.4))
    assert phases.weight_sync_s == pytest.approx(2 * MODEL.parameters / (400e9 * 0.5))
    kept = costs_of(micro_batch_tokens=10**9, recompute="none", value_model=False, recompute_log_probs=False)
    phases = kept.phases(tokens)
    assert phases.policy_update_per_token_s == pytest.approx(3 * work)
    assert phases.value_update_per_token_s == phases.logprob_forward_per_token_s == 0


def test_gathering_parameters_counts_where_micro_batches_are_small():
    """Three gathers of 2 P bytes a micro-batch, at half of half the link; 100 tokens each."""
    phases = costs_of(micro_batch_tokens=100).phases(1e6)
    assert phases.policy_update_per_token_s == pytest.approx(3 * 2 * MODEL.parameters / (400e9 * 0.5) / 100 / 8)
    nodes = costs_of(micro_batch_tokens=100, trainer_gpus=16, engines=16).phases(1e6)
    assert nodes.policy_update_per_token_s == pytest.approx(3 * 2 * MODEL.parameters / (40e9 * 0.5) / 100 / 16)


def test_a_pipeline_idles_while_it_fills():
    own = {"trainer": "megatron", "mini_batches": 1, "micro_batch_tokens": 1000}
    plain = costs_of(**own).phases(64_000).policy_update_per_token_s
    staged = costs_of(**own, trainer_pipeline_parallel=4).phases(64_000).policy_update_per_token_s
    assert staged / plain == pytest.approx(1 + 3 / 32)  # two replicas of 32 micro-batches


def test_memory_says_what_does_not_fit_and_by_how_much():
    # Embedding, output layer and last norm are outside of 28 layers; the one at hand and the next in bf16, gradients
    # in bf16 and fp32. A row of 25,000 tokens makes a pass of its own; a layer's input is kept, and all of one layer:
    # two norms, queries, keys, values, output twice, cosine and sine, a number a head, four times the inner units.
    memory = costs_of(trainer_gpus=8, micro_batch_tokens=4096).training_memory(25_000)
    states = 16 * (MODEL.parameters + MODEL.backbone_parameters + 3584 + 1) / 8
    outside = 2 * TABLE + 3584
    layer = (MODEL.parameters - outside) / 28
    kept = 16 * 3584 + 2 * (3 * 3584 + 2 * 512 + 2 * 128) + 4 * 28 + 8 * 18944
    assert memory.needs == {
        "weights, gradients, moments": pytest.approx(states),
        "gathered shards": pytest.approx(layer * (2 * 2 + 6) + outside * (2 + 6)),
        "activations": pytest.approx(25_000 * (28 * 3584 * 2 + kept)),
        "logits": 4096 * 152064 * 16,
    }
    longer = costs_of(trainer_gpus=8, micro_batch_tokens=50_000, recompute="none", logit_tokens=8192)
    needs = longer.training_memory(25_000).needs
    assert needs["activations"] == pytest.approx(50_000 * 28 * kept)
    assert needs["logits"] == 8192 * 152064 * 16
    with pytest.raises(ConfigError, match=r"training on toy: .* exceed 76.0 GB by \d+.\d GB; fewer"):
        costs_of(trainer_gpus=1).training_memory(25_000).check(GPU, "fewer")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_agreement_with_the_other_tool(engine):
    """Fitted on the H100's 7B rows, the others are predicted within 10 % (mean); the pure roofline is not."""
    table = agreement(load_efficiency("hopper", engine)[0], engine)
    for _, rows in table[table.use == "predicted"].groupby("work"):
        assert np.average(rows["mean absolute error"], weights=rows.rows) < 0.10
    assert table["pure roofline, times too fast (median)"].between(1.3, 3.6).all()


def experiment(**changes):
    values = {
        "workload": {"steps": 2, "prompts_per_step": 16, "samples_per_prompt": 4, "prompt_tokens": 100,
                     "max_response_tokens": 4000, "response_tokens": {"kind": "lognormal", "mean": 900, "sigma": 0.8}},
        "schedule": {"kind": "synchronous"},
        "cluster": {"engines": 8},
        "cost": {"kind": "analytic", "model": "Qwen2.5-7B", "gpu": "H100-SXM"},
    }  # fmt: skip
    for section, own in changes.items():
        values[section] = {**values[section], **own}
    return load_experiment(values)


def test_a_simulation_from_names_alone():
    summary = simulate(experiment()).summary()
    assert summary["rows_finished"] == 128
    assert all(summary["ledger"][cause] > 0 for cause in ("prefill", "decode_useful", "update_policy", "weight_sync"))
    fast = simulate(experiment(cost={"peaks_only": True})).summary()
    assert 1.2 < summary["rollout_seconds"] / fast["rollout_seconds"] < 4


def test_a_cache_from_memory_holds_back_rows_that_do_not_fit():
    """With the closed form where everything fits, and event by event where it does not: the same where both can."""
    free = resolve(experiment())
    assert free.kv_tokens is not None
    whole = simulate(experiment())
    tight = simulate(experiment(cluster={"kv_tokens_per_engine": 6000}))
    assert tight.summary()["preemptions"] > 0
    assert tight.run.wall_s > whole.run.wall_s
    stepwise = simulate(experiment(cluster={"prefill": "chunked", "chunk_tokens": 10**6}))
    assert stepwise.summary()["generated_tokens"] == whole.summary()["generated_tokens"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": {"model": "Qwen2.5-9B"}}, "model 'Qwen2.5-9B': no such config.json"),
        ({"cost": {"gpu": "H100"}}, "GPU 'H100': neither a .toml file nor one of A1"),
        ({"cost": {"model": "Qwen2.5-72B"}}, "rollout on H100-SXM: 145.4 GB weights + 4.0 GB engine overhead"),
        ({"cost": {"tensor_parallel": 2}}, "an engine has cluster.gpus_per_engine = 1 GPUs; set them equal"),
        ({"cluster": {"gpus_per_engine": 8}}, "does not divide 28 attention heads"),
        ({"cluster": {"gpus_per_engine": 16}}, "beyond the 8 GPUs of a node of H100-SXM"),
        ({"workload": {"max_response_tokens": 200_000}}, "exceed the 131072 positions of Qwen2.5-7B"),
        ({"cluster": {"kv_tokens_per_engine": 10**7}}, "tokens of Qwen2.5-7B fit beside the weights on 1 x H100-SXM"),
        ({"cluster": {"engines": 1}}, "training on H100-SXM:"),
        ({"cost": {"trainer_tensor_parallel": 2}}, "need cost.trainer = 'megatron'"),
        ({"cost": {"trainer": "megatron", "trainer_pipeline_parallel": 3}}, "do not divide into groups of 3"),
        ({"cost": {"efficiency": "/no/such.toml"}}, "/no/such.toml: no such file"),
    ],
)
def test_what_cannot_be_is_one_line(changes, message):
    with pytest.raises(ConfigError) as error:
        simulate(experiment(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gpu_of_ones_own_and_a_number_that_is_missing(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nfamily = "future"\nbf16_flops = 5e14\nmemory_bytes = 48e9\nmemory_bytes_per_s = 1e12\n'
    )
    assert load_gpu(path).link_bytes_per_s is None
    with pytest.raises(ConfigError, match="GPU 'mine': link_bytes_per_s is unknown, and tensor_parallel > 1 needs it"):
        simulate(experiment(cluster={"gpus_per_engine": 2, "trainer": "none"}, cost={"gpu": str(path)}))
    summary = simulate(experiment(cluster={"trainer": "none"}, cost={"gpu": str(path)})).summary()
    assert summary["rollout_seconds"] > 0
    factors, borrowed = load_efficiency("future", "vllm")
    assert borrowed == "hopper"
    assert factors.rollout_uncertainty >= 0.3


@pytest.mark.parametrize("name", gpu_names())
def test_every_gpu_file_has_a_source_for_every_number_and_no_sparse_peak(name):
    gpu = load_gpu(name)
    numbers = {key for key, value in gpu.model_dump().items() if isinstance(value, float) and value is not None}
    assert numbers <= set(gpu.sources), numbers - set(gpu.sources)
    assert gpu.fp8_flops is None or gpu.fp8_flops / gpu.bf16_flops == pytest.approx(2, rel=0.02)
    assert gpu.price_per_hour is None or gpu.price_date


def test_peaks_have_no_overheads():
    own = peaks_only(FACTORS)
    assert all(value in (0, 1) for name, value in own.model_dump().items()
               if isinstance(value, float) and name.endswith(("_s", "bandwidth", "gemm", "attention")))  # fmt: skip
    assert isinstance(own, Efficiency)


def test_a_gpu_is_known_by_the_name_that_its_driver_reports():
    assert gpu_reported_as("NVIDIA H100 80GB HBM3").name == "H100-SXM"
    assert gpu_reported_as("NVIDIA A100-SXM4-80GB").name == "A100-80"
    assert gpu_reported_as("Tesla K80") is None
    names = [name for gpu in map(load_gpu, gpu_names()) for name in gpu.reported_as]
    assert len(names) == len(set(names)) >= 15
