import pandas as pd
import pytest

from analysis.figures import FIGURES
from analysis.plot import plot, plot_all
from profiling.errors import DataError, InputError
from profiling.reader import Run
from tests.analysis.made_runs import run_of_rows
from tppo.cli import main


def test_every_figure_has_a_line_in_the_list(capsys):
    assert main(["plot", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(FIGURES)
    assert all(len(line.split()) > 4 for line in lines)


def test_all_draws_what_it_can_and_says_why_the_rest_is_missing(simulated, tmp_path, capsys):
    run = simulated["truncated"]
    assert main(["plot", str(run.path), "--figure", "all", "--format", "png,pdf", "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    for name in ("response_length", "length_distribution", "staleness", "idle_ledger"):
        for suffix in ("png", "pdf", "csv"):
            assert (tmp_path / f"{name}.{suffix}").stat().st_size > 100
            assert str(tmp_path / f"{name}.{suffix}") in captured.out
    left_out = {line.split(": ")[1]: line for line in captured.err.splitlines()}
    assert left_out["energy"] == f"left out: energy: {run.path}: energy is not simulated"
    assert "has no evaluations" in left_out["accuracy_steps"]
    assert not (tmp_path / "energy.csv").exists()
    assert {path.stem for path in tmp_path.glob("*.csv")} | set(left_out) == set(FIGURES)


def test_nothing_to_draw_is_an_error_with_every_reason(tmp_path):
    with pytest.raises(DataError, match=r"no figure can be drawn of these runs; accuracy_time: .*; accuracy_steps: "):
        plot_all([run_of_rows(tmp_path / "x", [])], ["png"], tmp_path / "out")


def test_the_paper_style_is_a_column_wide(simulated, tmp_path):
    (pdf, _) = plot([simulated["truncated"]], "response_length", ["pdf"], tmp_path, look="paper")
    assert b"/MediaBox [ 0 0 237.6 " in pdf.read_bytes()  # 3.3 inches of 72 points


def test_the_numbers_beside_a_figure_are_its_table(simulated, tmp_path):
    (_, numbers) = plot([simulated["truncated"]], "staleness", ["svg"], tmp_path)
    table = FIGURES["staleness"].data([simulated["truncated"]])
    pd.testing.assert_frame_equal(pd.read_csv(numbers), table, check_dtype=False)


@pytest.mark.parametrize(("arguments", "message"), [
    (["RUN", "--figure", "staleness", "--style", "papper"], "style 'papper' is not one of screen, paper; did you"),
    (["RUN", "--figure", "stalenes"], "did you mean 'staleness'?"),
    (["RUN", "--figure", "staleness", "--format", "png,gif"], "format 'gif' is not one of png, pdf, svg"),
    (["--figure", "staleness"], "needs a RUN and --figure NAME; `tppo plot --list` names the figures"),
    (["RUN"], "needs a RUN and --figure NAME"),
])  # fmt: skip
def test_mistakes_are_one_line(simulated, tmp_path, capsys, arguments, message):
    words = [str(simulated["truncated"].path) if word == "RUN" else word for word in arguments]
    assert main(["plot", *words, "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_two_runs_of_one_name_are_refused(tmp_path):
    for parent in ("first", "second"):
        run_of_rows(tmp_path / parent / "run", [{"step": 1, "row": 1, "tokens": 5}])
    pair = [Run(tmp_path / parent / "run") for parent in ("first", "second")]
    with pytest.raises(InputError, match=r"second/run: has the name of .*first/run; .* rename one"):
        plot(pair, "staleness", ["png"], tmp_path)
