"""What is in a checkpoint, which ones are kept, and what happens to those that are damaged or foreign."""

import json
import os
import random
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from profiling.errors import ConfigError, DataError, RunError
from tests.tppo import forked
from tests.tppo.killing import assert_same_run, train_seeded
from tppo.checkpoints.content import restore, save_checkpoint
from tppo.checkpoints.folders import put_in_place, tidy
from tppo.checkpoints.manifest import _checksum, checksums, read_manifest
from tppo.checkpoints.random_state import global_random_state, set_global_random_state
from tppo.checkpoints.store import checkpoints_of, prune_checkpoints
from tppo.checkpoints.stored_rows import RowTable, rows_of
from tppo.cli import main
from tppo.data.problem import Problem
from tppo.evaluation.graded import Graded
from tppo.models.policy import load_policy
from tppo.rollout.rows import Row
from tppo.start import train
from tppo.state import new_state

DENSE = {"steps": 4, "checkpoint_every": 1, "keep_last": 0}


def names(run):
    return [path.name for path in checkpoints_of(run)]


def content_of(folder: Path):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the run that all of these tests start from is made, once."""
    return tmp_path_factory.mktemp("kept") / "whole"


@pytest.fixture
def whole(make_config, kept):
    """A finished run of four steps with four checkpoints. Not to be changed."""
    if not kept.exists():
        train_seeded(make_config("whole", train=DENSE).model_copy(update={"output": kept}))
    return kept


@pytest.fixture
def config(make_config, whole):
    """A copy of that run, to break."""
    config = make_config("run", train=DENSE)
    shutil.copytree(whole, config.output)
    return config


def resume(config, capsys):
    """Resume; the lines on standard error."""
    capsys.readouterr()
    train_seeded(config, resume=True)
    return capsys.readouterr().err.splitlines()


def rewrite_manifest(checkpoint, **changes):
    """As another toolkit would have written it: its checksum fits."""
    path = checkpoint / "manifest.json"
    values = {**json.loads(path.read_bytes()), **changes}
    values.pop("checksum")
    path.write_text(json.dumps({**values, "checksum": _checksum(values)}))


def damage(checkpoint, fault):
    weights = checkpoint / "policy" / "model.safetensors"
    if fault == "a flipped bit":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 16
        weights.write_bytes(content)
    elif fault == "a truncated file":
        os.truncate(checkpoint / "optimizers.pt", 1000)
    elif fault == "a missing file":
        (checkpoint / "rows.safetensors").unlink()
    elif fault == "no manifest":
        (checkpoint / "manifest.json").unlink()
    elif fault == "a flipped bit in the manifest":
        path = checkpoint / "manifest.json"
        path.write_text(path.read_text().replace('"schema": 1', '"schema": 3'))
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()


FAULTS = {
    "a flipped bit": "model.safetensors is damaged: its checksum differs",
    "a truncated file": "optimizers.pt is damaged: 1000 bytes, not ",
    "a missing file": "rows.safetensors is missing",
    "no manifest": "manifest.json is missing",
    "a flipped bit in the manifest": "manifest.json is damaged: its checksum differs",
    "an empty folder": "manifest.json is missing",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(config, whole, capsys, fault, withstood):
    damage(config.output / "checkpoints" / "step-000004", fault)
    (line,) = resume(config, capsys)
    assert line.startswith("tppo: ")
    assert "step-000004/" in line
    assert FAULTS[fault] in line
    assert line.endswith("; going on from step-000003")
    assert_same_run(config.output, whole)
    assert names(config.output) == ["step-000001", "step-000002", "step-000003", "step-000004"]
    assert (config.output / "checkpoints" / "step-000004.unusable").is_dir()  # put aside, not deleted
    withstood("newest checkpoint damaged", lost="nothing: the steps since the last checkpoint are done again")


def test_two_damaged_checkpoints_fall_back_twice_and_two_lines_say_so(config, whole, capsys, withstood):
    for number, fault in ((4, "a flipped bit"), (3, "a missing file")):
        damage(config.output / "checkpoints" / f"step-00000{number}", fault)
    first, second = resume(config, capsys)
    assert "step-000004" in first
    assert "step-000003" in second
    assert_same_run(config.output, whole)
    withstood("two checkpoints damaged", lost="nothing: the steps since the last checkpoint are done again")


def test_when_none_is_usable_all_are_named_and_nothing_changes(config):
    for checkpoint in checkpoints_of(config.output):
        damage(checkpoint, "a truncated file")
    before = content_of(config.output)
    with pytest.raises(DataError, match="has no usable checkpoint") as error:
        train(config, resume=True, show_progress=False)
    assert all(f"step-00000{number}/optimizers.pt is damaged" in str(error.value) for number in range(1, 5))
    assert "\n" not in str(error.value)
    assert content_of(config.output) == before


def test_a_run_whose_trace_lost_its_end_goes_on_from_a_checkpoint_before_the_loss(config, whole, capsys, withstood):
    """As after a power cut on a file system that lost more than it was told to keep."""
    offset = read_manifest(config.output / "checkpoints" / "step-000002").offsets["trace.jsonl"]
    os.truncate(config.output / "trace.jsonl", offset)
    lines = resume(config, capsys)
    assert ["trace.jsonl is shorter than at step" in line for line in lines] == [True, True]
    assert lines[0].endswith("going on from step-000002")
    assert_same_run(config.output, whole)
    withstood("end of the trace lost", lost="nothing: the steps since the last checkpoint are done again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schema": 99, "toolkit": "9.1.0"},
            r"a checkpoint of schema 99 \(tppo 9.1.0\), and this tppo reads schema 1",
        ),
        ({"algorithm": "ppo"}, "a checkpoint of algorithm ppo, and the run trains with tppo"),
        ({"model": {"architecture": "LlamaForCausalLM"}}, "another model: architecture is LlamaForCausalLM"),
    ],
)
def test_a_foreign_checkpoint_is_refused_in_one_line_before_anything_changes(config, changes, message):
    rewrite_manifest(checkpoints_of(config.output)[-1], **changes)
    before = content_of(config.output)
    with pytest.raises(ConfigError, match=message) as error:
        train(config, resume=True, show_progress=False)
    assert "\n" not in str(error.value)
    assert content_of(config.output) == before


def test_a_checkpoint_of_a_larger_model_in_this_run_is_refused(config, make_config, tmp_path):
    from tppo.data.tokenizer import character_tokenizer
    from tppo.models.policy import new_qwen2, save_policy

    tokenizer = character_tokenizer()
    large = new_qwen2(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        layers=3, hidden_size=32, heads=2, kv_heads=1, intermediate_size=48, max_tokens=200, seed=1,
    )  # fmt: skip
    save_policy(large, tokenizer, tmp_path / "large")
    other = make_config("other", model={"path": str(tmp_path / "large")}, train={"steps": 1})
    train(other, show_progress=False)
    shutil.copytree(other.output / "checkpoints" / "step-000001", config.output / "checkpoints" / "step-000009")
    rewrite_manifest(config.output / "checkpoints" / "step-000009", offsets={})
    with pytest.raises(ConfigError, match="step-000009: a checkpoint of another model: parameters is"):
        train(config, resume=True, show_progress=False)


def test_resuming_what_is_no_run_or_has_no_checkpoint_is_one_line(config, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    shutil.rmtree(config.output / "checkpoints")
    for directory, message in ((tmp_path / "empty", "no such file"), (tmp_path / "nowhere", "no such file"),
                               (config.output, "has no checkpoint to resume from")):  # fmt: skip
        capsys.readouterr()
        assert main(["train", "--resume", str(directory)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_directory_that_became_read_only_keeps_its_checkpoints(config, tmp_path, withstood):
    """Root may write anywhere: then a user without rights tries, in a place that everyone can enter."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        shutil.copytree(config.output, run)
        for path in (Path(place), run, *run.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = content_of(run)
        longer = config.model_copy(update={"output": run, "train": config.train.model_copy(update={"steps": 6})})
        status, error = as_nobody(lambda: train(longer, resume=True, show_progress=False), tmp_path / "error")
        for path in (Path(place), run, *run.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert (status, error.count("\n")) == (1, 1), error
        assert f"RunError: {run}: cannot be resumed in place: Permission denied" in error
        assert content_of(run) == before
    withstood("run directory became read-only", lost="nothing: the steps since the last checkpoint are done again")


def as_nobody(work, error: Path):
    """Exit status and standard error of `work` in a process that has no rights."""

    def without_rights():
        with error.open("wb") as file:
            os.dup2(file.fileno(), 2)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            work()
        except BaseException as fault:
            os.write(2, f"{type(fault).__name__}: {fault}\n".encode())
            raise SystemExit(1) from fault

    child = forked.start(without_rights)
    child.join()
    return child.exitcode, error.read_text()


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(make_config, withstood):
    """A file-size limit stands for the full disk."""
    config = make_config("run", train={"steps": 2, "checkpoint_every": 1})
    train_seeded(config)
    before = content_of(config.output / "checkpoints")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    largest = max(path.stat().st_size for path in before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, unlimited[1]))
    try:
        with pytest.raises(RunError, match=r"step-000003: the checkpoint cannot be written: .*make room") as error:
            train(make_config("run", train={"steps": 4, "checkpoint_every": 1}), resume=True, show_progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert content_of(config.output / "checkpoints") == before
    train(make_config("run", train={"steps": 4, "checkpoint_every": 1}), resume=True, show_progress=False)
    assert names(config.output)[-1] == "step-000004"
    withstood("full disk in a save", lost="nothing: the steps since the last checkpoint are done again")


def test_a_checkpoint_that_fails_does_not_take_the_one_it_would_replace(config, monkeypatch):
    import tppo.checkpoints.content as content

    state = state_of(config)
    target = checkpoints_of(config.output)[-1]
    before = content_of(target)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(content, "write_manifest", full)
    with pytest.raises(RunError, match="No space left on device"):
        save_checkpoint(config.output, state, algorithm="tppo", offsets={}, time_s=0.0)
    assert content_of(target) == before
    assert not list(target.parent.glob(".*"))


def state_of(config, name=None):
    checkpoint = config.output / "checkpoints" / name if name else checkpoints_of(config.output)[-1]
    policy, tokenizer = load_policy(str(checkpoint / "policy"))
    state = new_state(policy, tokenizer, config)
    restore(state, checkpoint)
    return state


def graded(mean):
    """Ten problems, so many right."""
    right = np.arange(10)[:, None] < round(10 * mean)
    return Graded(np.ones((10, 1), dtype=int), right | True, ~right & False, right, [[None]] * 10)


def test_the_last_ones_and_the_best_one_are_kept(make_config, monkeypatch):
    """Accuracies 0.1, 0.9, 0.3, ... at steps 1, 2, 3: step 2 stays beside the last two."""
    import tppo.trainer as trainer

    means = iter([0.0, 0.1, 0.9, 0.3, 0.2, 0.4, 0.3])
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: graded(next(means)))
    config = make_config("run", train={"steps": 6, "checkpoint_every": 1, "keep_last": 2}, evaluation={"every": 1})
    train(config, show_progress=False)
    assert names(config.output) == ["step-000002", "step-000005", "step-000006"]
    assert read_manifest(checkpoints_of(config.output)[0]).accuracy == 0.9


def test_a_best_evaluation_between_two_checkpoints_is_saved_too(make_config, monkeypatch):
    import tppo.trainer as trainer

    means = iter([0.5, 0.4, 0.6, 0.6, 0.1, 0.2, 0.3])  # of steps 0 to 6; a tie is no new best
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: graded(next(means)))
    options = {"train": {"steps": 6, "checkpoint_every": 5, "keep_last": 1}, "evaluation": {"every": 1}}
    config = make_config("run", **options)
    train(config, show_progress=False)
    assert names(config.output) == ["step-000002", "step-000006"]


@pytest.mark.parametrize(("keep_best", "number"), [(True, 1), (False, 0), (2, 2)])
def test_keep_best_is_a_number_or_a_word(make_config, keep_best, number):
    assert make_config("run", train={"keep_best": keep_best}).train.keep_best == number


def test_pruning_keeps_what_was_just_written_and_counts_no_later_step(config):
    first, second, *_ = checkpoints_of(config.output)
    prune_checkpoints(config.output, second, keep_last=1, keep_best=0)
    assert names(config.output) == ["step-000002", "step-000003", "step-000004"]
    assert not first.exists()
    assert not list(second.parent.glob(".*"))


def test_what_a_kill_left_is_cleared_and_a_replaced_checkpoint_comes_back(tmp_path):
    for name in (".step-000001.tmp", ".step-000001.pruned", ".step-000002.old", ".step-000003.old", "step-000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    assert (tmp_path / "step-000003" / "file").read_text() == "step-000003"


def test_a_folder_replaces_another_and_every_file_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        "tppo.checkpoints.folders.os.fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}"))
    )
    (tmp_path / ".new.tmp" / "inner").mkdir(parents=True)
    (tmp_path / ".new.tmp" / "inner" / "file").write_text("new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("old")
    put_in_place(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "inner" / "file").read_text() == "new"
    own = tmp_path / ".new.tmp"
    assert synced == [str(path) for path in (own / "inner", own / "inner" / "file", own, tmp_path)]


def test_what_a_checkpoint_refers_to_is_on_the_disk_before_it(make_config, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    config = make_config("run", train={"steps": 1})
    train(config, show_progress=False)
    first = next(place for place, path in enumerate(synced) if "/checkpoints/" in path)
    for name in ("trace.jsonl", "metrics.jsonl", "rollouts", "engine"):
        assert str(config.output / name) in synced[:first], name
    assert synced[first:].index(str(config.output / "checkpoints")) > 10  # the rename, after every file


def test_a_checksum_is_what_zlib_says(tmp_path):
    # CRC-32 of the nine bytes "123456789" is its well-known check value, cbf43926
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("123456789")
    assert checksums(tmp_path) == {"a/file": [9, 0xCBF43926]}


def test_every_global_random_state_comes_back_without_executing_anything(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()  # noqa: NPY002

    np.random.randn()  # noqa: NPY002 - leaves a second normal draw waiting
    torch.save(global_random_state(), tmp_path / "state.pt")
    expected = [draw() for _ in range(3)]
    draw()
    set_global_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_a_row_in_two_places_is_one_row_after_storing():
    first = Row(3, 1, Problem("a=", "1"), [1, 2], [5, 6], log_probs=[-0.1, -1 / 3], values=[0.5], policy_version=7)
    second = Row(4, 1, Problem("b=", "2", special_tokens=False), [9], finished=True, reward=1.0, correct=True)
    table = RowTable()
    places = [table.add([first, second]), table.add([first]), table.add([])]
    assert places == [[0, 1], [0], []]
    rows = rows_of(json.loads(json.dumps(table.records())), table.tensors(), vocabulary=1000)
    assert rows == [first, second]
    assert rows_of([], RowTable().tensors(), vocabulary=1) == []
