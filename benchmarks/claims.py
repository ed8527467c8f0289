"""What the README claims, from docs/results: `python -m benchmarks.claims` writes it anew; a test compares.

A block of the README between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is one of BLOCKS.
"""

from collections.abc import Callable

import pandas as pd

from analysis.tables import comparison_tables
from benchmarks.pages import RESULTS, ROOT, markdown, with_block

README = ROOT / "README.md"
REGIMES = {
    "demo": "`short`, the demo's seeds",
    "short": "`short`, new seeds: longest response six times the median, rollout over half of a PPO step",
    "prototype": "`prototype`, new seeds: a wide and shallow model, rollout less than half of a PPO step",
}


def table(name: str, file: str | None = None) -> pd.DataFrame:
    return pd.read_csv(RESULTS / name / f"{file or name}.csv")


def results() -> str:
    """The demo: T-PPO against PPO, and each predicted from the other."""
    compared = comparison_tables(table("demo", "predicted_measured"))
    names = [("ppo", "tppo"), ("tppo", "ppo")]
    rows = [compared[pair].assign(**{"predicted, from": f"{pair[1]}, from {pair[0]}"}) for pair in names]
    shown = pd.concat(rows).iloc[:, [-1, 0, 1, 2, 3, 4, 5]]
    chosen = ("training time", "rollout, s", "per finished", "time to target")
    shown = shown[shown.quantity.str.startswith(chosen)]
    ratio = table("demo", "speedups").iloc[0]
    return "\n\n".join(
        [
            f"On two CPU cores, T-PPO reached 85 % accuracy **{ratio['median']:.2f} times as fast** as PPO on the "
            f"clock (median of {ratio['pairs']} paired seeds, 95 % interval {ratio['low']:.2f} to "
            f"{ratio['high']:.2f}, faster in {ratio['wins']}). The simulator, calibrated on one algorithm's runs "
            "alone, forecast the other's, which it had not seen (medians over seeds, seconds):",
            markdown(shown),
            "![accuracy against wall-clock](docs/results/demo/accuracy_time.png)",
        ]
    )


def regimes() -> str:
    """What every recorded regime says of PPO against T-PPO."""
    rows = []
    for name, title in REGIMES.items():
        row = table(name, "speedups").iloc[0]
        rows.append(
            {
                "regime": f"[{title}](docs/results/{name}/README.md)",
                "time to 85 %, PPO / T-PPO": f"{row['median']:.2f}",
                "95 % interval": f"{row['low']:.2f} to {row['high']:.2f}",
                "T-PPO faster in": f"{row['wins']:.0f} of {row['pairs']:.0f} seeds",
                "not reached": f"{row['unreached']:.0f}",
            }
        )
    return markdown(pd.DataFrame(rows))


def measured() -> str:
    """What the other benchmarks found, in a line each; those that are not recorded are left out."""
    rows = [
        {"what": what, "measured": found(), "page": f"[{name}](docs/results/{name}/README.md)"}
        for name, what, found in FINDINGS
        if (RESULTS / name / "README.md").exists()
    ]
    return markdown(pd.DataFrame(rows))


def simulated() -> str:
    rows = table("simulator").seconds
    return f"{rows[0]:.3f} s; {rows[1]:.2f} s with preemption; {rows[2]:.0f} s for a whole training of 420 steps"


def predicted_by_another_tool() -> str:
    own = table("cost_model").query("engine == 'vllm' and use == 'predicted'")
    errors = own.groupby("work").apply(lambda rows: (rows["mean absolute error"] * rows.rows).sum() / rows.rows.sum())
    return ", ".join(f"{work} {error:.1%}" for work, error in errors.items())


def published() -> str:
    own = table("published").error.dropna().abs()
    return f"within 15 %: {(own <= 0.15).sum()} of {len(own)}; median {own.median():.0%}"


def advantages() -> str:
    ratios = table("advantages")["verl / egae, whitened, and returns"].dropna()
    return f"{ratios.min():.0f} to {ratios.max():.0f} times as fast as verl's GAE"


def training_step() -> str:
    ratio = table("training_step")["TRL / ours"].median()
    return f"{ratio:.2f} times as fast as TRL's PPO step (goal: 3)"


def rollouts() -> str:
    own = table("rollout")
    ratios = own[own.case.str.startswith("equal batch")]["A / B"]
    return f"{ratios.min():.2f} to {ratios.max():.2f} times as fast as `generate`"


def busy_shares() -> str:
    own = table("profiler").query("quantity == 'busy, 1 s window' and phase == 'reward'").iloc[0]
    return (
        f"off by {own['median |error|'] * 100:.1f} points where resolved ({own.resolved}); readings averaged instead: "
        f"{own['bucketing instead, median |error|'] * 100:.0f} points"
    )


def report() -> str:
    rows = table("report").set_index("quantity")
    return (
        f"{rows['median']['tppo report, s']:.0f} s to write (goal: {rows.goal['tppo report, s']:.0f}), "
        f"{rows['median']['opening in Chromium, s']:.1f} s to open, {rows['median']['size, MB']:.1f} MB"
    )


def explore() -> str:
    own = table("explore").query("`change of` == 'mean length'").set_index("GPUs")
    few, many = own.loc[8], own.loc[64]
    return (
        f"a first estimate with its pictures in {few['first pictures, s']} s on 8 GPUs, "
        f"{many['first pictures, s']} on 64 (goal: 1); "
        f"the whole answer in {few['pictures, s']} and {many['pictures, s']} s"
    )


def scaling() -> str:
    own = table("scaling").set_index("phase").efficiency
    return f"efficiency {own['rollout']:.0%} in the rollout, {own['step']:.0%} over a step"


FINDINGS: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("simulator", "simulating a step of 8,192 rows", simulated),
    ("cost_model", "analytic costs against another tool's, error", predicted_by_another_tool),
    ("published", "other people's published results, simulated", published),
    ("profiler", "how busy GPUs were in a phase of a second (1 s sensor window)", busy_shares),
    ("report", "the report of a run of 1,000 steps and 512,000 rows", report),
    ("explore", "the planner's page, another mean length", explore),
    ("advantages", "advantages and returns", advantages),
    ("rollout", "the torch engine, equal batch on a CPU", rollouts),
    ("scaling", "a second rank on two shared CPU cores", scaling),
    ("training_step", "a whole PPO step on a CPU", training_step),
)
"""Folder of docs/results, what was asked, what was found."""
BLOCKS: dict[str, Callable[[], str]] = {"results": results, "regimes": regimes, "measured": measured}


def with_claims(text: str) -> str:
    """The README with every block written anew."""
    for name, block in BLOCKS.items():
        text = with_block(text, name, block())
    return text


def write_claims() -> None:
    README.write_text(with_claims(README.read_text()))


if __name__ == "__main__":
    write_claims()
