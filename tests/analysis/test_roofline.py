import json
from types import SimpleNamespace

import pandas as pd
import pytest

from analysis import figures
from analysis.figures import FIGURES
from analysis.hardware import Hardware, hardware_of
from analysis.model_costs import (
    all_reduce_ceiling,
    counted_work,
    decode_trajectory,
    model_of,
    roofline_points,
    spans_work,
)
from profiling.errors import DataError
from profiling.reader import Run
from tests.analysis.images import assert_looks_like
from tests.analysis.made_runs import MODEL, RISING, make_run, simulated_run


def decode_span(**changes):
    # 10 steps of 2 rows, contexts summing to 10 before: 10 x 10 + 2 x 45 = 190 pairs, 20 tokens
    values = {"kind": "decode", "steps": 10, "batch": 2, "context_tokens": 10, "attended_pairs": 190, "t_start": 0.0,
              "t_end": 1.0}  # fmt: skip
    return pd.DataFrame([{**values, **changes}])


def test_two_gpus_of_an_engine_share_weights_and_flops_but_each_keeps_the_one_head_of_keys_and_values():
    run = SimpleNamespace(header={"gpus_per_engine": 2})
    work = spans_work(run.header["gpus_per_engine"], MODEL, decode_span()).iloc[0]
    # FLOPs 36,000 + 18,240, half each. Bytes: weights 3,600 x 10, half each; keys and values 64 x 210, whole each.
    assert work.flops == 27_120
    assert work.bytes == 18_000 + 13_440
    assert work.context == 190 / 20


def test_the_all_reduce_ceiling_by_hand():
    # A token: 2 x 900 / 2 FLOPs a GPU; 2 layers x 2 all-reduces x 2 (2 - 1) / 2 x 12 numbers x 2 bytes = 96 bytes
    hardware = Hardware(None, "x", None, None, link_bytes_per_s=960.0, network_bytes_per_s=96.0, gpus_per_node=2)
    assert all_reduce_ceiling(MODEL, hardware, 2) == ("the link", 9_000.0)
    # 4 GPUs are of two nodes: 450 FLOPs; 2 x 2 x 2 x 3 / 4 x 12 x 2 = 144 bytes; 96 bytes/s
    assert all_reduce_ceiling(MODEL, hardware, 4) == ("the network", 300.0)
    assert all_reduce_ceiling(MODEL, hardware, 1) is None


def test_a_trajectory_keeps_the_flops_and_the_time_of_the_decodes(runs, simulated):
    (only,) = decode_trajectory(runs[0], "batch").itertuples()
    assert (only._1, only.to, only.seconds) == (2, 2, pytest.approx(6.0))
    assert only.intensity == pytest.approx(54_240 / 49_440)
    line = decode_trajectory(simulated["synchronous"], "batch")
    spans = simulated["synchronous"].engine
    decodes = spans[spans.kind == "decode"]
    assert line.seconds.sum() == pytest.approx((decodes.t_end - decodes.t_start).sum())
    assert (line["from"].iloc[0], line["to"].iloc[-1]) == (decodes.batch.min(), pytest.approx(decodes.batch.max()))
    assert line.intensity.is_monotonic_increasing  # more rows share a reading of the weights


def test_a_simulated_run_says_what_its_gpu_and_model_are(simulated):
    hardware = hardware_of(simulated["synchronous"])
    assert (hardware.name, hardware.price_per_hour, hardware.link_bytes_per_s) == ("H100-SXM", 3.99, 450e9)
    assert hardware.link == "NVLink 4"
    assert (hardware.theoretical.flops, hardware.theoretical.bytes_per_s) == (989.4e12, 3.35e12)
    assert hardware.empirical.flops == pytest.approx(0.8 * 989.4e12)  # the factor of large products in decode
    model = model_of(simulated["synchronous"])
    # Qwen2.5-0.5B: 24 layers, 2 heads of keys and values of 64, 2 bytes
    assert model["kv_bytes_per_token"] == 2 * 24 * 2 * 64 * 2
    assert model["lm_head_parameters"] == 151_936 * 896


def test_a_simulated_run_counts_what_its_training_phases_compute(simulated):
    run = simulated["synchronous"]
    work = counted_work(run, range(1, 7))
    context = run.rollouts.context_before + run.rollouts.tokens  # every row is processed whole, once
    update = work.loc["update_policy"]
    assert update.tokens == update.backward_tokens == update.outputs == context.sum()
    assert update.pairs == (context * (context + 1) // 2).sum()
    assert update.updates == 6 * 16  # mini-batches
    assert update.passes == 6 * 16 * 2  # on each of two GPUs
    assert work.loc["update_value"].outputs == 0
    assert work.loc["logprob_forward"].backward_tokens == 0
    points = roofline_points([run]).set_index("work")
    assert {"decode", "prefill", "logprob_forward", "update_value", "update_policy"} <= set(points.index)
    assert (points.flops_per_s < 989.4e12).all()
    assert points.time_share.sum() == pytest.approx(1.0)


def test_flops_of_a_large_run_do_not_overflow(simulated, monkeypatch):
    run = simulated["synchronous"]
    whole = counted_work(run, range(1, 7))
    few = roofline_points([run]).set_index("work").flops["update_policy"]
    monkeypatch.setattr("analysis.model_costs.counted_work", lambda run, steps: whole * 10**7)
    assert roofline_points([run]).set_index("work").flops["update_policy"] == pytest.approx(1e7 * few)
    assert 1e7 * few > 2**63


def test_costs_without_a_gpu_leave_no_such_file(tmp_path):
    run = simulated_run(tmp_path / "affine", {"cost": {"kind": "affine", "decode_base_s": 0.01}})
    assert not (run.path / "hardware.json").exists()
    with pytest.raises(DataError, match=r"model.json: cannot be read: .*; FLOPs need the model's dimensions|hardware"):
        hardware_of(run)


def test_each_fault_of_a_hardware_file_is_named(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING)
    good = {"name": "x", "measured": True, "peak_flops": 1e9, "memory_bytes_per_s": 1e9}
    for field, value, fault in (
        ("peak_flops", 0, "peak_flops = 0 is not a positive number"),
        ("memory_bytes_per_s", "fast", "memory_bytes_per_s = 'fast' is not a positive number"),
        ("measured", "yes", "measured = 'yes' is not a bool"),
        ("price_per_hour", -1, "price_per_hour = -1 is not a positive number"),
        ("link", 4, "link = 4 is not a name"),
    ):
        (run.path / "hardware.json").write_text(json.dumps(good | {field: value}))
        with pytest.raises(DataError, match=rf"hardware\.json: {fault}"):
            hardware_of(run)
    (run.path / "hardware.json").unlink()
    with pytest.raises(DataError, match=r"does not exist, nor does one beside the run; write the machine's name"):
        hardware_of(run)


def test_a_model_with_experts_is_refused_by_name(tmp_path):
    changes = {"cost": {"kind": "analytic", "model": "Qwen3-30B-A3B", "gpu": "H200", "value_model": False},
               "cluster": {"trainer": "none"}, "workload": {"steps": 1}}  # fmt: skip
    run = simulated_run(tmp_path / "moe", changes)
    with pytest.raises(DataError, match=r"moe/model\.json: has experts; FLOPs and bytes are counted of dense models"):
        figures.roofline([run])


def test_the_drawn_points_are_the_table_s_and_the_ceilings_are_named_with_values(simulated):
    pair = [simulated["synchronous"], simulated["truncated"]]
    table = FIGURES["roofline"].data(pair)
    figure = figures.roofline(pair)
    left = figure.axes[0]
    drawn = [tuple(spot.get_offsets()[0]) for spot in left.collections]
    points = table[table.what == "point"]
    assert drawn == list(zip(points.intensity, points.flops_per_s, strict=True))
    assert (points.flops_per_s <= points.roof_flops_per_s).all()
    sizes = [spot.get_sizes()[0] for spot in left.collections]  # areas: of half the time half as large
    assert sizes == pytest.approx([300 * max(share, 0.05) for share in points.time_share])
    assert [text.get_text() for text in left.texts] == ["1", "2"]  # decode, by run
    named = " ".join(text.get_text() for text in left.get_legend().get_texts())
    assert "data sheet: 989 TFLOP/s, 3.35 TB/s,\nridge 295 FLOP/byte" in named
    assert "in practice (vllm on hopper): 792 TFLOP/s" in named


def test_a_run_that_has_not_counted_its_training_phases_says_so(tmp_path):
    run = simulated_run(tmp_path / "older")
    trace = run.path / "trace.jsonl"
    trace.write_text("".join(line for line in trace.open() if '"type":"work"' not in line))
    note = figures.roofline([Run(run.path)]).legends[0].get_title().get_text().replace("\n", " ")
    assert "Training phases: not recorded by older; shares of time are of the rollout alone." in note


def test_a_run_without_engine_records_is_left_out_with_a_word(simulated, tmp_path):
    empty = make_run(tmp_path / "empty", accuracies=[], finish=False)
    figure = figures.roofline([simulated["synchronous"], empty])
    assert "Left out: empty (has no finished training step)." in figure.legends[0].get_title().get_text()
    with pytest.raises(DataError, match="has no finished training step"):
        figures.roofline([empty])


def test_a_run_on_other_hardware_is_left_out_with_a_word(runs, simulated):
    figure = figures.roofline([simulated["synchronous"], runs[0]])
    note = figure.legends[0].get_title().get_text().replace("\n", " ")
    assert f"Left out: {runs[0].name} (on other hardware than H100-SXM)." in note


@pytest.mark.slow
def test_the_roofline_looks_as_it_did(runs, simulated, tmp_path):
    assert_looks_like(figures.roofline([simulated["synchronous"], simulated["truncated"]]), "roofline-simulated")
    assert_looks_like(figures.roofline(runs), "roofline")
