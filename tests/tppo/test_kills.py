"""A run that is killed and resumed is the run that was never killed, to the last bit."""

import random
import shutil
import time

import pytest

from tests.tppo.killing import (
    KILLED,
    WHOLE,
    assert_same_run,
    leftovers,
    resume_to_the_end,
    train_in_child,
    train_seeded,
)
from tppo.checkpoints.store import checkpoints_of

SETTINGS = {
    "tppo": {"algorithm": {"name": "tppo"}},
    "geppo": {"algorithm": {"name": "geppo"}},
    "ppo-ewma": {"algorithm": {"name": "ppo-ewma"}},
    "asynchronous": {"algorithm": {"name": "ppo"}, "rollout": {"schedule": "asynchronous"}},
}


def config_of(make_config, name, setting, **sections):
    own = {section: dict(values) for section, values in {**SETTINGS[setting], **sections}.items()}
    own["train"] = {"steps": 6, "checkpoint_every": 1, "keep_last": 2, **own.get("train", {})}
    return make_config(name, **own)


def survive(make_config, setting, kills, seed):
    """Kill a run `kills` times at random moments, one after the other, and compare it with one that was not."""
    start = time.perf_counter()
    whole = config_of(make_config, "whole", setting)
    train_seeded(whole)
    seconds = time.perf_counter() - start
    config = config_of(make_config, "killed", setting)
    moments = random.Random(seed)
    survived = 0
    for _ in range(20 * kills):  # one that comes after the end does not count: the run starts over
        if survived == kills:
            break
        if config.output.exists() and not checkpoints_of(config.output):
            resume = False
            shutil.rmtree(config.output)
        else:
            resume = config.output.exists()
        status = train_in_child(config, resume=resume, kill_after_s=moments.uniform(0, 0.6 * seconds))
        assert status in (KILLED, WHOLE)
        survived += status == KILLED
        if status == WHOLE:
            assert_same_run(config.output, whole.output)
            shutil.rmtree(config.output)
    assert survived == kills
    resume_to_the_end(config)
    assert_same_run(config.output, whole.output)
    assert not leftovers(config.output)


@pytest.mark.parametrize(
    "setting", ["tppo", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SETTINGS)[1:])]
)
def test_three_kills_at_random_moments_change_nothing(make_config, setting, withstood):
    survive(make_config, setting, kills=3, seed=0)
    withstood(
        f"SIGKILL at a random moment ({setting})",
        times=3,
        lost="nothing: the steps since the last checkpoint are done again",
    )


@pytest.mark.soak
@pytest.mark.parametrize("setting", SETTINGS)
def test_twenty_kills_at_random_moments_change_nothing(make_config, setting, withstood):
    survive(make_config, setting, kills=20, seed=time.time_ns())
    withstood(
        f"SIGKILL at a random moment ({setting})",
        times=20,
        lost="nothing: the steps since the last checkpoint are done again",
    )


STAGES = {
    "before the first file": lambda event, path: event == "os.mkdir" and path.endswith("/.step-000003.tmp"),
    "while files are written": lambda event, path: (
        event == "open" and path.endswith("/.step-000003.tmp/optimizers.pt")
    ),
    "before the manifest": lambda event, path: event == "open" and path.endswith(".step-000003.tmp/manifest.json"),
    "before the rename": lambda event, path: event == "os.rename" and path.endswith("/.step-000003.tmp"),
    "after the rename": lambda event, path: event == "os.rename" and path.endswith("/checkpoints/step-000001"),
    "while an old one is deleted": lambda event, path: event == "os.rmdir" and "policy" in path,
    "in the run's own files": lambda event, path: event == "os.rename" and path.endswith(".step-000004.parquet.tmp"),
}
"""Of the save after step 3, with the last two kept."""


@pytest.fixture(scope="module")
def whole_run(tiny_model, tmp_path_factory):
    """tppo's, to compare with; made once."""
    made = {}

    def get(make_config):
        if not made:
            config = config_of(make_config, "whole", "tppo")
            config = config.model_copy(update={"output": tmp_path_factory.mktemp("runs") / "whole"})
            train_seeded(config)
            made["whole"] = config.output
        return made["whole"]

    return get


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_each_stage_of_a_save_loses_nothing(make_config, whole_run, stage, withstood):
    config = config_of(make_config, "killed", "tppo")
    assert train_in_child(config, kill_at=STAGES[stage]) == KILLED
    usable = [path.name for path in checkpoints_of(config.output)]
    assert usable[-1] >= "step-000002"
    resume_to_the_end(config)
    assert_same_run(config.output, whole_run(make_config))
    assert not leftovers(config.output)
    withstood("SIGKILL at each stage of a save", lost="nothing: the steps since the last checkpoint are done again")


@pytest.mark.parametrize(
    "stage",
    [
        lambda event, path: event == "os.rename" and path.endswith("/checkpoints/step-000006"),
        lambda event, path: event == "os.rename" and path.endswith("/.step-000006.tmp"),
        lambda event, path: event == "open" and path.endswith("/checkpoints"),
    ],
    ids=["before the old one goes", "between the two", "after the new one stands"],
)
def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two(make_config, whole_run, stage, withstood):
    """A finished run that is resumed writes its last checkpoint again."""
    config = config_of(make_config, "killed", "tppo")
    train_seeded(config)
    assert train_in_child(config, resume=True, kill_at=stage) == KILLED
    assert checkpoints_of(config.output)[-1].name in ("step-000006", ".step-000006.old")
    resume_to_the_end(config)
    assert_same_run(config.output, whole_run(make_config))
    assert not leftovers(config.output)
    withstood(
        "SIGKILL while a checkpoint is replaced", lost="nothing: the steps since the last checkpoint are done again"
    )


@pytest.mark.soak
def test_a_kill_before_any_file_operation_of_a_save_loses_nothing(make_config, whole_run, withstood):
    """Each of them in turn, from the first file of step 3's checkpoint to the end of step 4's."""
    survived = 0
    for number in range(10_000):
        config = config_of(make_config, f"killed-{number}", "tppo", train={"steps": 4})
        seen = []

        def kill_at(event, path, seen=seen, number=number):
            if "/.step-000003" in path or "/step-000003" in path or seen:
                seen.append(event)
            return len(seen) == number + 1

        status = train_in_child(config, kill_at=kill_at)
        if status == WHOLE:
            break
        assert status == KILLED
        whole = config.model_copy(update={"train": config.train.model_copy(update={"steps": 6})})
        resume_to_the_end(whole)
        assert_same_run(config.output, whole_run(make_config))
        assert not leftovers(config.output)
        shutil.rmtree(config.output)
        survived += 1
    assert survived > 20
    withstood(
        "SIGKILL before a file operation of a save, each in turn",
        times=survived,
        lost="nothing: the steps since the last checkpoint are done again",
    )
