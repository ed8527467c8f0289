"""How fast advantages are: ours against a loop over tokens and against verl's GAE, on one thread of this machine.

python -m benchmarks.advantages [--verl DIRECTORY] [--record]

verl is installed for this alone, by `pip install --no-deps --target DIRECTORY verl==0.9.1`; without --verl its
columns are left out. All compared functions run in turns on the same finished rows (verl knows no other), so that
whatever else the machine does falls on each of them. --record writes docs/results/advantages.
"""

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from benchmarks.pages import markdown
from benchmarks.turns import in_turns, paired_ratio
from benchmarks.verl_peer import VERSION, verl_gae
from tppo.algorithms.advantages import egae, gae, last_valid
from tppo.algorithms.normalise import whiten
from tppo.algorithms.scan import BLOCK_TOKENS, CHUNK_ELEMENTS

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "advantages"
SIZES = ((64, 128), (256, 1024), (64, 8192), (64, 24_576))
LARGEST = (8192, 24_576)
REPEATS = 7
GAMMA, LAMBDA = 1.0, 0.95
GOALS = {(256, 1024): 10, (64, 8192): 50}
"""Times faster than verl, by (rows, time)."""

Batch = tuple[Tensor, Tensor, Tensor]  # rewards, values, mask: (rows, time)


def batch(rows: int, width: int) -> Batch:
    """Finished rows of half to full width, a reward of 0 or 1 on each last token."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(width // 2, width + 1, (rows,), generator=generator)
    mask = torch.arange(width, dtype=torch.int32) < tokens[:, None]
    values = torch.randn(rows, width, generator=generator).mul_(mask)
    rewards = torch.zeros(rows, width)
    rewards[torch.arange(rows), tokens - 1] = torch.randint(0, 2, (rows,), generator=generator).float()
    return rewards, values, mask


def token_loop(rewards: Tensor, values: Tensor, mask: Tensor, finished: Tensor) -> Tensor:
    """EGAE as it is defined, a few operations over all rows for every token."""
    values = torch.where(mask, values, 0.0)
    next_value = torch.where(finished, 0.0, last_valid(values, mask))
    advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = torch.where(here, delta + GAMMA * LAMBDA * advantage, advantage)
        next_value = torch.where(here, values[:, t], next_value)
        columns.append(torch.where(here, advantage, 0.0))
    return torch.stack(columns[::-1], dim=1)


def what_verl_returns(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns, from ours."""
    raw = gae(rewards, values, mask, gamma=GAMMA, lam=LAMBDA)
    return whiten(raw, mask), raw + values


def compared(data: Batch, peer: Callable | None) -> dict[str, Callable[[], object]]:
    rewards, values, mask = data
    finished = torch.ones(len(mask), dtype=torch.bool)
    calls: dict[str, Callable[[], object]] = {
        "egae": lambda: egae(rewards, values, mask, finished, gamma=GAMMA, lam=LAMBDA),
        "loop": lambda: token_loop(rewards, values, mask, finished),
    }
    if peer is not None:
        as_numbers = mask.float()
        calls["egae, whitened, and returns"] = lambda: what_verl_returns(rewards, values, mask)
        calls["verl"] = lambda: peer(rewards, values, as_numbers, GAMMA, LAMBDA)
    return calls


def check_same_numbers(data: Batch, calls: dict[str, Callable[[], object]]) -> float:
    """Largest difference to the loop and to verl over unmasked tokens; more than 1e-4 ends the run.

    verl divides the variance by one token less than `whiten`.
    """
    mask = data[2]
    pairs = [(calls["egae"](), calls["loop"]())]
    if "verl" in calls:
        ours, theirs = calls["egae, whitened, and returns"](), calls["verl"]()
        tokens = int(mask.sum())
        pairs += [(ours[0] * ((tokens - 1) / tokens) ** 0.5, theirs[0]), (ours[1], theirs[1])]
    worst = max(float((a - b)[mask].abs().max()) for a, b in pairs)
    if worst > 1e-4:
        raise SystemExit(f"results differ by {worst:.2g}: nothing to compare")
    return worst


def settle_allocator() -> None:
    """Free one tensor of just under 32 MB, as training does before its first advantage.

    glibc returns freed memory to the system until it has seen a large block freed, and fetches it back page by page.
    """
    torch.zeros(7_900_000)


def compare(rows: int, width: int, peer: Callable | None) -> dict[str, object]:
    """One line of the table: median milliseconds, and the median of the repeats' ratios."""
    data = batch(rows, width)
    calls = compared(data, peer)
    worst = check_same_numbers(data, calls)
    taken = in_turns(calls, REPEATS)
    line: dict[str, object] = {"rows": rows, "tokens": width}
    line |= {f"{name} (ms)": 1e3 * statistics.median(seconds) for name, seconds in taken.items()}
    line["loop / egae"] = paired_ratio(taken["loop"], taken["egae"])[0]
    if peer is not None:
        line["verl / egae, whitened, and returns"] = paired_ratio(taken["verl"], taken["egae, whitened, and returns"])[
            0
        ]
    line["largest difference"] = worst
    return line


def peak_bytes() -> int:
    """The most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def time_the_largest() -> str:
    rows, width = LARGEST
    rewards, values, mask = batch(rows, width)
    finished = torch.ones(rows, dtype=torch.bool)
    before = peak_bytes()
    start = time.perf_counter()
    result = egae(rewards, values, mask, finished, gamma=GAMMA, lam=LAMBDA)
    seconds = time.perf_counter() - start
    beyond = peak_bytes() - before - result.nbytes
    return (
        f"{rows:,} rows of {width:,} tokens: {seconds:.1f} s once; peak memory {peak_bytes() / 1e9:.2f} GB, of which "
        f"{beyond / 1e6:.0f} MB beyond arguments and result."
    )


def goals(lines: list[dict[str, object]]) -> str:
    parts = []
    for line in lines:
        goal = GOALS.get((line["rows"], line["tokens"]))
        got = line.get("verl / egae, whitened, and returns")
        if goal is not None and got is not None:
            verdict = "reached" if got >= goal else "missed"
            parts.append(f"{goal} times verl at {line['rows']} x {line['tokens']}: {verdict} ({got:.1f})")
    return "Goals: " + "; ".join(parts) + "." if parts else "verl was not measured (no --verl)."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verl", type=Path, help=f"folder that holds verl {VERSION}")
    parser.add_argument("--record", action="store_true", help="write docs/results/advantages")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settle_allocator()
    load_before = os.getloadavg()[0]
    largest = time_the_largest()  # first: the peak is the process's, and must be this call's
    peer = verl_gae(options.verl) if options.verl else None
    lines = [compare(rows, width, peer) for rows, width in SIZES]
    table = pd.DataFrame(lines)
    machine = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread, blocks of {BLOCK_TOKENS} tokens, chunks of {CHUNK_ELEMENTS:,} elements. "
        f"Load average {load_before:.2f} before, {os.getloadavg()[0]:.2f} after; 1 is this process."
    )
    parts = [
        "# Advantages: speed",
        "Written by `python -m benchmarks.advantages --verl DIRECTORY --record`. " + machine,
        f"Medians of {REPEATS} repeats in which all functions take turns on the same finished rows of half to full "
        "length; a ratio is the median of the repeats' ratios. `loop` is a plain torch loop over tokens. verl "
        f"{VERSION}'s `compute_gae_advantage_return` also whitens and returns value targets, so it is set against "
        "ours doing the same. The largest difference is absolute, over unmasked tokens, to loop and verl. One tensor "
        "of 32 MB is freed first, so that the allocator keeps freed memory, as in training.",
        markdown(table),
        goals(lines),
        largest,
    ]
    page = "\n\n".join(parts) + "\n"
    print(page)
    if options.record:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "README.md").write_text(page)
        table.to_csv(RESULTS / "advantages.csv", index=False)


if __name__ == "__main__":
    main()
