"""Checkpoints that somebody made to do harm: their checksums fit, and they lead elsewhere or hold code."""

import os
import pickle
import shutil

import pytest
import torch

from profiling.errors import ConfigError, DataError
from profiling.writer import RunWriter
from tests.tppo.test_checkpoints import rewrite_manifest
from tppo.checkpoints.manifest import Manifest, checksums, read_manifest, verified, write_manifest
from tppo.checkpoints.store import check_the_run_is_as_long, newest_usable
from tppo.models.policy import load_policy


class Writes:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run that ends with it: three small files and a manifest that fits."""
    folder = tmp_path / "run" / "checkpoints" / "step-000001"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "config.json").write_text("{}")
    (folder / "rows.safetensors").write_bytes(b"rows")
    write_manifest(
        folder,
        Manifest(toolkit="0", algorithm="tppo", model={}, step=1, accuracy=None, offsets={}, files=checksums(folder)),
    )
    return folder


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../secret", "policy/../../x", "..", "", ".", "a\0b"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(checkpoint, name):
    rewrite_manifest(checkpoint, files={name: [0, 0]})
    with pytest.raises(DataError, match=r"manifest.json is not a manifest: files names .* outside of the checkpoint"):
        verified(checkpoint)


@pytest.mark.parametrize("name", ["/etc/passwd", "../victim.txt", "summary.json", "x/../trace.jsonl"])
def test_a_manifest_cannot_have_another_file_cut_back(checkpoint, tmp_path, name):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    rewrite_manifest(checkpoint, offsets={name: 0})
    with pytest.raises(DataError, match=r"offsets names .*, which is not one of trace.jsonl, metrics.jsonl"):
        newest_usable(checkpoint.parent.parent, to_resume=True)
    with pytest.raises(DataError, match="not a file of this run that grows"):
        RunWriter.resume(checkpoint.parent.parent, offsets={name: 0}, last_step=1)
    assert victim.read_text() == "precious"


def test_a_trace_that_is_a_link_is_not_cut_back(checkpoint, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    run = checkpoint.parent.parent
    (run / "trace.jsonl").symlink_to(victim)
    with pytest.raises(DataError, match=r"trace.jsonl: not a file of this run that grows; it cannot be resumed"):
        RunWriter.resume(run, offsets={"trace.jsonl": 0}, last_step=1)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"files": []}, "files and offsets are not tables"),
        ({"files": {"rows.safetensors": 4}}, "files: 'rows.safetensors' has no size and checksum"),
        ({"files": {"rows.safetensors": [4, True]}}, "files: 'rows.safetensors' has no size and checksum"),
        ({"offsets": {"trace.jsonl": -1}}, "offsets: 'trace.jsonl' has -1, which is no length"),
        ({"step": "1"}, "step is '1', which is no step"),
        ({"model": None}, "model is not a table"),
        ({"accuracy": "high"}, "accuracy is 'high', which is no number"),
        ({"more": 1}, "more"),
    ],
)
def test_a_manifest_of_other_kinds_of_values_is_one_line(checkpoint, changes, fault):
    rewrite_manifest(checkpoint, **changes)
    with pytest.raises(DataError, match=r"manifest.json is not a manifest: ") as error:
        read_manifest(checkpoint)
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_links_and_pipes_in_a_checkpoint_are_refused_and_nothing_waits_for_them(checkpoint, tmp_path):
    verified(checkpoint)
    secret = tmp_path / "secret.txt"
    secret.write_text("rows")
    for name, make in (
        ("policy/tokenizer.json", lambda path: path.symlink_to(secret)),
        ("policy/folder", lambda path: path.symlink_to(tmp_path)),
        ("pipe", os.mkfifo),
    ):
        make(checkpoint / name)
        with pytest.raises(DataError, match=f"{name} is a link or a device; a checkpoint has plain files only"):
            verified(checkpoint)
        (checkpoint / name).unlink()
    verified(checkpoint)


def test_a_linked_file_of_the_right_content_is_refused_too(checkpoint, tmp_path):
    shutil.move(checkpoint / "rows.safetensors", tmp_path / "rows")
    (checkpoint / "rows.safetensors").symlink_to(tmp_path / "rows")
    with pytest.raises(DataError, match=r"rows.safetensors is a link"):
        verified(checkpoint)


def test_a_run_is_as_long_as_its_files_and_no_others(checkpoint):
    run = checkpoint.parent.parent
    (run / "trace.jsonl").write_text("12345")
    rewrite_manifest(checkpoint, offsets={"trace.jsonl": 5})
    check_the_run_is_as_long(run, read_manifest(checkpoint))
    rewrite_manifest(checkpoint, offsets={"trace.jsonl": 6})
    with pytest.raises(DataError, match=r"trace.jsonl is shorter than at step 1 \(6 bytes\)"):
        check_the_run_is_as_long(run, read_manifest(checkpoint))


def test_weights_that_are_a_pickle_with_code_are_refused_in_one_line(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").unlink()
    mark = tmp_path / "executed"
    size = (tiny_model / "model.safetensors").stat().st_size  # of fewer bytes nothing is read at all
    padded = {"weight": Writes(mark), "padding": bytes(size)}
    with (model / "pytorch_model.bin").open("wb") as file:
        pickle.dump(padded, file, protocol=2)
    with pytest.raises(ConfigError, match=r"a pickle of more than tensors, which is not executed") as error:
        load_policy(str(model))
    assert "\n" not in str(error.value)
    torch.save(padded, model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"a pickle of more than tensors, which is not executed"):
        load_policy(str(model))
    assert not mark.exists()


def test_code_beside_a_model_is_not_executed_unless_it_is_trusted(tiny_model, tmp_path):
    model, mark = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(tiny_model, model)
    (model / "config.json").write_text(
        '{"model_type": "ours", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}'
    )
    (model / "code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    with pytest.raises(ConfigError, match=r"set model.trust_remote_code = true if you trust its author"):
        load_policy(str(model))
    assert not mark.exists()
