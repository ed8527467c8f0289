"""TensorBoard events, in the run directory."""

from collections.abc import Mapping, Sequence
from typing import Any

from tppo.tracking.protocol import About


class TensorBoardSink:
    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        after = about.resumed_after
        self._writer = SummaryWriter(str(about.path / "tensorboard"), purge_step=None if after is None else after + 1)

    def metrics(self, step: int, unix_s: float, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=unix_s)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        text = "\n\n".join(as_markdown(row) for row in rows)
        self._writer.add_text("samples", text, step)

    def close(self, status: str) -> None:
        self._writer.close()


def as_markdown(row: Mapping[str, Any]) -> str:
    """Facts in a line, then prompt and response as indented blocks: nothing in them is read as markup."""
    facts = ", ".join(f"{name} {row[name]}" for name in ("row", "tokens", "reward", "correct", "answer", "finished"))
    blocks = ["\n".join(f"    {line}" for line in row[name].split("\n")) for name in ("prompt", "response")]
    return "\n\n".join([f"**{facts}**", *blocks])
