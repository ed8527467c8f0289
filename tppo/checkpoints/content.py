"""What a checkpoint holds, and how it becomes a training state again.

    policy/                     the policy as a Hugging Face folder, with its tokenizer; adapters merged
        model.safetensors
    adapters.safetensors        the adapters by themselves, where there are some: resuming adds them to model.path
    value_model.safetensors     where the recipe has a value model
    value_config/               its config.json, where it started from a reward model
    proximal_policy.safetensors ppo-ewma's average of the policy
    optimizers.pt               both optimisers: moments, steps, learning rates
    optimizers/                 the same where models are sharded, safetensors of each rank
    random.pt                   both generators of the run, and every global random state
    progress.json               step, position in the data, weight updates, clock, learning-rate factor, accuracies,
                                what the guards remember, which rows carry over, are rolled out ahead, or train again
    rows.safetensors            those rows' tokens, log-probabilities and values
    manifest.json               whose it is, and the checksum of each file (tppo.checkpoints.manifest)

Where ranks write together, a model's file is several (tppo.checkpoints.weights), and policy/ has an index of them.
Nothing is executed on reading: safetensors, JSON, and torch.load with weights_only. Schedules keep nothing between
steps; the rows that carry over and their numbers are their state.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError  # its name alone, nothing is unpickled here # nosec B403
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from profiling.errors import DataError, RunError, first_line
from profiling.files import read_json
from profiling.settings import describe
from tppo.checkpoints.folders import TMP, empty_folder_for, hidden, put_in_place, remove
from tppo.checkpoints.manifest import Manifest, checksums, read_manifest, toolkit_version, write_manifest
from tppo.checkpoints.random_state import check_random_state, global_random_state
from tppo.checkpoints.shards import SHARDS, load_optimizer, load_shards, optimizers_of, save_shards
from tppo.checkpoints.store import folder_of
from tppo.checkpoints.stored_rows import RowTable, rows_of
from tppo.checkpoints.weights import load_weights, own_tensors, own_weights, part_files, read_weights, write_index
from tppo.models.lora import adapter_weights, has_adapters, load_adapters
from tppo.models.policy import architecture_of, describe_model, input_layer, save_part, save_policy
from tppo.models.value import VALUE_CONFIG, VALUE_MODEL
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.parallel.shard import is_sharded
from tppo.state import Ahead, TrainingState

ADAPTERS, MODEL = "adapters.safetensors", "model.safetensors"
POLICY, PROXIMAL, OPTIMIZERS, RANDOM = "policy", "proximal_policy.safetensors", "optimizers.pt", "random.pt"
PROGRESS, ROWS = "progress.json", "rows.safetensors"
PLAIN = (
    "step", "next_row", "policy_version", "clock_s", "accuracies", "evaluated_step", "lr_scale", "started", "guards",
)  # fmt: skip
"""Fields of the state that progress.json holds as they are."""
PICKLE = b"\x80"
"""First byte of a pickle outside of torch's archive."""
FAULTS = (
    OSError, EOFError, LookupError, AttributeError, TypeError, ValueError, RuntimeError, SafetensorError,
    UnpicklingError, CheckpointException, OverflowError, MemoryError, BadZipFile,
)  # fmt: skip
"""What reading can meet in files that are not ours."""


class Places(BaseModel):
    """Of a step that was rolled out ahead: its rows' places in the table, and the engine's records."""

    model_config = ConfigDict(strict=True)
    rows: list[int]
    records: list[dict[str, Any]]


class Progress(BaseModel):
    """What progress.json holds."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    step: NonNegativeInt
    next_row: NonNegativeInt
    policy_version: NonNegativeInt
    clock_s: float
    accuracies: list[float]
    evaluated_step: int | None
    lr_scale: float
    started: bool
    guards: dict[str, dict[str, Any]] = {}
    """Checkpoints from before there were guards know nothing of them."""
    time_s: float
    carried: list[NonNegativeInt]
    reusable: list[list[NonNegativeInt]]
    ahead: Places | None
    rows: list[dict[str, Any]]


def save_checkpoint(
    run: Path, state: TrainingState, *, algorithm: str, offsets: dict[str, int], time_s: float, ranks: Ranks = SINGLE
) -> Path:
    """Write checkpoints/step-N of the run directory: whole or absent, and one of the same step stands until then.

    `offsets`: length in bytes of the append-only files, so that resuming can discard what came after. time_s: the
    run's clock. All ranks take part: each writes its part of the weights and its shards of the optimisers, the first
    one all else. Raises RunError on all of them, and leaves the checkpoints as they were.
    """
    target = folder_of(run, state.step)
    folder = hidden(target, TMP)

    def write(part: Callable[[], object], *, here: bool = ranks.main) -> None:
        """On the ranks that are `here`; the others wait. torch and safetensors report a full disk as errors of their
        own."""

        def own() -> None:
            try:
                if here:
                    part()
            except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
                raise RunError(
                    f"{target}: the checkpoint cannot be written: {_line(error)}; is the disk full? The one before is "
                    "whole: make room and go on with --resume"
                ) from None

        ranks.everyones(own)

    def finish() -> None:
        manifest = Manifest(
            toolkit=toolkit_version(),
            algorithm=algorithm,
            model={"architecture": architecture_of(state.policy), **describe_model(state.policy)},
            step=state.step,
            accuracy=state.accuracies[-1] if state.evaluated_step == state.step else None,
            offsets=offsets,
            files=checksums(folder),
        )
        write_manifest(folder, manifest)
        put_in_place(target)

    adapters = adapter_weights(state.policy)
    try:
        write(lambda: empty_folder_for(target))
        write_policy(folder / POLICY, state, ranks, write)
        if state.value_model is not None:
            write_parts(folder / VALUE_MODEL, own_weights(state.value_model, ranks), ranks, write)
        if state.proximal is not None:
            write_parts(folder / PROXIMAL, own_tensors(state.proximal.state(), ranks), ranks, write)
        write(lambda: write_rest(folder, state, time_s, adapters))
        write(lambda: save_shards(folder / SHARDS, state), here=is_sharded(state.policy))
        write(finish)
    except RunError:
        if ranks.main:
            remove(folder)
        raise
    return target


def write_policy(path: Path, state: TrainingState, ranks: Ranks, write: Callable[..., None]) -> None:
    """A process alone leaves it to transformers, which splits a file of more than 50 GB."""
    own, alone = own_weights(state.policy, ranks), ranks.world == 1
    write(lambda: save_policy(state.policy, state.tokenizer, path, own if alone else {}))
    if not alone:
        write_parts(path / MODEL, own, ranks, write, partial(save_part, state.policy))
        write(lambda: write_index(path / MODEL))


def write_parts(
    path: Path, own: dict[str, Tensor], ranks: Ranks, write: Callable[..., None],
    save: Callable[[dict[str, Tensor], Path], None] = save_file,
) -> None:  # fmt: skip
    """Each rank its own; of more ranks than layers the last have none."""
    files = part_files(path, sum(ranks.gather(bool(own))))
    write(lambda: save(own, files[ranks.rank]), here=bool(own))


def write_rest(folder: Path, state: TrainingState, time_s: float, adapters: dict[str, Tensor]) -> None:
    """Every file but the models', the optimisers' shards and the manifest. Raises OSError, RuntimeError or
    SafetensorError."""
    if adapters:
        save_file(adapters, folder / ADAPTERS)
    if state.value_model is not None:
        backbone = state.value_model.backbone.config
        if backbone.to_diff_dict() != state.policy.config.to_diff_dict():  # it started as a reward model
            backbone.save_pretrained(folder / VALUE_CONFIG)
    if not is_sharded(state.policy):
        torch.save({name: own.state_dict() for name, _, own in optimizers_of(state)}, folder / OPTIMIZERS)
    generators = {
        "generator": state.generator.get_state(),
        "rollout_generator": state.rollout_generator.get_state(),
        "global": global_random_state(),
    }
    torch.save(generators, folder / RANDOM)
    table = RowTable()
    progress = {
        **{name: getattr(state, name) for name in PLAIN},
        "time_s": time_s,
        "carried": table.add(state.carried),
        "reusable": [table.add(batch) for batch in state.reusable],
        "ahead": None
        if state.ahead is None
        else {"rows": table.add(state.ahead.rows), "records": state.ahead.records},
    }
    (folder / PROGRESS).write_text(json.dumps({**progress, "rows": table.records()}))
    save_file(table.tensors(), folder / ROWS)


@dataclass(frozen=True)
class Restored:
    """What is not part of the training state."""

    time_s: float
    """The run's clock."""
    global_random_state: dict[str, Any]
    """To be set last: whatever is built before the first step may draw."""


def restore(state: TrainingState, checkpoint: Path) -> Restored:
    """Load what `save_checkpoint` wrote into `state`, whose policy was already loaded from the checkpoint, or from
    where the run started when it has adapters. Raises DataError."""
    try:
        generators = load_torch(checkpoint / RANDOM)
        progress = Progress.model_validate(read_json(checkpoint / PROGRESS))
        rows = rows_of(
            progress.rows, load_file(checkpoint / ROWS), vocabulary=input_layer(state.policy).num_embeddings
        )
        if has_adapters(state.policy):
            merged = read_weights(checkpoint / POLICY / MODEL)
            load_adapters(state.policy, load_file(checkpoint / ADAPTERS), merged)
        if state.value_model is not None and progress.started:  # else it may have been stopped in its pre-training
            load_weights(state.value_model, read_weights(checkpoint / VALUE_MODEL))
        if state.proximal is not None:
            state.proximal.load(read_weights(checkpoint / PROXIMAL))
        if any(name.startswith(f"{SHARDS}/") for name in read_manifest(checkpoint).files):
            load_shards(checkpoint / SHARDS, state)
        else:
            stored = load_torch(checkpoint / OPTIMIZERS)
            for name, _, own in optimizers_of(state):
                load_optimizer(own, stored[name])
        state.generator.set_state(generators["generator"])
        state.rollout_generator.set_state(generators["rollout_generator"])
        check_random_state(generators["global"])
        for name in PLAIN:
            setattr(state, name, getattr(progress, name))
        state.carried = [rows[place] for place in progress.carried]
        state.reusable = [[rows[place] for place in batch] for batch in progress.reusable]
        ahead = progress.ahead
        if ahead is not None:
            state.ahead = Ahead([rows[place] for place in ahead.rows], ahead.records)
        return Restored(progress.time_s, generators["global"])
    except FAULTS as error:
        raise DataError(f"{checkpoint}: not a usable checkpoint: {_line(error)}") from None


def load_torch(path: Path) -> Any:
    """What torch.save wrote: tensors and plain values. Nothing in it is executed, and nothing is larger than the file.
    Raises FAULTS."""
    with path.open("rb") as file:
        if file.read(1) == PICKLE:
            raise UnpicklingError
    with ZipFile(path) as archive:
        if any(own.compress_type != ZIP_STORED for own in archive.infolist()):
            raise ValueError(f"{path.name} is compressed, which torch.save does not do")
    return torch.load(path, weights_only=True)


def _line(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return f"{PROGRESS}: {describe(error.errors()[0], Progress)}"
    if isinstance(error, UnpicklingError):  # torch's own words advise to execute it
        return f"{OPTIMIZERS} or {RANDOM} holds more than tensors and numbers: not ours, and not executed"
    return first_line(error)
