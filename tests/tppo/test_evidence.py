import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tppo.trainer as trainer_module
from profiling.errors import RunError
from profiling.reader import Run
from profiling.settings import to_toml
from tests.tppo.ranks import meeting
from tppo.evidence import keeping_evidence, plain
from tppo.learner.finite import Found, NotFinite, check_gradient, check_loss, not_finite
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.start import train, trainer_for


def test_elements_that_are_not_finite_are_counted_and_whole_numbers_always_are():
    tensors = {"a": torch.tensor([1.0, float("nan"), float("inf")]), "b": torch.ones(2), "c": torch.tensor([1, 2])}
    assert not_finite(tensors) == {"a": 2}


def test_json_has_no_nan_so_it_stands_as_text():
    assert plain({"a": [1.0, float("nan")], "b": {"c": -float("inf")}}) == {"a": [1.0, "nan"], "b": {"c": "-inf"}}


class OtherRankSawIt(Ranks):
    def any(self, flag):
        return True


def test_all_ranks_stop_where_one_saw_a_loss_that_is_not_finite():
    check_loss(torch.tensor(1.0), "policy", SINGLE, lambda: Found({}))
    with pytest.raises(NotFinite) as fault:
        check_loss(torch.tensor(1.0), "policy", OtherRankSawIt(), lambda: Found({"own": 1}))
    assert fault.value.found is None
    with pytest.raises(NotFinite) as fault:
        check_loss(torch.tensor(float("inf")), "policy", OtherRankSawIt(), lambda: Found({"own": 1}))
    assert fault.value.found == Found({"own": 1})


def test_a_rank_that_saw_nothing_writes_nothing(tmp_path):
    with (
        pytest.raises(RunError, match="step 3: the policy's loss is not finite"),
        keeping_evidence(tmp_path, 3, SINGLE, None),
    ):
        raise NotFinite("loss", "policy", None)
    assert not (tmp_path / "evidence").exists()


def test_the_parameters_whose_gradient_is_at_fault_are_named_before_clipping_spreads_it():
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    model[0].weight.grad[0, 1] = float("nan")
    check_gradient(1.0, model, "policy")
    with pytest.raises(NotFinite) as fault:
        check_gradient(float("nan"), model, "policy")
    assert fault.value.found.faults == {"0.weight": 1}
    assert fault.value.found.norms["1.weight"] == 3.0


def break_advantages(monkeypatch, at_step):
    """One advantage of the step is not a number."""
    calls, estimate = [], trainer_module.estimate

    def broken(*arguments, **options):
        policy_batch, value_batch = estimate(*arguments, **options)
        calls.append(1)
        if len(calls) == at_step:
            advantages = policy_batch.advantages.clone()
            row, column = policy_batch.mask.nonzero()[0].tolist()
            advantages[row, column] = float("nan")
            policy_batch = replace(policy_batch, advantages=advantages)
        return policy_batch, value_batch

    monkeypatch.setattr(trainer_module, "estimate", broken)


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_a_loss_that_is_not_finite_stops_before_the_weights_move_and_leaves_evidence(make_config, monkeypatch):
    config = make_config("run", train={"steps": 4, "checkpoint_every": 1, "mini_batches": 1})
    break_advantages(monkeypatch, at_step=3)
    with pytest.raises(RunError) as fault, trainer_for(config) as trainer:
        trainer.run(show_progress=False)
    folder = config.output / "evidence" / "step-000003"
    assert str(fault.value) == (
        "step 3: the policy's loss is not finite (advantages, pg_loss); the run stopped before the optimiser moved, "
        f"and nothing was saved after the last checkpoint. Evidence: {folder}. Go on with --resume {config.output} "
        "and a lower optimizer.policy_lr"
    )
    saved = load_file(config.output / "checkpoints" / "step-000002" / "policy" / "model.safetensors")
    now = trainer.state.policy.state_dict()
    assert all(torch.equal(weight, now[name]) for name, weight in saved.items())
    assert Run(config.output).trailer["status"] == "failed"
    assert Run(config.output).metrics.step.max() == 2

    about = json.loads((folder / "rank-0.json").read_text())
    assert (about["step"], about["what"], about["model"]) == (3, "loss", "policy")
    assert about["not_finite"] == {"advantages": 1, "pg_loss": 1}
    assert about["metrics_of_the_step_before"]["step"] == 2
    tensors = load_file(folder / "rank-0.safetensors")
    assert tensors["batch.advantages"].isnan().sum() == 1
    assert len(tensors["batch.log_probs"]) == len(tensors["batch.targets"]) == len(tensors["batch.behaviour"])
    assert len(about["rows"]) == len(tensors["batch.input_ids"])
    assert len(tensors["rows.log_probs"]) == tensors["rows.response_ids.lengths"].sum()

    monkeypatch.undo()
    break_advantages(monkeypatch, at_step=1)
    with pytest.raises(RunError, match="step-000003-2"):  # what was kept first stays
        train(config, resume=True, show_progress=False)
    monkeypatch.undo()
    train(config, resume=True, show_progress=False)
    assert Run(config.output).metrics.step.max() == 4


def test_a_value_loss_before_the_first_checkpoint_says_to_start_again(make_config, monkeypatch):
    import tppo.learner.value_update as value_update

    loss = value_update.value_loss
    monkeypatch.setattr(value_update, "value_loss", lambda *a, **k: loss(*a, **k) * float("inf"))
    config = make_config("run")
    with pytest.raises(RunError) as fault:
        train(config, show_progress=False)
    assert str(fault.value).startswith("step 0: the value model's loss is not finite (loss); ")
    assert str(fault.value).endswith(
        "There is no checkpoint yet: start again, in another directory, with a lower optimizer.value_lr"
    )
    assert (config.output / "evidence" / "step-000000" / "rank-0.safetensors").is_file()


def test_a_gradient_that_is_not_finite_names_its_parameter_and_keeps_the_rows(make_config):
    config = make_config("run", train={"steps": 2})
    with (
        pytest.raises(RunError, match=r"gradient is not finite \(model.norm.weight\)"),
        trainer_for(config) as trainer,
    ):
        weight = dict(trainer.state.policy.named_parameters())["model.norm.weight"]
        weight.register_hook(lambda gradient: gradient * float("nan"))
        before = weights_of(trainer.state.policy)
        trainer.run(show_progress=False)
    after = weights_of(trainer.state.policy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    about = json.loads((config.output / "evidence" / "step-000001" / "rank-0.json").read_text())
    assert about["not_finite"] == {"model.norm.weight": 32}
    assert about["gradient_norms"]["model.norm.weight"] == "nan"
    assert len(about["rows"]) == 4  # of the mini-batch


@pytest.mark.slow
def test_two_ranks_stop_alike_and_the_one_that_saw_it_keeps_the_evidence(make_config, tmp_path):
    config = make_config("run", train={"steps": 2, "micro_batch_tokens": 64})
    (tmp_path / "run.toml").write_text(to_toml(config.model_dump(mode="json")))
    script = Path(__file__).with_name("stopping_ranks.py")
    with meeting(2) as environments:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), str(tmp_path / "run.toml")], text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env=os.environ | own | {"PYTHONPATH": str(Path.cwd())},
            )
            for own in environments
        ]  # fmt: skip
        try:
            said = [rank.communicate(timeout=500) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert said[0][0] == said[1][0], said
    assert "step 1: the policy's loss is not finite (advantages, pg_loss)" in said[0][0], said
    folder = config.output / "evidence" / "step-000001"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-1.json", "rank-1.safetensors"]
