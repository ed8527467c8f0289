"""What a run must survive, or refuse, before it costs anybody a day."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest

from profiling.errors import ConfigError, DataError, RunError
from profiling.reader import Run
from profiling.settings import to_toml
from tests.waiting import until
from tppo.checkpoints.manifest import MANIFEST, checksums, read_manifest, write_manifest
from tppo.checkpoints.store import checkpoints_of
from tppo.cli import main
from tppo.rewards.final_answer import FinalAnswer
from tppo.rewards.protocol import RewardError
from tppo.start import train

ROWS = ["step", "row", "tokens", "finished", "reward"]


def failing_grades(monkeypatch, at):
    """The reward fails when it is asked for the `at`-th time, and that time only."""
    grade = FinalAnswer.grade
    asked = []

    def unreliable(reward, problems, responses):
        asked.append(len(problems))
        if len(asked) == at:
            raise RewardError("reward: service hiccup")
        return grade(reward, problems, responses)

    monkeypatch.setattr(FinalAnswer, "grade", unreliable)


@pytest.mark.parametrize("at", [1, 2, 5])  # the evaluation of step 0, value pre-training, the evaluation of step 2
def test_a_reward_that_fails_in_an_evaluation_or_before_the_first_step_leaves_a_checkpoint(
    make_config, monkeypatch, at
):
    whole = make_config("whole", train={"steps": 3})
    train(whole, show_progress=False)
    config = make_config("run", train={"steps": 3})
    with monkeypatch.context() as patched:
        failing_grades(patched, at)
        with pytest.raises(RunError, match=r"service hiccup; the checkpoint of step \d holds .* go on with --resume"):
            train(config, show_progress=False)
    train(config, resume=True, show_progress=False)
    one, other = Run(whole.output), Run(config.output)
    assert one.rollouts[ROWS].equals(other.rollouts[ROWS])
    assert one.metrics["actor/pg_loss"].equals(other.metrics["actor/pg_loss"])
    assert other.metrics.step.tolist() == [0, 1, 2, 3]
    assert set(one.metrics) == set(other.metrics)
    assert other.metrics.query("step > 0")["guards/kl_blow_up"].notna().all()  # the step's row is as whole as others
    accuracies = [run.metrics["val/accuracy"].dropna().tolist() for run in (one, other)]
    assert accuracies[1] == (accuracies[0] if at < 5 else accuracies[0][:1])  # that of step 2 is not made up for


@pytest.fixture
def done(make_config):
    config = make_config("done", train={"steps": 3, "checkpoint_every": 1}, evaluation={"every": 1})
    train(config, show_progress=False)
    return config


def error_of(capsys, *words):
    code = main([*map(str, words)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


def evaluated_step(capsys, *words):
    assert main(["eval", *map(str, words), "--samples", "1", "--problems", "3", "--json"]) == 0
    got = capsys.readouterr()
    return json.loads(got.out)["step"], got.err


def test_eval_takes_the_newest_checkpoint_that_is_whole(done, capsys):
    weights = done.output / "checkpoints" / "step-000003" / "policy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    step, warning = evaluated_step(capsys, done.output)
    assert step == 2
    assert "model.safetensors is damaged" in warning
    train(done, resume=True, show_progress=False)  # sets the damaged one aside, and trains step 3 again
    capsys.readouterr()
    assert (done.output / "checkpoints" / "step-000003.unusable").is_dir()
    assert evaluated_step(capsys, done.output) == (3, "")
    best = evaluated_step(capsys, done.output, "--checkpoint", "best")[0]
    accuracies = {int(path.name[5:]): read_manifest(path).accuracy for path in checkpoints_of(done.output)}
    assert accuracies[best] == max(accuracies.values())


def test_planted_things_in_a_checkpoint_folder_change_nothing(done):
    newest = done.output / "checkpoints" / "step-000003"
    (newest / "optimizers").mkdir()
    (done.output / "checkpoints" / "step-000099").symlink_to(done.output / "checkpoints" / "step-000001")
    longer = done.model_copy(update={"train": done.train.model_copy(update={"steps": 4})})
    train(longer, resume=True, show_progress=False)
    assert Run(done.output).metrics.step.tolist() == [0, 1, 2, 3, 4]


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_is_not_executed_even_where_its_checksum_is_right(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    newest = done.output / "checkpoints" / "step-000003"
    (newest / "random.pt").write_bytes(pickle.dumps(Evil()))
    manifest = read_manifest(newest)
    (newest / MANIFEST).unlink()
    write_manifest(newest, type(manifest)(**{**vars(manifest), "files": checksums(newest)}))
    with pytest.raises(DataError, match=r"optimizers.pt or random.pt holds more than .* not ours, and not executed"):
        train(done, resume=True, show_progress=False)
    assert not (tmp_path / "executed").exists()


def test_what_a_resumed_run_must_not_change(done, make_config):
    def changed(section, **values):
        own = getattr(done, section).model_copy(update=values)
        return done.model_copy(update={section: own})

    for section, values, message in (
        ("model", {"dtype": "bfloat16"}, r"model\.dtype: a resumed run keeps the settings"),
        ("model", {"lora_rank": 4}, r"model\.lora_rank: a resumed run keeps"),
        ("train", {"steps": 2}, r"train\.steps = 2: .* has done 3; raise it"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(changed(section, **values), resume=True, show_progress=False)
    trace = done.output / "trace.jsonl"
    trace.write_text(trace.read_text().replace('"engines":1', '"engines":2', 1))
    with pytest.raises(ConfigError, match=r"counts 2 engines of 1, and there are 1 engine of 1 now; go on in another"):
        train(done, resume=True, show_progress=False)


def test_words_that_would_write_or_train_by_mistake_are_refused(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config("run", train={"steps": 1})
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config.model_dump(mode="json")))
    assert error_of(capsys, "train", file, "--output", "") == (
        2, "tppo: --output: names nothing; an empty word would be the current directory",
    )  # fmt: skip
    assert error_of(capsys, "train", file, "--output", ".") == (
        2, "tppo: --output: names the current directory; give the run a directory of its own",
    )  # fmt: skip
    assert error_of(capsys, "train", file, "--gpu", "H200")[1].endswith(
        "belongs to --check; add it, or leave --gpu out"
    )
    assert "no such directory" in error_of(capsys, "train", file, "--model.path", "/nope/model")[1]
    assert "too long for a file" in error_of(capsys, "train", file, "--output", "x" * 300)[1]
    targets = '["q_proj", "nope"]'
    line = error_of(capsys, "train", file, "--model.lora_rank", "2", "--model.lora_targets", targets)[1]
    assert "no layer is named 'nope'" in line
    data = tmp_path / "half.jsonl"
    data.write_text('{"problem": "a1b2=", "answer": "3"}\n{"problem": "x\\ud800", "answer": "1"}\n')
    words = ["--data.task", "dataset", "--data.path", str(data), "--evaluation.problems", "1"]
    code, line = error_of(capsys, "train", file, *words)
    assert (code, "row 2: holds half of a surrogate pair" in line) == (2, True)
    assert not config.output.exists()
    assert not (tmp_path / "trace.jsonl").exists()
    assert error_of(capsys, "eval", "/nope/model", "--data", "arithmetic", "--output", "ev")[0] == 2
    assert not (tmp_path / "ev").exists()


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed(make_config, tmp_path, withstood):
    config = make_config("run", train={"steps": 100_000})
    (tmp_path / "c.toml").write_text(to_toml(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tppo"]
    launcher = subprocess.Popen(
        [*command, "train", str(tmp_path / "c.toml")], stdout=-3, stderr=(tmp_path / "err").open("w")
    )
    metrics = config.output / "metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, "no step")
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    until(lambda: Run(config.output).trailer is not None, "the run does not end")
    assert Run(config.output).trailer["status"] == "interrupted"
    assert list((config.output / "checkpoints").glob("step-*"))
    withstood("SIGKILL of the launcher of two ranks")
