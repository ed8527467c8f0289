"""The same hostile files through the commands: exit codes 0, 1 and 2, one line on standard error, no traceback, and
nothing written but the output."""

import contextlib
import io
import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from hypothesis import strategies as st

from profiling.advice import NAME as ADVICE
from simulator.experiment import MOST_ROWS
from tests.fuzz.foreign_files import VERL, console_text
from tests.fuzz.mutations import one_or_two, toml_text
from tests.fuzz.oracle import Refused, check_message
from tests.fuzz.reader import Reader
from tests.fuzz.run_files import RUN, hostile_run, whole_run
from tests.fuzz.settings_files import CONFIG, EXPERIMENTS, LENGTHS, csv_text, texts
from tppo.cli import main

CODES = (0, 1, 2)
NAMED = ("tppo ", "--", "ledger", "figure", "runs", "value.path", "too long for a file")
"""What a line may name in place of a file."""


class Unforeseen(Exception):
    """The command ended with an error that is none of ours."""


def command(*words: str) -> Callable[[Path], None]:
    """`tppo WORDS`: {in} is the folder that is given; {out}, beside it, the one where the command may write."""

    def run(folder: Path) -> None:
        where = {"in": str(folder), "out": str(folder.with_name("out"))}
        errors, printed = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed), working_in(where["out"]):
            code = main([word.format(**where) for word in words])
        said = [line for line in errors.getvalue().splitlines() if line.startswith("tppo: ")]
        check_end(code, said, errors.getvalue(), folder)
        printed.getvalue().encode()  # a terminal can show it
        assert "\x1b" not in printed.getvalue(), "could steer a terminal"
        if code:
            raise Refused(said[-1])

    return run


def check_end(code: int, said: Sequence[str], errors: str, folder: Path) -> None:
    assert code in CODES, code
    assert "Traceback" not in errors, errors
    if code:
        assert len(said) >= 1, errors
        if "--debug for the traceback" in said[-1]:
            raise Unforeseen(said[-1])
        check_message(said[-1], folder, (folder.name, *NAMED))


@contextlib.contextmanager
def working_in(folder: str):
    """The command's working directory: a folder of its own."""
    before = Path.cwd()
    Path(folder).mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_and(name: str, words: Sequence[str], share: float = 0.3, writes: tuple[str, ...] = ()) -> Reader:
    files = st.deferred(lambda: one_or_two(
        {f"{RUN}/{file}": content for file, content in whole_run().items()},
        {f"{RUN}/{file}": own for file, own in hostile_run().items()},
    ))  # fmt: skip
    return Reader(f"tppo {name}", files, command(*words), share=share, names=(RUN,), writes=writes)


def small(experiment: dict) -> dict:
    return {**experiment, "workload": {**experiment["workload"], "steps": 2}}


def quick(files: dict[str, bytes]) -> bool:
    """Not one that asks for so many rows that simulating them takes its time; more than is allowed is refused at
    once."""
    try:
        own = tomllib.loads(files["e.toml"].decode())["workload"]
        rows = own["steps"] * own["prompts_per_step"] * own.get("samples_per_prompt", 1)
        return not 20_000 < rows <= MOST_ROWS
    except (KeyError, TypeError, ValueError, RecursionError):  # no experiment: what this is about
        return True


TRAINING = {**CONFIG, "model": {"path": "Qwen2.5-0.5B"}, "data": {"median_steps": 2.0}, "reward": {}}

READERS = (
    Reader("tppo simulate", texts("e.toml", [small(own) for own in EXPERIMENTS[:6]], toml_text).filter(quick),
           command("simulate", "{in}/e.toml", "--output", "{out}/run"), share=1),
    run_and("calibrate", ("calibrate", f"{{in}}/{RUN}", "--output", "{out}/c.json")),
    Reader("tppo calibrate verl:LOG", texts("verl.log", (VERL,), console_text),
           command("calibrate", "verl:{in}/verl.log", "--output", "{out}/c.json"), share=0.3),
    run_and("report", ("report", f"{{in}}/{RUN}", "--output", "{out}/report.html"), share=0.01,
            writes=(ADVICE,)),
    run_and("compare", ("compare", f"{{in}}/{RUN}", f"{{in}}/{RUN}"), share=0.05),
    run_and("plot", ("plot", f"{{in}}/{RUN}", "--figure", "engine_timeline", "--output", "{out}"), share=0.1),
    run_and("export chrome", ("export", f"{{in}}/{RUN}", "--output", "{out}/t.json")),
    run_and("export csv", ("export", f"{{in}}/{RUN}", "--format", "csv", "--output", "{out}/csv")),
    run_and("samples", ("samples", f"{{in}}/{RUN}")),
    run_and("watch", ("watch", f"{{in}}/{RUN}", "--once")),
    Reader("tppo plan --lengths", st.builds(lambda own: {"l.csv": own}, st.one_of(
               st.just(csv_text([["n"], *([row["n"]] for row in LENGTHS)])),
               st.builds(lambda cells: csv_text([["n"], *([c] for c in cells)]), st.lists(st.floats() | st.integers(),
                         max_size=5)))),
           command("plan", "--model", "Qwen2.5-0.5B", "--gpu", "H100-SXM", "--gpus", "8", "--steps", "2", "--lengths",
                   "{in}/l.csv", "--lengths-column", "n", "--prompts-per-step", "8", "--samples-per-prompt", "1",
                   "--max-response-tokens", "1024", "--draws", "10", "--json"), share=0.005, deadline_s=180),
    Reader("tppo train --check", texts("t.toml", (TRAINING,), toml_text),
           command("train", "{in}/t.toml", "--check", "--gpu", "H100-SXM"), share=0.1),
)  # fmt: skip
