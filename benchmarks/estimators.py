"""Two measurements on fixed responses: EGAE against GAE of the full rollout, and a detached prefix against a full one.

Both take a checkpoint, sample complete responses from its policy, and cut them into windows afterwards, so that the
compared estimates see the same tokens.
"""

import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from analysis import style
from profiling.settings import check_settings, read_toml, with_overrides
from tppo.algorithms.advantages import egae, gae
from tppo.algorithms.masks import window_mask
from tppo.algorithms.recipes import RECIPES
from tppo.config import RunConfig
from tppo.data.arithmetic import verify
from tppo.data.tasks import arithmetic_task
from tppo.learner.batch import Spans, in_micro_batches
from tppo.learner.estimates import estimate, score_values
from tppo.learner.policy_update import update_policy
from tppo.models.policy import load_policy
from tppo.models.value import ValueModel
from tppo.models.value_source import load_value_model
from tppo.rollout.engines import sampling_of
from tppo.rollout.protocol import Request
from tppo.rollout.rows import Row
from tppo.rollout.torch_engine import TorchEngine

FIRST_PROBLEM = 5_000_000
"""Problems that training never reaches."""


class Sampled:
    """Complete, graded and scored responses of a checkpoint's policy."""

    def __init__(self, run: Path, checkpoint: Path, responses: int, seed: int = 0) -> None:
        values = with_overrides(read_toml(run / "config.toml"), {"algorithm.name": "tppo"})
        self.config = check_settings(values, RunConfig, where=str(run))
        self.policy, self.tokenizer = load_policy(str(checkpoint / "policy"))
        self.value_model = ValueModel(self.policy)
        load_value_model(self.value_model, checkpoint)
        self.pad = self.tokenizer.pad_token_id
        task, longest = arithmetic_task(self.config), self.config.rollout.max_response_tokens
        engine = TorchEngine(
            self.policy, slots=64, max_tokens=task.max_prompt_tokens + longest, pad_token_id=self.pad,
            generator=torch.Generator().manual_seed(seed), clock=lambda: 0.0,
        )  # fmt: skip
        self.rows = []
        for number in range(responses):
            problem = task.problem(FIRST_PROBLEM + number)
            self.rows.append(Row(number, number, problem, self.tokenizer(problem.prompt)["input_ids"]))
        requests = [Request(row.row, list(row.prompt_ids), 0, longest) for row in self.rows]
        engine.submit(requests, sampling_of(self.config, self.tokenizer))
        while ended := engine.run_until_a_row_ends():
            for done in ended:
                row = self.rows[done.row]
                row.take(done)
                row.finished = True
                text = str(self.tokenizer.decode(row.response_ids))
                row.reward = 1.0 if verify(row.problem, text) else -1.0
        score_values(self.value_model, Spans.responses(self.rows), self.config, self.pad)


def advantage_table(sampled: Sampled, windows: list[int], lambdas: list[float]) -> pd.DataFrame:
    """Per window and lambda, over the tokens of the windows that truncation cuts: EGAE minus GAE of the whole
    response (mean: bias; root mean square), their correlation, and the variance of each."""
    spans = Spans.responses(sampled.rows)
    values, valid = spans.laid_out(lambda row: row.values), spans.valid
    rewards = torch.zeros(valid.shape)
    for index, row in enumerate(sampled.rows):
        rewards[index, len(row.response_ids) - 1] = float(row.reward or 0.0)
    rows = []
    for lam in lambdas:
        whole = gae(rewards, values, valid, lam=lam)
        for window in windows:
            cut, kept = truncated_estimates(rewards, values, spans.tokens, window, lam)
            a, b = cut[kept].double(), whole[kept].double()
            difference = a - b
            rows.append(
                {
                    "lambda": lam, "window": window, "tokens": len(a),
                    "share of tokens in cut windows": len(a) / int(valid.sum()),
                    "bias": difference.mean().item(), "rms difference": difference.square().mean().sqrt().item(),
                    "correlation": torch.corrcoef(torch.stack([a, b]))[0, 1].item(),
                    "variance EGAE": a.var().item(), "variance GAE": b.var().item(),
                    "rms, last 8 tokens": _tail_rms(difference, cut, kept, spans.tokens, window, 8),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def truncated_estimates(
    rewards: Tensor, values: Tensor, tokens: Tensor, window: int, lam: float
) -> tuple[Tensor, Tensor]:
    """EGAE window by window, laid out as the responses, and where a window was cut (did not hold the row's end)."""
    estimates, kept = torch.zeros_like(values), torch.zeros(values.shape, dtype=torch.bool)
    for start in range(0, values.shape[1], window):
        part = slice(start, start + window)
        here = window_mask((tokens - start).clamp(min=0), values[:, part].shape[1])
        finished = tokens <= start + window
        estimates[:, part] = egae(rewards[:, part], values[:, part], here, finished, lam=lam)
        kept[:, part] = here & ~finished[:, None]
    return estimates, kept


def _tail_rms(difference: Tensor, cut: Tensor, kept: Tensor, tokens: Tensor, window: int, last: int) -> float:
    place = torch.arange(cut.shape[1]).expand(cut.shape) % window
    tail = (place >= window - last)[kept]
    return difference[tail].square().mean().sqrt().item() if tail.any() else float("nan")


def advantage_figure(table: pd.DataFrame) -> Figure:
    """Bias and root mean square difference against the window, a line per lambda."""
    with rc_context(style.RC):
        return _advantage_lines(table)


def _advantage_lines(table: pd.DataFrame) -> Figure:
    figure, panels = style.subplots(1, 2, width=9.0, height=3.8)
    for axes, column in zip(panels, ("bias", "rms difference"), strict=True):
        for place, (lam, rows) in enumerate(table.groupby("lambda")):
            colour = (style.BLUE, style.VERMILION, style.GREEN)[place % 3]
            axes.plot(rows.window, rows[column], "o-", color=colour, label=f"lambda = {lam}")
        axes.set(xlabel="window, tokens", ylabel=f"{column}, reward")
        axes.axhline(0, color="#555555", linewidth=0.8)
    panels[0].set_title("EGAE minus GAE of the same responses (measured)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def prefix_table(sampled: Sampled, window: int, batches: int, rows_per_batch: int = 32) -> pd.DataFrame:
    """Gradients of one policy step with the prefix detached against with gradient, on the same rows: cosine, ratio of
    norms, seconds (paired), and the share of training FLOPs a detached prefix saves (backward = 2 x forward)."""
    rng = np.random.default_rng(0)
    recipe, config = RECIPES["tppo"], sampled.config
    rows = []
    for _ in range(batches):
        chosen = [_visit(sampled.rows[i], window, rng) for i in rng.choice(len(sampled.rows), rows_per_batch, False)]
        spans = Spans.windows(chosen)
        batch, _ = estimate(spans, torch.zeros(len(chosen), dtype=torch.long), recipe, config, policy_version=0)
        gradients, seconds = {}, {}
        for prefix in ("gradient", "detached", "gradient", "detached", "gradient", "detached"):
            own = config.model_copy(
                update={
                    "algorithm": config.algorithm.model_copy(update={"prefix": prefix}),
                    "train": config.train.model_copy(update={"mini_batches": 1}),
                    "optimizer": config.optimizer.model_copy(update={"max_grad_norm": 1e9}),
                }
            )
            optimizer = torch.optim.SGD(sampled.policy.parameters(), lr=0.0)
            start = time.perf_counter()
            update_policy(sampled.policy, optimizer, batch, recipe, own, sampled.pad, torch.Generator().manual_seed(0))
            seconds.setdefault(prefix, []).append(time.perf_counter() - start)
            gradients[prefix] = torch.cat(
                [p.grad.flatten() for p in sampled.policy.parameters() if p.grad is not None]
            )
        full, cut = gradients["gradient"], gradients["detached"]
        prefix_tokens = sum(row.context_before - 1 for row in chosen if row.window_start)
        total = sum(row.all_tokens - 1 for row in chosen)
        rows.append(
            {
                "cosine": torch.nn.functional.cosine_similarity(full, cut, dim=0).item(),
                "norm ratio": (cut.norm() / full.norm()).item(),
                "prefix share of tokens": prefix_tokens / total,
                "saved FLOPs": 2 / 3 * prefix_tokens / total,
                "seconds, detached / gradient": statistics.median(seconds["detached"])
                / statistics.median(seconds["gradient"]),
                "micro-batches": len(
                    list(in_micro_batches(spans, range(len(chosen)), config.train.micro_batch_tokens))
                ),
            }
        )
    table = pd.DataFrame(rows)
    return pd.DataFrame(
        {
            "quantity": table.columns,
            "median": table.median().to_numpy(),
            "lowest": table.min().to_numpy(),
            "highest": table.max().to_numpy(),
        }
    )


def _visit(row: Row, window: int, rng: np.random.Generator) -> Row:
    """The row as one of its steps under truncation saw it, the step drawn at random."""
    length = len(row.response_ids)
    visit = int(rng.integers(0, -(-length // window)))
    end = min((visit + 1) * window, length)
    finished = end == length
    return replace(
        row, response_ids=row.response_ids[:end], log_probs=row.log_probs[:end], values=row.values[:end],
        window_start=visit * window, finished=finished, reward=row.reward if finished else None,
    )  # fmt: skip
