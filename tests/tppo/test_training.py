import json
import os
import signal
from dataclasses import replace

import pandas as pd
import pytest
import torch

from profiling.errors import ConfigError, DataError, RunError
from profiling.reader import Run
from tests.tppo.ranks import when
from tppo.algorithms.recipes import RECIPES
from tppo.rollout.drive import plan_step
from tppo.schedule import Demand, from_description
from tppo.schedule.log import decide_again
from tppo.start import train

TIMES = ("time", "clock", "perf/throughput")


def without_times(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES) and "timing" not in k} for row in rows]


def run(config, **options):
    train(config, show_progress=False, **options)
    return Run(config.output)


def replay(run_):
    """Feed a run's logged inputs to a fresh schedule; the decisions it makes, beside those logged."""
    schedule = from_description(run_.header["schedule"])
    pairs = decide_again(schedule, [r for r in run_.trace if r.get("step", 0) >= 1])
    return [fresh for _, fresh in pairs], [logged for logged, _ in pairs]


def settings_of(algorithm):
    """What a recipe needs beside its name."""
    groups = {"rollout": {"prompts_per_step": 2, "samples_per_prompt": 4}} if algorithm == "dapo" else {}
    return {"algorithm": {"name": algorithm, "max_sampling_rounds": 2}, **groups}


@pytest.mark.parametrize("algorithm", ["ppo", "tppo"])
def test_one_seed_gives_one_result(make_config, algorithm):
    first = run(make_config("first", algorithm={"name": algorithm}))
    second = run(make_config("second", algorithm={"name": algorithm}))
    assert without_times(first.path) == without_times(second.path)
    assert without_times(first.path) != without_times(run(make_config("third", train={"seed": 4})).path)


def test_a_fresh_schedule_makes_every_decision_of_a_real_run_again(make_config):
    done = run(make_config("run"))
    fresh, logged = replay(done)
    assert fresh == logged
    actions = [decision["action"] for record in logged for decision in record.get("decisions", [])]
    assert {"carry", "finish", "end_step", "update_weights"} == set(actions)


def test_every_row_is_finished_or_carried_and_no_token_is_lost(make_config):
    done = run(make_config("run", train={"steps": 8}))
    rows = done.rollouts[done.rollouts.step >= 1]
    assert (rows.groupby("step").size() == 8).all()
    for _, visits in rows.sort_values("step").groupby("row"):
        before = visits.context_before.to_list()
        assert before[0] == visits.prompt_tokens.iloc[0]
        assert before[1:] == (visits.context_before + visits.tokens).to_list()[:-1]
        assert visits.finished.to_list()[:-1] == [False] * (len(visits) - 1)
        assert visits.step.diff().dropna().eq(1).all()  # a carried row runs in every step until it ends
    assert done.summary["rows_in"] == done.summary["rows_finished"] + done.summary["rows_carried"]
    assert (rows.tokens <= 10).all()


def test_a_window_at_the_maximum_trains_exactly_as_an_untruncated_schedule(make_config, monkeypatch):
    """Same recipe, window = L and window > L, and the synchronous schedule: the same weights bit for bit."""
    runs = [run(make_config(f"w{w}", rollout={"window": w})) for w in (24, 90)]
    monkeypatch.setitem(RECIPES, "tppo", replace(RECIPES["tppo"], rollout="to_end"))
    runs.append(run(make_config("synchronous")))
    assert runs[2].header["schedule"] == {"kind": "synchronous"}
    for other in runs[1:]:
        assert without_times(other.path) == without_times(runs[0].path)
    states = [torch.load(last(r) / "optimizers.pt", weights_only=True)["policy_optimizer"] for r in runs]
    for state in states[1:]:
        for key, moments in state["state"].items():
            assert torch.equal(moments["exp_avg"], states[0]["state"][key]["exp_avg"])


def last(run_):
    return sorted((run_.path / "checkpoints").glob("step-*"))[-1]


def test_every_parameter_of_both_networks_moves(make_config, tiny_model):
    from safetensors.torch import load_file

    done = run(make_config("run"))
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(last(done) / "policy" / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    value = load_file(last(done) / "value_model.safetensors")
    assert value["head.weight"].abs().sum() > 0
    for name, weight in value.items():
        if name.startswith("backbone."):
            assert not torch.equal(weight, before["model." + name.removeprefix("backbone.")])


def test_trained_tokens_are_counted_apart_from_processed_ones(make_config):
    done = run(make_config("run"))
    rows = done.rollouts[done.rollouts.step >= 1]
    kept = rows.tokens.where(rows.finished, (rows.tokens - 2).clip(lower=0))
    by_step = kept.groupby(rows.step).sum()
    metrics = done.metrics[done.metrics.step >= 1].set_index("step")
    assert metrics["training/trained_tokens"].astype(int).to_dict() == by_step.to_dict()
    assert done.summary["trained_tokens"] == by_step.sum()
    assert done.summary["processed_tokens"] == metrics["training/processed_tokens"].sum()
    assert done.summary["processed_tokens"] > done.summary["generated_tokens"]


def test_the_timings_of_a_step_add_up_to_less_than_the_step(make_config):
    metrics = run(make_config("run")).metrics.query("step >= 1")
    parts = [c for c in metrics if c.startswith("timing_s/") and c not in ("timing_s/step", "timing_s/testing")]
    assert (metrics[parts].sum(axis=1) <= metrics["timing_s/step"] + 1e-9).all()


def test_the_ledger_of_a_real_run_sums_to_its_wall_time(make_config):
    done = run(make_config("run"))
    assert done.ledger.seconds.sum() == pytest.approx(done.trailer["t"], rel=1e-9)
    assert done.summary["gpu_seconds"] == pytest.approx(done.summary["wall_seconds"])
    for cause in ("evaluation", "prefill", "re_prefill", "decode_useful", "update_policy", "update_value"):
        assert done.summary["ledger"][cause] > 0


@pytest.mark.parametrize("algorithm", RECIPES)
def test_a_resumed_run_equals_an_undisturbed_one(make_config, algorithm):
    """Also the proximal policy, the batches to reuse and the adapted learning rate go on where they were."""
    own = settings_of(algorithm)
    whole = run(make_config("whole", train={"steps": 6}, **own))
    run(make_config("parted", train={"steps": 3}, **own))
    parted = run(make_config("parted", train={"steps": 6}, **own), resume=True)
    assert without_times(parted.path) == without_times(whole.path)
    assert parted.rollouts.drop(columns=["t_start", "t_end"]).equals(whole.rollouts.drop(columns=["t_start", "t_end"]))
    fresh, logged = replay(parted)
    assert fresh == logged


def test_resuming_discards_what_came_after_the_checkpoint(make_config):
    config = make_config("run", train={"steps": 4, "checkpoint_every": 2})
    done = run(config)
    expected = without_times(done.path)
    import shutil

    shutil.rmtree(done.path / "checkpoints" / "step-000004")
    with (done.path / "trace.jsonl").open("a") as trace:
        trace.write('{"type": "torn')
    again = run(config, resume=True)
    assert without_times(again.path) == expected
    assert again.rollouts.groupby("step").size().to_dict() == {0: 8, 1: 8, 2: 8, 3: 8, 4: 8}


@pytest.mark.parametrize("algorithm", RECIPES)
def test_rows_in_are_rows_finished_and_carried_under_every_recipe(make_config, algorithm):
    done = run(make_config("run", **settings_of(algorithm)))
    summary = done.summary
    assert summary["rows_in"] == summary["rows_finished"] + summary["rows_carried"]
    rows = done.rollouts[done.rollouts.step >= 1]
    assert not rows.duplicated(["step", "row"]).any()
    assert (rows.trained_tokens[rows.discarded] == 0).all()
    first_use = rows.groupby("step").trained_tokens.sum()
    metrics = done.metrics.query("step >= 1").set_index("step")
    reused = metrics["training/reused_rows"] > 0
    assert (first_use[~reused] == metrics["training/trained_tokens"][~reused]).all()
    assert reused.any() == (algorithm == "geppo")
    assert done.ledger.seconds.sum() == pytest.approx(done.trailer["t"], rel=1e-9)


def test_dynamic_sampling_replaces_prompts_whose_answers_are_alike(make_config):
    """A random model answers nothing right, so every group is dropped and its decode time was for nothing."""
    done = run(make_config("run", **settings_of("dapo")))
    step = done.rollouts[done.rollouts.step == 2]
    assert len(step) == 16  # two rounds of eight rows
    assert step.discarded.all()
    assert done.metrics.query("step == 2")["training/discarded_rows"].item() == 16
    assert done.metrics.query("step == 2")["actor/pg_loss"].isna().item()
    assert done.summary["ledger"]["decode_discarded"] > 0
    assert done.summary["ledger"]["decode_useful"] == 0
    assert done.summary["trained_tokens"] == 0
    fresh, logged = replay(done)
    assert fresh == logged


def test_geppo_reuses_the_last_batches_and_generates_half_as_many_rows(make_config):
    done = run(make_config("run", algorithm={"name": "geppo"}, train={"steps": 6}))
    metrics = done.metrics.query("step >= 1")
    assert (done.rollouts.query("step >= 1").groupby("step").size() == 4).all()
    assert metrics["training/reused_rows"].tolist() == [0, 4, 8, 12, 12, 12]
    assert metrics["actor/total_variation"].gt(0).all()


def test_a_value_model_warm_starts_another_run(make_config):
    first = run(make_config("first"))
    source = last(first)
    second = make_config("second", value={"path": str(source), "pretrain_rows": 0}, train={"steps": 1})
    from tppo.models.policy import load_policy
    from tppo.state import new_state

    policy, tokenizer = load_policy(second.model.path)
    loaded = new_state(policy, tokenizer, second).value_model.state_dict()
    from safetensors.torch import load_file

    assert all(
        torch.equal(weight, loaded[name]) for name, weight in load_file(source / "value_model.safetensors").items()
    )
    assert run(second).summary["steps"] == 1


def test_a_value_model_that_is_not_there_or_does_not_fit_is_one_line(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"value.path: .* holds no value model for this policy"):
        train(make_config("run", value={"path": str(tmp_path / "nowhere")}), show_progress=False)
    from safetensors.torch import save_file

    save_file({"head.weight": torch.zeros(1, 7)}, tmp_path / "value_model.safetensors")
    with pytest.raises(ConfigError, match="holds no value model for this policy"):
        train(make_config("run", value={"path": str(tmp_path)}), show_progress=False)
    assert not (tmp_path / "run").exists()


def test_the_kl_penalty_stands_against_the_model_the_run_started_from(make_config):
    config = {"algorithm": {"name": "ppo", "kl_coef": 0.1}}
    metrics = run(make_config("run", train={"steps": 4}, **config)).metrics.query("step >= 1")
    assert metrics["timing_s/ref"].gt(0).all()
    assert metrics["actor/kl_loss"].iloc[0] < metrics["actor/kl_loss"].iloc[-1]
    parted = make_config("parted", train={"steps": 2}, **config)
    run(parted)
    resumed = run(make_config("parted", train={"steps": 4}, **config), resume=True)
    assert resumed.metrics.query("step >= 1")["actor/kl_loss"].tolist() == metrics["actor/kl_loss"].tolist()


def test_the_value_model_has_a_schedule_of_its_own(make_config):
    config = make_config(
        "run", optimizer={"value_warmup_steps": 4, "value_lr": 4e-4, "warmup_steps": 2, "policy_lr": 2e-4},
        value={"epochs": 2, "mini_batches": 1, "micro_batch_tokens": 50}, algorithm={"name": "ppo"},
    )  # fmt: skip
    metrics = run(config).metrics.query("step >= 1")
    assert metrics["critic/lr"].tolist() == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])
    assert metrics["actor/lr"].tolist() == pytest.approx([1e-4, 2e-4, 2e-4, 2e-4])


def test_ctrl_c_ends_the_step_and_saves(make_config):
    config = make_config("run", train={"steps": 10_000})
    when(config.output / "rollouts" / "step-000001.parquet", lambda: os.kill(os.getpid(), signal.SIGINT))
    outcome = train(config, show_progress=False)
    assert outcome.status == "interrupted"
    done = Run(config.output)
    assert done.trailer["status"] == "interrupted"
    assert last(done).name == f"step-{outcome.steps:06d}"
    assert len(done.metrics.query("step >= 1")) == outcome.steps


def test_a_step_in_which_no_row_finishes_trains_the_policy_and_skips_the_value_model(make_config):
    config = make_config("run", rollout={"window": 1, "max_response_tokens": 24}, value={"pretrain_rows": 0},
                         algorithm={"trailing_tokens": 0}, train={"steps": 1})  # fmt: skip
    metrics = run(config).metrics.query("step == 1").iloc[0]
    if metrics["training/finished_rows"] == 0:
        assert pd.isna(metrics.get("critic/vf_loss"))
        assert metrics["training/trained_tokens"] == 8


def test_a_directory_that_holds_a_run_is_never_overwritten(make_config):
    config = make_config("run", train={"steps": 1})
    done = run(config)
    before = (done.path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config, show_progress=False)
    assert (done.path / "metrics.jsonl").read_bytes() == before


def test_resuming_nothing_says_so(make_config):
    with pytest.raises(DataError, match="no checkpoint to resume from"):
        train(make_config("nothing"), resume=True, show_progress=False)


def test_plans_are_logged_as_they_are_made():
    records = []
    plan_step(from_description({"kind": "synchronous"}), [], Demand(1, 1, 0, 5), records.append, lambda: 0.5)
    assert records[0]["admissions"] == [{"row": 0, "response_tokens": 0, "budget_tokens": 5}]


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_weights(make_config, monkeypatch):
    config = make_config("run", train={"steps": 4, "checkpoint_every": 1})
    import tppo.learner.step as step

    calls = []

    def broken(*arguments, **options):
        calls.append(1)
        return torch.tensor(float("nan") if len(calls) > 8 else 1.0)

    monkeypatch.setattr(step.nn.utils, "get_total_norm", broken)
    with pytest.raises(RunError, match="gradient is not finite"):
        train(config, show_progress=False)
    weights = torch.load(
        sorted((config.output / "checkpoints").glob("step-*"))[-1] / "optimizers.pt", weights_only=True
    )
    assert weights["policy_optimizer"]["state"][0]["exp_avg"].isfinite().all()


def test_a_resumed_run_keeps_what_defines_its_rows_and_records_what_changed(make_config):
    run(make_config("run", train={"steps": 2}))
    for changed, message in (({"rollout": {"window": 5}}, "rollout: a resumed run keeps"),
                             ({"algorithm": {"name": "ppo"}}, "the run was started as tppo")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            train(make_config("run", train={"steps": 4}, **changed), resume=True, show_progress=False)
    assert Run(make_config("run").output).summary["steps"] == 2  # untouched
    longer = run(make_config("run", train={"steps": 3}), resume=True)
    assert longer.config["train"]["steps"] == 3
    (note,) = [record for record in longer.trace if "resumed_s" in record]
    assert note["text"] == "resumed after step 2"
    assert note["resumed_s"] <= longer.phases[longer.phases.step == 3].t_start.min()


def test_a_resume_that_cannot_work_changes_nothing(make_config):
    done = run(make_config("run", train={"steps": 2}))
    part = done.path / "rollouts" / "step-000001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    before = {p: p.read_bytes() for p in done.path.rglob("*") if p.is_file()}
    with pytest.raises(DataError, match=r"step-000001.parquet: not a readable Parquet file"):
        train(make_config("run", train={"steps": 4}), resume=True, show_progress=False)
    assert {p: p.read_bytes() for p in done.path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("progress.json", b"{}"), ("progress.json", b"[]"), ("optimizers.pt", b""), ("optimizers.pt", b"x" * 50),
     ("value_model.safetensors", b"x")],
)  # fmt: skip
def test_a_broken_checkpoint_is_one_line_that_names_it(make_config, name, content):
    done = run(make_config("run", train={"steps": 1}))
    (last(done) / name).write_bytes(content)
    with pytest.raises(DataError, match=f"no usable checkpoint: .*{name} is damaged|manifest") as fault:
        train(make_config("run", train={"steps": 2}), resume=True, show_progress=False)
    assert "\n" not in str(fault.value)
