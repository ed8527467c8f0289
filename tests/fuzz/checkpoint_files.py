"""Checkpoints: every file of one, changed and with a manifest that fits, so that reading goes on past the checksums;
among them pickles that would write a file if they were executed, and names that lead out of the folder."""

import functools
import io
import json
import pickle
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzz.mutations import BYTE_CHANGES, PATHS, Bytes, bytes_changed, hostile_text, json_text, one_or_two
from tests.fuzz.oracle import CANARY
from tests.fuzz.reader import Reader
from tppo.checkpoints.content import restore, save_checkpoint
from tppo.checkpoints.manifest import _checksum, checksums, read_manifest
from tppo.checkpoints.store import chosen_checkpoint, newest_usable
from tppo.config import RunConfig
from tppo.data.problem import Problem
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import new_qwen2
from tppo.rollout.rows import Row
from tppo.state import TrainingState, new_state

FOLDER = "checkpoints/step-000000"


def fresh_state() -> TrainingState:
    tokenizer = character_tokenizer()
    policy = new_qwen2(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, layers=1,
        hidden_size=8, heads=2, kv_heads=1, intermediate_size=8, max_tokens=64, seed=1,
    )  # fmt: skip
    return new_state(policy, tokenizer, RunConfig.model_validate({"model": {"path": "x"}}))


@functools.cache
def whole_checkpoint() -> dict[str, bytes]:
    """Of a run, by name in its folder. One row carries over."""
    state = fresh_state()
    state.carried = [Row(row=0, group=0, problem=Problem("1+1=", "2"), prompt_ids=[1, 2], response_ids=[3],
                         log_probs=[-0.5], values=[0.25])]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder), state, algorithm="tppo", offsets={}, time_s=1.0)
        return {f"{FOLDER}/{f.relative_to(path).as_posix()}": f.read_bytes() for f in path.rglob("*") if f.is_file()}


class Canary:
    """Writes a file when it is unpickled by a reader that executes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (CANARY, "w"))


def torch_zip(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def with_pickle(content: bytes, own: bytes) -> bytes:
    """torch's archive with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(file, "w") as after:
        for name in before.namelist():
            after.writestr(name, own if name.endswith("data.pkl") else before.read(name))
    return file.getvalue()


def archive(name: str, content: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as own:
        own.writestr(name, content)
    return file.getvalue()


def tensors(header: Any, data: bytes) -> bytes:
    """A safetensors file with any header."""
    text = json_text(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def hostile_torch(content: bytes) -> Bytes:
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
        | st.sampled_from((torch.zeros(3), torch.tensor([1], dtype=torch.int64), torch.empty(0))),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
            ("generator", "rollout_generator", "global", "python", "numpy", "torch", "state", "param_groups",
             "policy_optimizer", "value_optimizer")), inner, max_size=5),
        max_leaves=8,
    )  # fmt: skip
    evil = pickle.dumps(Canary())
    tricks = (evil, with_pickle(content, evil), with_pickle(content, pickle.dumps({"generator": Canary()})),
              torch_zip({"generator": torch.zeros(2)}), archive("../../x/data.pkl", evil), archive("a/data.pkl", evil),
              archive("/tmp/data.pkl", evil), archive("a/data.pkl", b"\x80\x02]" + b"(" * 5000), b"PK\x03\x04",
              archive("a/data/0", bytes(50_000_000)))  # fmt: skip
    return st.one_of(
        st.sampled_from(tricks), st.builds(torch_zip, values), st.builds(bytes_changed, st.just(content), BYTE_CHANGES)
    )


def hostile_tensors(content: bytes) -> Bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    return st.one_of(
        hostile_text(header, json_text).map(lambda text: struct.pack("<Q", len(text)) + text + data),
        st.builds(bytes_changed, st.just(content), BYTE_CHANGES),
        st.builds(lambda n: struct.pack("<Q", n) + content[8:], st.integers(0, 2**64 - 1)),
        st.just(tensors({"prompt_ids": {"dtype": "I64", "shape": [2**40], "data_offsets": [0, 2**43]}}, b"")),
    )


def hostile_checkpoint() -> dict[str, Bytes]:
    hostile: dict[str, Bytes] = {}
    for name, content in whole_checkpoint().items():
        if name.endswith(".pt"):
            hostile[name] = hostile_torch(content)
        elif name.endswith(("rows.safetensors", "value_model.safetensors")):
            hostile[name] = hostile_tensors(content)
        elif name.endswith(("progress.json", "manifest.json")):
            hostile[name] = hostile_text(json.loads(content), json_text)
    return hostile


@functools.cache
def shared_state() -> list[TrainingState]:
    return [fresh_state()]


def with_checksums(checkpoint: Path) -> None:
    """As whoever means to deceive would write the manifest: its checksums fit."""
    values = {**json.loads((checkpoint / "manifest.json").read_bytes()), "files": checksums(checkpoint)}
    values.pop("checksum", None)
    (checkpoint / "manifest.json").write_text(json.dumps({**values, "checksum": _checksum(values)}))


def restored(folder: Path) -> None:
    (state,) = shared_state()
    restore(state, folder / FOLDER)


def found(folder: Path) -> None:
    newest_usable(folder)
    chosen_checkpoint(folder, "best")
    read_manifest(folder / FOLDER)


def fitting_manifest(changes: dict[str, Any]) -> bytes:
    values = {**json.loads(whole_checkpoint()[f"{FOLDER}/manifest.json"]), **changes}
    values.pop("checksum")
    return json.dumps({**values, "checksum": _checksum(values)}).encode()


NAMES = st.sampled_from([path for path in PATHS if "\0" not in path] + ["a\0b", "\ud800", "random.pt"])
JSON_VALUES = st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.text(max_size=5) | st.lists(st.integers())
SIZES = st.lists(JSON_VALUES, max_size=3) | JSON_VALUES
MANIFESTS = st.builds(
    fitting_manifest,
    st.one_of(
        st.fixed_dictionaries({"files": st.dictionaries(NAMES, SIZES, max_size=3) | JSON_VALUES}),
        st.dictionaries(st.sampled_from(("step", "offsets", "model", "accuracy", "toolkit", "schema", "algorithm")),
                        JSON_VALUES | st.dictionaries(NAMES, SIZES, max_size=2), max_size=4),
    ),
)  # fmt: skip

CHECKPOINTS = st.deferred(lambda: one_or_two(whole_checkpoint(), hostile_checkpoint()))

READERS = (
    Reader("checkpoint, restored", CHECKPOINTS, restored, share=1.5),
    Reader("checkpoint, found", CHECKPOINTS, found),
    Reader("checkpoint manifest that fits", st.builds(
        lambda own: {**whole_checkpoint(), f"{FOLDER}/manifest.json": own}, MANIFESTS), found),
)  # fmt: skip
