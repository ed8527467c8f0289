"""Counts against transformers' own modules, built without memory on the meta device."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from profiling.errors import ConfigError
from simulator.models import bundled_names, load_model
from simulator.models.shape import CONFIGS

DENSE = [name for name in bundled_names() if load_model(name).experts == 0]


def built(name, **changes):
    values = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", bundled_names())
def test_parameters_are_those_of_transformers(name):
    model = built(name)
    counted = sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())
    assert load_model(name).parameters == counted


@pytest.mark.parametrize("name", DENSE)
def test_flops_of_a_forward_pass_are_those_of_transformers(name):
    """Eager attention multiplies the full square; ours is asked for the same pairs."""
    model, tokens = built(name), 40
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(input_ids=torch.zeros((1, tokens), dtype=torch.long))
    own = load_model(name)
    assert own.forward_flops(tokens, tokens * tokens) == counter.get_total_flops()


@pytest.mark.parametrize("name", bundled_names())
def test_kv_bytes_are_those_of_the_projections(name):
    own, model = load_model(name), built(name)
    attention = model.model.layers[0].self_attn
    if own.latent_dim:  # what kv_a_proj_with_mqa gives is what is kept
        assert own.kv_numbers_per_token_and_layer == attention.kv_a_proj_with_mqa.out_features
    else:
        both = attention.k_proj.out_features + attention.v_proj.out_features
        assert own.kv_numbers_per_token_and_layer == both
    layers = own.full_layers + own.window_layers
    assert layers == len(model.model.layers)


def test_what_is_published_about_some_models():
    assert load_model("Qwen2.5-7B").parameters == 7_615_616_512
    assert load_model("Qwen2.5-7B").kv_bytes_per_token() == 2 * 2 * 28 * 4 * 128
    assert load_model("DeepSeek-V3").kv_bytes_per_token() == 61 * 576 * 2  # 70,272 bytes a token
    assert load_model("DeepSeek-V3").active_parameters == pytest.approx(37e9, rel=0.02)  # the A37B of its report
    assert load_model("Qwen3-30B-A3B").active_parameters == pytest.approx(3.3e9, rel=0.1)
    gpt = load_model("gpt-oss-20b")
    assert (gpt.window, gpt.window_layers, gpt.full_layers) == (128, 12, 12)
    assert load_model("org/Qwen2.5-7B-Instruct") == load_model("qwen2.5-7b")


def test_experts_read_grow_with_the_batch_up_to_all_of_them():
    model = load_model("Qwen3-30B-A3B")
    one, few, many = (model.parameters_read(tokens) for tokens in (1, 8, 100_000))
    assert one == pytest.approx(model.linear_parameters_per_token)
    assert one < few < many
    assert many == pytest.approx(model.parameters - 2 * model.embedding_parameters - model.vector_parameters)


def test_a_window_bounds_the_pairs_of_its_layers():
    model = load_model("gpt-oss-20b")
    per_pair = 4 * model.heads * model.qk_dim
    assert model.attention_flops(1_000_000, 100) == per_pair * (12 * 1_000_000 + 12 * 100 * 128)
    assert model.attention_flops(50, 100) == per_pair * 24 * 50


def test_verls_convention_counts_the_square_and_both_tables():
    # 6 (N + 2 V h) T + 12 L h_heads d sum n^2, for two rows of 10 and 20 tokens.
    model = load_model("Qwen2.5-0.5B")
    n = model.linear_parameters_per_token
    expected = 6 * (n + 2 * 151936 * 896) * 30 + 12 * 24 * 14 * 64 * (100 + 400)
    assert model.verl_flops(30, 500) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "qwen25"},
            "model_type = 'qwen25' is not one of llama, mistral, qwen2.*the nearest is 'qwen2'",
        ),
        ({"model_type": "llama"}, "has no hidden_size"),
        ({"hidden_size": -3}, "hidden_size = '-3' is not a positive whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = 'True'"),
        ({"num_key_value_heads": 3}, "14 attention heads cannot share 3 heads"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' is neither true nor false"),
        ({"head_dim": None, "num_attention_heads": 15, "num_key_value_heads": 5}, "does not divide into 15 heads"),
        ({"layer_types": ["full_attention"]}, "layer_types must be 24 times one of"),
        ([1, 2], "holds no table"),
        ("{", "is not a readable config.json"),
    ],
)
def test_configs_that_cannot_be_used_are_one_line(tmp_path, values, message):
    path = tmp_path / "config.json"
    if isinstance(values, dict) and set(values) != {"model_type"}:
        values = json.loads((CONFIGS / "Qwen2.5-0.5B.json").read_text()) | values
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 500}, "num_experts_per_tok is above the 128 experts"),
        ({"mlp_only_layers": 5}, "mlp_only_layers is not a list of layers"),
    ],
)
def test_mixtures_that_cannot_be_are_one_line(tmp_path, change, message):
    values = json.loads((CONFIGS / "Qwen3-30B-A3B.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


def test_qwens_sliding_window_counts_where_it_is_on(tmp_path):
    values = json.loads((CONFIGS / "Qwen2.5-7B.json").read_text())
    values |= {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert (load_model(tmp_path).window, load_model(tmp_path).window_layers) == (4096, 8)
    assert load_model("Qwen2.5-7B").window_layers == 0


def test_a_name_that_is_not_bundled_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'Qwen2.5-8B': no such config.json.*did you mean 'Qwen2.5-"):
        load_model("Qwen2.5-8B")
