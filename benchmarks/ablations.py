"""What each part of T-PPO does: window length, trailing filter, value warm-up, EGAE, successive batching, prefix.

python -m benchmarks.ablations [--seeds 20:23] [--output runs/learning] [--record]

Arms share everything with `benchmarks.learning` (whose runs `tppo` and `tppo-full` are taken from --output when they
are there) and differ from `tppo` (window L/3, trailing 8) in the one setting that names them. EGAE and the detached
prefix are measured on fixed responses of the checkpoint of `tppo-full`'s first seed. --record writes
docs/results/ablations.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.arms import budget_table, curves_figure, train_arms
from benchmarks.estimators import Sampled, advantage_figure, advantage_table, prefix_table
from benchmarks.learning import ARMS, REGIME, TARGET
from benchmarks.pages import ROOT, markdown
from benchmarks.record_results import machine
from tppo.checkpoints.store import newest_usable

T_PPO = ARMS["tppo"]
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "window length": {
        "window-32": {**T_PPO, "rollout.window": 32, "train.steps": 210},
        "window-64": {**T_PPO, "rollout.window": 64, "train.steps": 170},
        "tppo": T_PPO,
        "window-128": {**T_PPO, "rollout.window": 128, "train.steps": 140},
        "tppo-full": ARMS["tppo-full"],
    },
    "trailing filter": {
        "trailing-0": {**T_PPO, "algorithm.trailing_tokens": 0},
        "tppo": T_PPO,
        "trailing-32": {**T_PPO, "algorithm.trailing_tokens": 32},
    },
    "value warm-up": {"tppo": T_PPO, "no-value-warm-up": {**T_PPO, "value.pretrain_rows": 0}},
    "successive batching against partial rollout": {
        "tppo": T_PPO,
        "partial-rollout": {**T_PPO, "algorithm.name": "partial-rollout"},
    },
    "prefix with gradient or detached": {"tppo": T_PPO, "detached": {**T_PPO, "algorithm.prefix": "detached"}},
}
NOTES = {
    "window length": "L = 256; tppo is 85 = L/3, tppo-full 256 = L. A shorter window makes a step cheaper and "
    "re-prefills more.",
    "trailing filter": "Last tokens of a truncated row that do not train; tppo has 8 of 85.",
    "value warm-up": "Off: the value model starts from the policy's backbone with a zero head. Its time counts.",
    "successive batching against partial rollout": "partial-rollout trains a response when it has finished, on all "
    "its tokens, with truncated importance weights (at most 2) for the policies that sampled them.",
    "prefix with gradient or detached": "detached: keys and values of a resumed row's earlier windows are constants.",
}
WINDOWS = [32, 64, 85, 128, 192]
LAMBDAS = [0.95, 0.99, 1.0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="20:23", help="first:end")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    first, end = map(int, options.seeds.split(":"))
    arms = {name: settings for study in STUDIES.values() for name, settings in study.items()}
    load = os.getloadavg()[0]
    runs = train_arms(arms, regime=REGIME, seeds=range(first, end), output=options.output)
    print(f"load average {load:.2f} before, {os.getloadavg()[0]:.2f} after")
    target = ROOT / "docs" / "results" / "ablations"
    if options.record:
        target.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Ablations of T-PPO",
        f"Written by `python -m benchmarks.ablations --seeds {options.seeds} --record`. {machine(runs)}",
        "Read at the generated tokens and at the training seconds that every run of a study reached. Accuracy: mean "
        "of three consecutive evaluations of 192 held-out problems; medians over seeds.",
    ]
    for study, members in STUDIES.items():
        own = [run for run in runs if run.name.rsplit("-s", 1)[0] in members]
        table = budget_table(own, TARGET)
        name = study.replace(" ", "-")
        print(study, markdown(table), sep="\n")
        parts += [f"## {study.capitalize()}", NOTES[study], markdown(table), f"![{study}]({name}.png)"]
        if options.record:
            table.to_csv(target / f"{name}.csv", index=False)
            curves_figure(own, f"{study.capitalize()} (measured)", TARGET).savefig(target / f"{name}.png")
    source = options.output / f"tppo-full-s{first}"
    sampled = Sampled(source, newest_usable(source).path, responses=1024)
    advantages = advantage_table(sampled, WINDOWS, LAMBDAS)
    prefix = prefix_table(sampled, window=85, batches=20)
    print(markdown(advantages), markdown(prefix), sep="\n")
    parts += [
        "## EGAE against GAE of the full rollout",
        f"1,024 responses of {source.name}'s last policy, scored by its value model; tokens of windows that "
        "truncation cuts. Bias: mean of EGAE - GAE. With lambda = 1 GAE is the Monte-Carlo return minus V: what EGAE "
        "leaves out is the difference between the return and the value at the cut.",
        markdown(advantages),
        "![EGAE minus GAE](egae.png)",
        "## Gradient of a detached prefix",
        "One policy step on 32 rows, each at a random visit, 20 batches; gradients before clipping, times paired.",
        markdown(prefix),
    ]
    if options.record:
        advantages.to_csv(target / "egae.csv", index=False)
        prefix.to_csv(target / "prefix.csv", index=False)
        advantage_figure(advantages).savefig(target / "egae.png")
        (target / "README.md").write_text("\n\n".join(parts) + "\n")
        print(target)


if __name__ == "__main__":
    main()
