"""A run that was really trained, its checkpoint and its model: what `tppo train --resume`, `tppo eval` and
`tppo export --format huggingface` read, with hostile files among it."""

import contextlib
import functools
import json
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.checkpoint_files import FOLDER as UNTRAINED
from tests.fuzz.checkpoint_files import hostile_tensors, hostile_torch, with_checksums
from tests.fuzz.commands import command
from tests.fuzz.foreign_files import PROBLEMS
from tests.fuzz.mutations import Bytes, hostile_table, hostile_text, json_text, lines_text, one_or_two, toml_text
from tests.fuzz.reader import Reader
from tests.fuzz.settings_files import texts
from tests.tppo.test_value_source import save_reward_model
from tppo.config import RunConfig
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import load_policy, new_qwen2, save_policy
from tppo.models.value_source import value_model_of
from tppo.start import train

RUN = "run"
FOLDER = UNTRAINED.replace("000000", "000001")
PLACE = tempfile.TemporaryDirectory(prefix="fuzz-trained-")
"""Of the model that the run was trained from: its configuration names it."""
QUICK = ("--samples", "1", "--problems", "2", "--max-response-tokens", "4")


@functools.cache
def model() -> dict[str, bytes]:
    """Of one layer, by name in its folder, which is in PLACE."""
    tokenizer = character_tokenizer()
    policy = new_qwen2(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, layers=1,
        hidden_size=8, heads=2, kv_heads=1, intermediate_size=8, max_tokens=64, seed=1,
    )  # fmt: skip
    folder = Path(PLACE.name) / "model"
    save_policy(policy, tokenizer, folder)
    return files_of(folder)


def files_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {
        f"{prefix}{file.relative_to(folder).as_posix()}": file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@functools.cache
def trained() -> dict[str, bytes]:
    """A run of one step, with its checkpoint."""
    model()
    output = Path(PLACE.name) / "run"
    config = RunConfig.model_validate(
        {
            "output": str(output), "model": {"path": str(Path(PLACE.name) / "model")},
            "data": {"median_steps": 1, "sigma": 0.3, "max_steps": 2},
            "rollout": {"prompts_per_step": 4, "max_response_tokens": 8, "window": 4},
            "value": {"pretrain_rows": 4, "pretrain_epochs": 1}, "train": {"steps": 1, "mini_batches": 1},
            "evaluation": {"every": 0}, "profile": {"sampler": False},
        }
    )  # fmt: skip
    train(config, show_progress=False)
    return files_of(output, f"{RUN}/")


def hostile(files: dict[str, bytes]) -> dict[str, Bytes]:
    """Name -> its hostile contents, by the kind of file."""
    found: dict[str, Bytes] = {}
    for name, content in files.items():
        if name.endswith(".json"):
            found[name] = hostile_text(json.loads(content), json_text)
        elif name.endswith(".jsonl"):
            found[name] = hostile_text([json.loads(line) for line in content.splitlines()], lines_text)
        elif name.endswith(".parquet"):
            found[name] = hostile_table(content)
        elif name.endswith(".pt"):
            found[name] = hostile_torch(content)
        elif name.endswith(".safetensors"):
            found[name] = hostile_tensors(content)
    return found


def hostile_run(only: str = "") -> st.SearchStrategy[dict[str, bytes]]:
    """The trained run, with one or two hostile files whose names begin with `only`."""
    return st.deferred(
        lambda: one_or_two(
            trained(), {name: own for name, own in hostile(trained()).items() if name.startswith(f"{RUN}/{only}")}
        )
    )


def fitting(*words: str) -> Callable[[Path], None]:
    """The command, on a checkpoint whose checksums fit what is in it: reading goes on past them."""
    run = command(*words)

    def read(folder: Path) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # the manifest itself is hostile
            with_checksums(folder / RUN / FOLDER)
        run(folder)

    return read


@functools.cache
def reward_model() -> dict[str, bytes]:
    folder = Path(PLACE.name) / "reward-model"
    save_reward_model(folder)
    return files_of(folder)


def as_policy(folder: Path) -> None:
    load_policy(str(folder))


def as_value_model(folder: Path) -> None:
    model()
    policy, tokenizer = load_policy(f"{PLACE.name}/model")
    config = RunConfig.model_validate({"value": {"path": str(folder)}})
    value_model_of(config, policy, tokenizer)


def settings_of_the_run() -> Bytes:
    return hostile_text(tomllib.loads(trained()[f"{RUN}/config.toml"].decode()), toml_text)


RESUME = ("train", "--resume", f"{{in}}/{RUN}", "--output", "{out}/on")
EVAL = ("eval", f"{{in}}/{RUN}", *QUICK)
EXPORT = ("export", f"{{in}}/{RUN}", "--format", "huggingface", "--output", "{out}/hf")

READERS = (
    Reader("tppo train --resume", hostile_run(), fitting(*RESUME, "--train.steps", "2"), share=0.2, names=(RUN,),
           writes=("manifest.json",)),
    Reader("tppo train --resume, its settings", st.deferred(lambda: st.builds(
               lambda own: {**trained(), f"{RUN}/config.toml": own}, settings_of_the_run())),
           command(*RESUME, "--train.steps", "1"), share=0.2, names=(RUN,)),
    Reader("tppo eval RUN", hostile_run(FOLDER), fitting(*EVAL), share=0.2, names=(RUN,),
           writes=("manifest.json",)),
    Reader("tppo eval --data", st.deferred(lambda: model() and texts("d.jsonl", (PROBLEMS,), lines_text)),
           command("eval", f"{PLACE.name}/model", "--data", "{in}/d.jsonl", *QUICK), share=0.2),
    Reader("tppo export huggingface", hostile_run(FOLDER), fitting(*EXPORT), share=0.2, names=(RUN,),
           writes=("manifest.json",)),
    Reader("tppo train --check, its model", st.deferred(lambda: st.builds(
               lambda own: {"m/config.json": own, "t.toml": b'model.path = "../in/m"\ndata.max_steps = 2\n'},
               hostile(model())["config.json"])),
           command("train", "{in}/t.toml", "--check", "--gpu", "H100-SXM"), share=0.2,
           names=("model.path", "m/config")),
    Reader("model directory", st.deferred(lambda: one_or_two(model(), hostile(model()))), as_policy, share=0.5),
    Reader("reward model directory", st.deferred(lambda: one_or_two(reward_model(), hostile(reward_model()))),
           as_value_model, share=0.5),
)  # fmt: skip
