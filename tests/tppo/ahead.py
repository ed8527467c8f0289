"""Rollouts that run ahead of training, whichever of the two a machine gives its cores to."""

import threading

from tppo import generation, trainer


def training_waits_for_the_rollout_ahead(monkeypatch, engine, steps):
    """Each update of the policy but the last one goes on when a row of the next step has ended. A rollout that itself
    waited for the update would be found out."""
    run_rollout, run_until_a_row_ends = generation.run_rollout, engine.run_until_a_row_ends
    update_policy = trainer.update_policy
    changed, under_way, ended, updates = threading.Condition(), [0], set(), []

    def rolling_out(schedule, engine, plan, *rest):
        under_way.append(plan.step)
        return run_rollout(schedule, engine, plan, *rest)

    def telling(engine):
        completions = run_until_a_row_ends(engine)
        if completions:
            with changed:
                ended.add(under_way[-1])
                changed.notify_all()
        return completions

    def waiting(*arguments):
        updates.append(len(updates) + 1)
        if updates[-1] < steps:
            with changed:
                assert changed.wait_for(lambda: updates[-1] + 1 in ended, timeout=200), "no row ended meanwhile"
        return update_policy(*arguments)

    monkeypatch.setattr(generation, "run_rollout", rolling_out)
    monkeypatch.setattr(engine, "run_until_a_row_ends", telling)
    monkeypatch.setattr(trainer, "update_policy", waiting)


def assert_rolled_out_ahead(run, steps):
    """Each step from the second on began before the one before it had trained."""
    spans = run.engine.groupby("step").t_start.min()
    trained = run.phases[run.phases.name == "update_policy"].set_index("step").t_end
    assert all(spans[step] < trained[step - 1] for step in range(2, steps + 1))
