"""What comes before the first step: an evaluation, and the value model's pre-training. A signal breaks it off."""

import sys
from typing import TYPE_CHECKING

from tppo.collect import StepTimes
from tppo.evaluation.graded import Graded
from tppo.learner.estimates import monte_carlo_batch
from tppo.learner.step import set_learning_rate
from tppo.learner.value_update import update_value
from tppo.run_records import write_step
from tppo.signals import Stop, Stopped

if TYPE_CHECKING:
    from tppo.trainer import Trainer


def step_zero(trainer: "Trainer", stop: Stop) -> Graded | None:
    """Returns the evaluation, if there was one. Where any rank is asked to stop, all do, and the state is as it was
    before what was under way; but for the value model, which a resumed run starts anew (`restore`)."""
    state, accuracy = trainer.state, None
    order = state.generator.get_state()
    try:
        if trainer.config.evaluation.every and state.evaluated_step is None:
            with trainer.saving(step=0):
                accuracy, found = trainer.evaluate(step=0, between=stop.leave)
            trainer.log({"step": 0, "time_s": trainer.clock(), "clock_s": 0.0, **found})
        with trainer.saving(step=0), trainer.keeping_evidence(step=0):
            pretrain_value(trainer, stop)
        state.started = True
    except Stopped:
        trainer.collector.undo()
        state.generator.set_state(order)
        if state.value_optimizer is not None:
            state.value_optimizer.state.clear()
        if trainer.ranks.main:
            print(
                "tppo: stopped before the first step: what was under way is lost, and begins again with --resume "
                f"{trainer.writer.path}",
                file=sys.stderr,
            )
    return accuracy


def pretrain_value(trainer: "Trainer", stop: Stop) -> None:
    """Fit the value model to Monte-Carlo returns of the warm start's policy, which stays as it is (VAPO, arXiv
    2504.05118; T-PPO's port). Its time counts. Raises Stopped, on all ranks."""
    config, state, ranks = trainer.config, trainer.state, trainer.ranks
    if config.value.pretrain_rows == 0 or state.value_model is None or state.value_optimizer is None:
        return

    def leave_together() -> None:
        if ranks.any(stop.asked):
            raise Stopped

    start = trainer.clock()
    times = StepTimes(trainer.profiler, step=0, ranks=ranks)
    got = trainer.collector.collect_for_values(config.value.pretrain_rows, times, between=stop.leave)
    batch = monte_carlo_batch([row for row in got.rows if row.finished], trainer.recipe.gamma)
    with times.phase("update_value", batch.spans.work):
        set_learning_rate(state.value_optimizer, config.optimizer.value_lr, step=1, warmup_steps=0)
        update_value(
            state.value_model, state.value_optimizer, batch, trainer.recipe, config, trainer.pad_token_id,
            state.generator, epochs=config.value.pretrain_epochs,
            steps_per_epoch=max(1, len(got.rows) * config.train.mini_batches // config.rows_per_step), clip=None,
            ranks=ranks, between=leave_together,
        )  # fmt: skip
    write_step(trainer.writer, 0, got, trained_tokens={})
    state.clock_s += trainer.clock() - start
