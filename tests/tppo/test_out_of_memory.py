"""Memory that runs out in training. When the kernel ends the process instead, that is SIGKILL (test_kills.py)."""

import pytest
import torch

from profiling.errors import RunError
from profiling.reader import Run
from tests.tppo.killing import assert_same_run, train_seeded
from tppo import trainer
from tppo.out_of_memory import saying_what_to_lower


def of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


def of_this_machine():
    torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize("run_out", [of_a_gpu, of_this_machine])
def test_a_step_without_memory_says_what_to_lower_and_the_run_goes_on_from_its_checkpoint(
    make_config, monkeypatch, run_out, withstood
):
    options = {"train": {"steps": 5, "checkpoint_every": 2}}
    whole, config = make_config("whole", **options), make_config("run", **options)
    train_seeded(whole)
    with monkeypatch.context() as patched:
        update, calls = trainer.update_policy, []

        def hungry(*arguments):
            calls.append(0)
            if len(calls) == 4:
                run_out()
            return update(*arguments)

        patched.setattr(trainer, "update_policy", hungry)
        with pytest.raises(RunError) as error:
            train_seeded(config)
    said = str(error.value)
    assert said.startswith("step 4: out of memory (")
    assert "llocate" in said
    assert f"lower train.micro_batch_tokens = {config.train.micro_batch_tokens}, or set model.activation_chec" in said
    assert f"go on from it with --resume {config.output}" in said
    assert "\n" not in said
    assert Run(config.output).trailer["status"] == "failed"
    train_seeded(config, resume=True)
    assert_same_run(config.output, whole.output)
    withstood("out of memory in a step", lost="nothing: the steps since the last checkpoint are done again")


def test_other_errors_stay_what_they_are(make_config):
    with (
        pytest.raises(RuntimeError, match="shape mismatch"),
        saying_what_to_lower(make_config("run"), step=1),
    ):
        raise RuntimeError("shape mismatch")
