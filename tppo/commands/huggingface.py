"""`tppo export --format huggingface`: a checkpoint's models as plain Hugging Face folders."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from profiling.errors import ConfigError, RunError, first_line
from profiling.settings import read_toml
from tppo.checkpoints.content import POLICY
from tppo.checkpoints.folders import empty_folder_for, hidden, put_in_place, remove
from tppo.checkpoints.manifest import Manifest
from tppo.checkpoints.store import chosen_checkpoint
from tppo.checkpoints.weights import read_weights, weight_files
from tppo.models.reading import reading_model, settings_of
from tppo.models.value import VALUE_CONFIG, VALUE_MODEL

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [tppo, reinforcement-learning]
---

# {name}, step {step}

Policy of a reinforcement-learning run with tppo {toolkit}.

| | |
|---|---|
| run | {name} |
| step | {step} |
| algorithm | {algorithm} |
| started from | {base} |
| accuracy on held-out problems | {accuracy} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
VALUE_CARD = """
`value/` is the value model: the expected reward after each token, given all tokens up to it.

```python
from transformers import AutoModelForTokenClassification

value_model = AutoModelForTokenClassification.from_pretrained("path/to/this/folder/value")
values = value_model(input_ids).logits.squeeze(-1)  # (rows, time)
```
"""


def export_huggingface(source: Path, target: Path, name: str | None) -> Path:
    """Write the checkpoint `name` (step-000100, best or last) of a run to the new folder `target`. `source` may be a
    checkpoint itself. Returns the folder, which is whole or absent. Raises ConfigError, DataError, RunError."""
    if target.exists():
        raise ConfigError(f"--output {target}: exists already; choose another folder, or move it away")
    checkpoint, manifest = chosen_checkpoint(source, name)
    run = checkpoint.parent.parent
    value = value_model_of(checkpoint) if weight_files(checkpoint / VALUE_MODEL) else None
    try:
        folder = empty_folder_for(target)
        shutil.copytree(checkpoint / POLICY, folder, dirs_exist_ok=True)
        if value is not None:
            value.save_pretrained(folder / "value")
            for file in folder.glob("*token*"):
                shutil.copy2(file, folder / "value")
        (folder / "README.md").write_text(card_of(run, manifest, value is not None))
        put_in_place(target)
    except (OSError, RuntimeError, SafetensorError) as error:
        remove(hidden(target, "tmp"))
        raise RunError(f"{target}: cannot be written: {first_line(error)}") from None
    return target


def value_model_of(checkpoint: Path) -> PreTrainedModel:
    """The value model as a token classifier with one label, whose logit at a token is V there: the library's class
    of that name is our backbone and linear head, bias included, and dropout of which there must be none.
    Raises ConfigError."""
    own = checkpoint / VALUE_CONFIG

    def fault(reason: str) -> ConfigError:
        return ConfigError(
            f"{checkpoint / VALUE_MODEL}: transformers has no token classifier that it fits: {reason}; the policy "
            f"alone is the folder {checkpoint / POLICY}"
        )

    with reading_model(fault):
        config = settings_of(own if own.is_dir() else checkpoint / POLICY)
        text = config.get_text_config()
        config.num_labels = 1
        for part in {id(config): config, id(text): text}.values():
            part.classifier_dropout = 0.0
            part.token_classification_bias = True
        with torch.device("meta"):
            model = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
        head = next((n for n, layer in model.named_children() if isinstance(layer, nn.Linear)), None)
        if head is None:
            raise fault("it has no linear head")
        names = {"backbone": model.base_model_prefix, "head": head}
        weights = {_renamed(name, names): weight for name, weight in read_weights(checkpoint / VALUE_MODEL).items()}
        model.load_state_dict(weights, assign=True)
    model.config.architectures = [type(model).__name__]
    model.config.id2label, model.config.label2id = {0: "value"}, {"value": 0}
    return model


def card_of(run: Path, manifest: Manifest, has_value_model: bool) -> str:
    base = _model_of(run)
    text = CARD.format(
        name=run.name, step=manifest.step, toolkit=manifest.toolkit, algorithm=manifest.algorithm,
        base="a local folder" if base is None or Path(base).exists() or Path(base).is_absolute() else base,
        accuracy="not evaluated at this step" if manifest.accuracy is None else f"{manifest.accuracy:.3f}",
    )  # fmt: skip
    return text + (VALUE_CARD if has_value_model else "")


def _model_of(run: Path) -> Any:
    try:
        return read_toml(run / "config.toml", regular=True).get("model", {}).get("path")
    except ConfigError:  # the checkpoint was taken out of its run
        return None


def _renamed(name: str, names: dict[str, str]) -> str:
    first, _, rest = name.partition(".")
    return f"{names[first]}.{rest}"
