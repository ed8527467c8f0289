"""What the trainer does under the schedules that leave rows for later, and when an engine gives rows up or dies."""

import json
import threading

import pytest
import torch

import tppo.generation as generation
from profiling.errors import ConfigError, RunError
from profiling.reader import Run
from tests.tppo.ahead import assert_rolled_out_ahead, training_waits_for_the_rollout_ahead
from tppo.rollout.protocol import Completion
from tppo.rollout.torch_engine import TorchEngine
from tppo.schedule import from_description
from tppo.schedule.log import decide_again
from tppo.start import train


def run(config, **options):
    train(config, show_progress=False, **options)
    return Run(config.output)


def without_times(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    times = ("time", "clock", "perf/throughput", "timing")
    return [{key: value for key, value in row.items() if not key.startswith(times)} for row in rows]


def rollouts_without_times(run_):
    return run_.rollouts.drop(columns=["t_start", "t_end"])


def settings(schedule, algorithm="ppo", **rollout):
    return {"rollout": {"schedule": schedule, **rollout}, "algorithm": {"name": algorithm}}


def assert_conserved(done, visits_adjoin=True):
    """Every row is finished or carried, no token is lost between its visits, every decision can be made again."""
    rows = done.rollouts[done.rollouts.step >= 1]
    assert done.summary["rows_in"] == done.summary["rows_finished"] + done.summary["rows_carried"]
    for _, visits in rows.sort_values("step").groupby("row"):
        before = visits.context_before.to_list()
        assert before[0] == visits.prompt_tokens.iloc[0]
        assert before[1:] == (visits.context_before + visits.tokens).to_list()[:-1]
        assert visits.finished.to_list()[:-1] == [False] * (len(visits) - 1)
        if visits_adjoin:
            assert visits.step.diff().dropna().eq(1).all()
    pairs = decide_again(from_description(done.header["schedule"]), [r for r in done.trace if r.get("step", 0) >= 1])
    assert pairs
    assert all(fresh == logged for logged, fresh in pairs)
    assert done.ledger.seconds.sum() == pytest.approx(done.trailer["t"], rel=1e-9)


@pytest.mark.parametrize("algorithm", ["ppo", "ppo-ewma", "vapo"])
def test_oversampling_trains_on_the_rows_that_finished_and_continues_the_rest(make_config, algorithm):
    done = run(make_config("run", train={"steps": 6}, **settings("oversample", algorithm, oversample_factor=1.5)))
    assert_conserved(done)
    rows = done.rollouts[done.rollouts.step >= 1]
    by_step = rows.groupby("step")
    assert (by_step.size() == 12).all()  # 1.5 x 8 started
    assert (by_step.finished.sum() >= 8).all()
    assert (rows.trained_tokens[~rows.finished] == 0).all()
    whole = rows.context_before + rows.tokens - rows.prompt_tokens
    assert (rows.trained_tokens[rows.finished] == whole[rows.finished]).all()  # all windows, once, when it finishes
    resumed = rows[rows.context_before > rows.prompt_tokens]
    assert len(resumed)
    # A row aborted in one step was sampled by that step's policy, and goes on under the next one.
    assert (rows.policy_version == rows.step - 1).all()
    metrics = done.metrics.query("step >= 1")
    assert metrics["timing_s/old_log_prob"].gt(0).all() == (algorithm != "ppo-ewma")
    if algorithm != "ppo-ewma":
        assert metrics["rollout_corr/is_mean"].notna().all()
        assert metrics["rollout_corr/log_prob_diff_max"].max() < 1e-4  # of tokens this step's policy sampled
    assert not metrics["actor/pg_loss"].isna().any()


def test_oversampling_by_nothing_is_synchronous(make_config):
    options = {"algorithm": {"old_log_probs": "rollout"}}
    plain = run(make_config("plain", algorithm={"name": "ppo"}))
    over = make_config("over", rollout={"schedule": "oversample", "oversample_factor": 1.0},
                       algorithm={"name": "ppo", **options["algorithm"]})  # fmt: skip
    assert without_times(run(over).path) == without_times(plain.path)


@pytest.mark.parametrize("algorithm", ["ppo", "vapo"])
def test_one_step_off_trains_each_row_one_update_after_its_policy(make_config, algorithm, monkeypatch):
    training_waits_for_the_rollout_ahead(monkeypatch, TorchEngine, steps=6)
    done = run(make_config("run", train={"steps": 6}, **settings("asynchronous", algorithm)))
    assert_conserved(done)
    rows = done.rollouts[done.rollouts.step >= 1]
    assert rows.groupby("step").policy_version.unique().map(list).to_dict() == {
        1: [0], 2: [0], 3: [1], 4: [2], 5: [3], 6: [4]
    }  # fmt: skip
    assert done.summary["staleness_max"] == 1
    assert done.summary["generation_busy_seconds"] > 0
    assert 0 <= done.summary["engine_idle_fraction"] <= 1
    assert_rolled_out_ahead(done, steps=6)
    metrics = done.metrics.query("step >= 1")
    assert metrics["rollout_corr/kl"].isna().tolist() == [False] + [True] * 5  # later rows are another policy's
    assert metrics["rollout_corr/is_mean"].notna().all()


@pytest.mark.parametrize("schedule", ["oversample", "asynchronous"])
def test_a_resumed_run_equals_an_undisturbed_one(make_config, schedule):
    own = settings(schedule)
    whole = run(make_config("whole", train={"steps": 6, "checkpoint_every": 3}, **own))
    parted = make_config("parted", train={"steps": 6, "checkpoint_every": 3}, **own)
    run(parted)
    for checkpoint in (parted.output / "checkpoints").glob("step-000006"):
        (checkpoint / "progress.json").unlink()
        for file in sorted(checkpoint.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        checkpoint.rmdir()
    again = run(parted, resume=True)
    assert without_times(again.path) == without_times(whole.path)
    assert rollouts_without_times(again).equals(rollouts_without_times(whole))
    tokens = [r.engine.query("kind == 'decode'").eval("steps * batch").groupby(r.engine.step).sum().to_dict()
              for r in (again, whole)]  # fmt: skip
    assert tokens[0] == tokens[1]


class Stubborn(TorchEngine):
    """Gives up every third row at its first token, once; dies at a chosen step."""

    given_up: set[int]
    dies_at: int | None
    rollouts = 0

    def submit(self, requests, sampling):
        type(self).rollouts += 1
        super().submit(requests, sampling)

    def run_until_a_row_ends(self):
        if self.dies_at is not None and type(self).rollouts == self.dies_at and len(self._running) < 8:
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")
        return [self.give_up(completion) for completion in super().run_until_a_row_ends()]

    def give_up(self, done):
        if done.row % 3 or done.row in self.given_up or self.dies_at is not None:
            return done
        self.given_up.add(done.row)
        kept = max(1, len(done.token_ids) // 2)
        return Completion(done.row, done.token_ids[:kept], done.log_probs[:kept], "failed", done.policy_version,
                          done.t_start, done.t_end)  # fmt: skip


@pytest.fixture
def stubborn(monkeypatch):
    """Training runs on a Stubborn engine that dies in rollout number `dies_at`."""

    def use(dies_at=None):
        monkeypatch.setattr(Stubborn, "given_up", set(), raising=False)
        monkeypatch.setattr(Stubborn, "dies_at", dies_at, raising=False)
        monkeypatch.setattr(Stubborn, "rollouts", 0)
        monkeypatch.setattr("tppo.rollout.engines.TorchEngine", Stubborn)

    return use


@pytest.mark.parametrize("schedule", ["recipe", "oversample", "asynchronous"])
def test_rows_that_the_engine_gave_up_go_on_in_a_later_step(make_config, stubborn, schedule):
    stubborn()
    done = run(make_config("run", train={"steps": 6}, value={"pretrain_rows": 0}, evaluation={"every": 0},
                           **settings(schedule)))  # fmt: skip
    assert_conserved(done)
    reasons = [record["event"]["reason"] for record in done.trace if record["type"] == "row_end"]
    assert "failed" in reasons
    rows = done.rollouts
    assert rows[rows.row % 3 == 0].groupby("row").finished.any().mean() > 0.5


@pytest.mark.parametrize("schedule", ["recipe", "oversample", "asynchronous"])
@pytest.mark.parametrize("dies_at", [1, 4])
def test_an_engine_that_dies_leaves_a_checkpoint_with_every_unfinished_row(
    make_config, stubborn, schedule, dies_at, withstood
):
    """The run goes on from there as if nothing had happened; exactly so, but where the weights that the lost rollout
    ran ahead with are no more. Rollout 1 is step 1's."""
    algorithm = "tppo" if schedule == "recipe" else "ppo"
    options = {"train": {"steps": 6}, "value": {"pretrain_rows": 0}, "evaluation": {"every": 0},
               **settings(schedule, algorithm)}  # fmt: skip
    whole = run(make_config("whole", **options))
    config = make_config("run", **options)
    stubborn(dies_at=dies_at)
    with pytest.raises(RunError, match=rf"step {dies_at}: the rollout engine failed: RuntimeError: CUDA") as error:
        train(config, show_progress=False)
    assert "\n" not in str(error.value)
    assert f"go on with --resume {config.output}" in str(error.value)
    assert Run(config.output).trailer["status"] == "failed"
    stubborn(dies_at=-1)
    again = run(config, resume=True)
    assert_conserved(again)
    assert again.summary["steps"] == 6
    if schedule != "asynchronous" or dies_at == 1:
        assert without_times(again.path) == without_times(whole.path)
        assert rollouts_without_times(again).equals(rollouts_without_times(whole))
    withstood("rollout engine in this process dies", lost="nothing: the step under way is done again")


@pytest.mark.parametrize("schedule", ["recipe", "oversample", "asynchronous"])
def test_a_step_whose_weights_a_dying_engine_does_not_take_is_trained_once(
    make_config, monkeypatch, schedule, withstood
):
    algorithm = "tppo" if schedule == "recipe" else "ppo"
    options = {"train": {"steps": 6}, **settings(schedule, algorithm)}
    whole = run(make_config("whole", **options, evaluation={"every": 0}))
    update = TorchEngine.update_weights
    dead = [True]

    def die_at_3(engine, version):
        if version == 3 and dead:
            raise RuntimeError("CUDA error: uncorrectable ECC error")
        update(engine, version)

    monkeypatch.setattr(TorchEngine, "update_weights", die_at_3)
    config = make_config("run", **options, evaluation={"every": 0})
    with pytest.raises(RunError, match=r"step \d: the rollout engine failed: .* go on with --resume"):
        train(config, show_progress=False)
    dead.clear()
    again = run(config, resume=True)
    assert without_times(again.path) == without_times(whole.path)
    assert rollouts_without_times(again).equals(rollouts_without_times(whole))
    withstood("rollout engine in this process dies when it takes weights")


@pytest.mark.parametrize("awaited_by", ["evaluation", "checkpoint"])
def test_a_rollout_ahead_that_fails_while_it_is_waited_for_outside_a_step_loses_no_row(
    make_config, stubborn, awaited_by
):
    every = {"train": {"steps": 6, "checkpoint_every": int(awaited_by == "checkpoint")},
             "evaluation": {"every": int(awaited_by == "evaluation")}}  # fmt: skip
    options = {"value": {"pretrain_rows": 0}, **settings("asynchronous", "ppo")}
    options = {name: {**options.get(name, {}), **every.get(name, {})} for name in {*options, *every}}
    config = make_config("run", **options)
    stubborn(dies_at=4 if awaited_by == "checkpoint" else 7)  # evaluations are rollouts, too
    with pytest.raises(RunError, match=r"the rollout engine failed: .*; the checkpoint of step 3 holds every"):
        train(config, show_progress=False)
    assert list(Run(config.output).metrics.step)[-1] == 3
    stubborn(dies_at=-1)
    again = run(config, resume=True)
    assert_conserved(again)
    assert again.summary["steps"] == 6


def test_an_engine_that_loses_a_row_is_found_out(make_config, monkeypatch):
    monkeypatch.setattr(TorchEngine, "run_until_a_row_ends", lambda self: [])
    config = make_config("run", value={"pretrain_rows": 0}, evaluation={"every": 0})
    with pytest.raises(RunError, match=r"step 1: the rollout engine is empty, but 8 rows have not ended"):
        train(config, show_progress=False)


def test_a_rollout_ahead_really_runs_in_another_thread(make_config, monkeypatch):
    seen = []
    original = generation.run_rollout

    def spy(schedule, engine, plan, *rest):
        seen.append((plan.step, threading.current_thread() is threading.main_thread()))
        return original(schedule, engine, plan, *rest)

    monkeypatch.setattr(generation, "run_rollout", spy)
    run(make_config("run", value={"pretrain_rows": 0}, **settings("asynchronous")))
    assert seen == [(1, True), (2, False), (3, False), (4, False)]


@pytest.mark.parametrize("old", ["rollout", "recomputed"])
def test_mismatch_between_engine_and_trainer_is_measured_every_step(make_config, old):
    done = run(make_config("run", algorithm={"name": "tppo", "old_log_probs": old}, train={"steps": 5}))
    metrics = done.metrics.query("step >= 1")
    assert metrics["rollout_corr/log_prob_diff_max"].between(0, 1e-4).all()
    assert (metrics["rollout_corr/log_prob_diff_mean"] <= metrics["rollout_corr/log_prob_diff_max"]).all()
    assert metrics["rollout_corr/k3_kl"].abs().max() < 1e-6
    assert metrics["timing_s/old_log_prob"].gt(0).all() == (old == "recomputed")
    tokens = metrics["rollout_corr/tokens"]
    generated = metrics["training/generated_tokens"]
    assert (tokens == generated).all() if old == "recomputed" else (tokens < generated).all()


def test_stale_keys_and_values_show_as_a_mismatch(make_config):
    quick = {"optimizer": {"policy_lr": 3e-3, "warmup_steps": 0}, "train": {"steps": 5}}
    difference = {}
    for keep_kv in (False, True):
        metrics = run(make_config(f"keep-{keep_kv}", rollout={"keep_kv": keep_kv}, **quick)).metrics.query("step >= 2")
        difference[keep_kv] = metrics["rollout_corr/log_prob_diff_max"].max()
    assert difference[False] < 1e-4 < 1e-2 < difference[True]


def test_an_engine_in_half_precision_shows_as_a_mismatch_and_still_trains(make_config):
    metrics = run(make_config("run", rollout={"dtype": "bfloat16"})).metrics.query("step >= 1")
    assert metrics["rollout_corr/log_prob_diff_max"].between(1e-4, 1).all()
    assert metrics["actor/pg_loss"].notna().all()


def test_truncated_importance_sampling_weights_the_loss():
    from tppo.learner.mismatch import importance_weights

    old = torch.tensor([[0.5, 0.5, 0.5]]).log()
    behaviour = torch.tensor([[0.5, 1.0, 0.125]]).log()  # ratios 1, 1/2 and 4
    weights = importance_weights(old, behaviour, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.5, 2.0]]))
    assert importance_weights(old, behaviour, cap=0.0).tolist() == [[1.0, 1.0, 1.0]]


def test_padding_waste_is_what_the_passes_computed_in_vain(make_config):
    done = run(make_config("run"))
    waste = done.metrics.query("step >= 1")["perf/padding_waste"]
    assert waste.between(0, 0.5).all()
    assert waste.gt(0).any()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"max_response_tokens": 100}},
         r"rollout.max_response_tokens = 100: with prompts of up to 15 tokens a row needs 115 .*; lower it to 80"),
        ({"rollout": {"window": 96}}, r"rollout.window = 96: .* has only 95 positions"),
        ({"data": {"max_steps": 50}}, r"data.max_steps = 50: prompts of up to 103 tokens leave no room in the 95 pos"),
        ({"rollout": {"stop_token_ids": [5000]}}, r"rollout.stop_token_ids: 5000 is not a token of the model"),
        ({"rollout": {"engine": "vllm"}}, r'rollout.engine = "vllm": vLLM is not installed; install the extra'),
        ({"rollout": {"max_rows_per_engine": 10**9}}, r"max_rows_per_engine = 1000000000: the KV cache .* GiB"),
    ],
)  # fmt: skip
def test_rows_that_cannot_run_are_one_line_and_nothing_is_written(make_config, monkeypatch, sections, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = make_config("run", **sections)
    with pytest.raises(ConfigError, match=message) as error:
        train(config, show_progress=False)
    assert "\n" not in str(error.value)
    assert not config.output.exists()


def test_a_tokenizer_of_another_model_is_refused(make_config, tiny_model, tmp_path):
    from tppo.models.policy import load_policy, save_policy

    model, tokenizer = load_policy(str(tiny_model))
    model.resize_token_embeddings(40)
    save_policy(model, tokenizer, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"its tokenizer has \d+ tokens, its model only 40; the two do not belong"):
        train(make_config("run", model={"path": str(tmp_path / "other")}), show_progress=False)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"schedule": "oversample"}}, "tppo has a schedule of its own"),
        ({"rollout": {"engine": "vllm", "compile": True}}, "rollout.compile: belongs to the torch engine"),
        ({"rollout": {"engine": "vllm", "temperature": 0.7, "top_p": 0.9}}, "vLLM cannot report log-probabilities"),
        ({"rollout": {"engine": "vllm", "schedule": "asynchronous"}, "algorithm": {"name": "ppo"}}, "cannot roll out"),
        ({"algorithm": {"old_log_probs": "rollout", "importance_cap": 2.0}}, "need no correction"),
        ({"algorithm": {"name": "geppo", "old_log_probs": "rollout"}}, "geppo has a ratio of its own"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(make_config, sections, message):
    with pytest.raises(ValueError, match=message):
        make_config("run", **sections)
