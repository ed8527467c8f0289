"""Tries an installed tppo that has no extras, from a directory that holds no checkout but configs/:
python scripts/try_install.py WHEEL. Prints a line for each step; the first that fails ends it with 1.
"""

import importlib.util
import json
import os
import resource
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TPPO = str(Path(sysconfig.get_path("scripts")) / "tppo")
EXPERIMENT = ("configs/benchmark_8192.toml", "--workload.prompts_per_step", "8", "--workload.steps", "2")
NOT_IN_THE_BASE = (
    "ray", "vllm", "peft", "tensorboard", "wandb", "mlflow", "fastapi", "uvicorn", "mkdocs", "pytest", "hypothesis",
)  # fmt: skip
HELP_CPU_S = 0.3
TRAINING = """
output = "trained"
[model]
path = "./tiny"
[data]
median_steps = 2
max_steps = 6
[rollout]
prompts_per_step = 4
max_response_tokens = 24
window = 8
[train]
steps = 2
mini_batches = 1
threads = 1
[value]
pretrain_rows = 4
[evaluation]
problems = 4
"""
NEEDS_AN_EXTRA = (
    ("ray", "train", "run.toml", "--output", "other", "--ray", "auto"),
    ("ray", "sweep", *EXPERIMENT, "--vary", "workload.seed=0,1", "--ray", "auto"),
    ("lora", "train", "run.toml", "--output", "other", "--model.lora_rank", "4"),
    ("vllm", "train", "run.toml", "--output", "other", "--rollout.engine", "vllm"),
    ("vllm", "eval", "./tiny", "--data", "arithmetic", "--engine", "vllm"),
    ("tensorboard", "train", "run.toml", "--output", "other", "--logging.tensorboard", "true"),
    ("wandb", "train", "run.toml", "--output", "other", "--logging.wandb", "true"),
    ("mlflow", "train", "run.toml", "--output", "other", "--logging.mlflow", "true"),
    ("tensorboard", "export", "trained", "--format", "tensorboard"),
    ("wandb", "export", "trained", "--format", "wandb"),
    ("explore", "explore"),
)


def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    # Words of this file; no shell reads them.
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)  # nosec B603
    if done.returncode != code:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}, not {code}\n{done.stdout}{done.stderr}")
    return done


def cpu_s(*words: str) -> float:
    """Least of three: what the first one reads from the disk does not count."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(*words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


def needed_by(name: str) -> set[str]:
    """The distributions that installing `name` alone brings, itself included."""
    found, left = set(), [name]
    while left:
        one = canonicalize_name(left.pop())
        if one in found or not installed(one):
            continue
        found.add(one)
        needs = [Requirement(text) for text in distribution(one).requires or ()]
        left += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def size_mb(names: set[str]) -> float:
    """On the disk, in megabytes of 10^6 bytes, of what pip noted of these distributions."""
    files = [file.locate() for name in names for file in distribution(name).files or ()]
    return sum(Path(file).stat().st_size for file in files if Path(file).is_file()) / 1e6


def the_base(wheel: str) -> None:
    own = version("tppo")
    if f"-{own}-" not in wheel or run(TPPO, "--version").stdout.strip() != own:
        raise SystemExit(f"{wheel}: another version than {own}")
    extras = [name for name in NOT_IN_THE_BASE if importlib.util.find_spec(name) is not None]
    if extras:
        raise SystemExit(f"the base install brings {', '.join(extras)}")
    where = importlib.util.find_spec("tppo").origin
    if "site-packages" not in where:
        raise SystemExit(f"tppo is imported from {where}, not from the wheel")
    torch = needed_by("torch")
    base = needed_by("tppo") - torch
    print(f"tppo {own}: {len(base)} packages, {size_mb(base):.0f} MB, besides torch's {size_mb(torch):.0f} MB")


def help_of_everything() -> None:
    taken = cpu_s(TPPO, "--help")
    if taken > HELP_CPU_S:
        raise SystemExit(f"tppo --help takes {taken:.2f} s of CPU, more than {HELP_CPU_S}")
    from tppo.cli import build_parser

    commands = list(build_parser()._subparsers._group_actions[0].choices)
    for command in commands:
        run(TPPO, command, "--help")
    for package in ("tppo", "simulator", "profiling", "analysis"):
        run(sys.executable, "-m", package, "--help")
    print(f"--help of {len(commands)} commands and four modules; tppo --help takes {taken:.2f} s of CPU")


def simulating() -> None:
    run(TPPO, "simulate", *EXPERIMENT, "--output", "simulated")
    answer = run(TPPO, "plan", "--model", "Qwen2.5-7B", "--gpu", "H100-SXM", "--gpus", "8", "--steps", "2", "--json")
    json.loads(answer.stdout)
    run(TPPO, "plot", "simulated", "--figure", "idle_ledger")
    run(TPPO, "report", "simulated", "--output", "report.html")
    if "<html" not in Path("report.html").read_text():
        raise SystemExit("report.html is no page")
    print("simulate, plan, plot, report")


def training() -> None:
    from tppo.data.tokenizer import character_tokenizer
    from tppo.models.policy import new_qwen2, save_policy
    from tppo.quiet import quieten_libraries

    quieten_libraries()
    tokenizer = character_tokenizer()
    model = new_qwen2(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, layers=1,
        hidden_size=32, heads=2, kv_heads=1, intermediate_size=48, max_tokens=400, seed=1,
    )  # fmt: skip
    save_policy(model, tokenizer, Path("tiny"))
    Path("run.toml").write_text(TRAINING)
    run(TPPO, "train", "run.toml")
    run(TPPO, "report", "trained", "--output", "trained.html")
    run(TPPO, "profile", "--output", "profiled", "--", sys.executable, "-c", "pass")
    print("train, report, profile")


def extras() -> None:
    from tppo.cli import build_parser

    known = build_parser()._subparsers._group_actions[0].choices
    asked = [(extra, words) for extra, *words in NEEDS_AN_EXTRA if words[0] in known]

    def ask(extra: str, words: list[str]) -> None:
        lines = run(TPPO, *words, code=2).stderr.splitlines()
        if len(lines) != 1 or not (f"tppo[{extra}]" in lines[0] or f"extra `{extra}`" in lines[0]):
            raise SystemExit(
                f"tppo {' '.join(words)}: does not say in one line that it needs the extra {extra}: {lines}"
            )

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of each is imports
        list(pool.map(lambda one: ask(*one), asked))
    if Path("other").exists():
        raise SystemExit("a run that lacks a package left a directory")
    print(f"{len(asked)} commands say which extra they need")


def main() -> None:
    the_base(Path(sys.argv[1]).name)
    help_of_everything()
    simulating()
    training()
    extras()


if __name__ == "__main__":
    main()
