import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from analysis import figures, style
from analysis.figures import FIGURES
from profiling.errors import DataError
from tests.analysis.images import assert_looks_like
from tests.analysis.made_runs import RISING, make_run, with_gpu
from tests.analysis.test_accuracy_figures import lines, note_of


@pytest.mark.parametrize("name", ["energy", "predicted_measured"])
def test_it_looks_as_it_did(runs, name):
    assert_looks_like(getattr(figures, name)(runs), name)


def test_energy_is_power_times_the_phases_seconds(runs):
    table = FIGURES["energy"].data(runs)
    by_phase = table[table.part == "phase"].set_index(["arm", "phase"])
    # six steps: 300 W in 1.2 s of rollout, 100 W in 0.6 s of update
    assert by_phase.joules["tppo", "rollout"] == pytest.approx(2160, rel=0.03)
    assert by_phase.joules["ppo", "update_policy"] == pytest.approx(360, rel=0.1)
    assert (by_phase.low < by_phase.joules).all()
    assert (by_phase.joules < by_phase.high).all()
    # ppo-s0: (360 J + 2.8 s x 100 W) / 20 tokens; tppo: (360 + 80) / 40
    tokens = table[table.part == "per_token"].set_index("run").joules
    assert (tokens["ppo-s0"], tokens["tppo-s0"]) == pytest.approx((32.0, 11.0))


def test_bars_and_markers_of_energy_are_those_of_the_table(runs):
    table = FIGURES["energy"].data(runs)
    left, right = FIGURES["energy"].draw(table, runs).axes
    bars = [bar.get_width() for bar in left.patches if bar.get_gid() == "joules"]
    assert bars == table[table.part == "phase"].joules.tolist()
    for arm in ("ppo", "tppo"):
        known = table[(table.part == "per_token") & (table.arm == arm)].joules.tolist()
        assert lines(right, arm)[0].get_xdata().tolist() == known


def test_energies_of_runs_and_their_bounds_are_averaged(runs):
    alone = [FIGURES["energy"].data([run]).set_index("phase").loc["rollout"] for run in runs[::2]]
    both = FIGURES["energy"].data(runs[::2]).set_index("phase").loc["rollout"]
    for column in ("joules", "low", "high"):
        assert both[column] == pytest.approx(sum(own[column] for own in alone) / 3)


def test_what_is_unresolved_is_hatched_and_named_and_never_a_bar_of_zero(runs):
    table = FIGURES["energy"].data(runs)
    table.loc[table.phase == "update_policy", ["joules", "low", "high"]] = None
    figure = FIGURES["energy"].draw(table, runs)
    hatched = [bar for bar in figure.axes[0].patches if bar.get_gid() == "unresolved"]
    assert [bar.get_hatch() for bar in hatched] == ["//", "//"]
    assert all(bar.get_width() > 2000 for bar in hatched)  # nothing bounds it: as wide as the axis
    assert "unresolved" in {text.get_text() for text in figure.legends[0].get_texts()}


def test_an_unresolved_energy_with_bounds_spans_them(runs):
    table = FIGURES["energy"].data(runs[:1])
    table.loc[table.phase == "update_policy", ["joules", "low", "high"]] = [None, 100.0, 700.0]
    (bar,) = [b for b in FIGURES["energy"].draw(table, runs[:1]).axes[0].patches if b.get_gid() == "unresolved"]
    assert (bar.get_x(), bar.get_width()) == (100.0, 600.0)


def test_runs_without_energy_are_named_with_the_reason(runs, simulated, tmp_path):
    dark = make_run(tmp_path / "vapo-s0", accuracies=RISING)
    note = note_of(figures.energy([*runs, dark, simulated["truncated"]]))
    assert note.startswith("Left out: vapo-s0 (has no device samples; profile it on a machine with GPUs)")
    assert "truncated (energy is not simulated)." in note
    with pytest.raises(DataError, match="truncated: energy is not simulated"):
        figures.energy([simulated["truncated"]])


def test_joules_per_token_that_are_null_are_said_to_be_unknown(tmp_path):
    run = with_gpu(make_run(tmp_path / "ppo-s0", accuracies=RISING))
    run.__dict__["summary"] = run.summary | {"joules_per_trained_token": None}
    texts = [text.get_text() for text in figures.energy([run]).axes[1].texts]
    assert texts == ["not known"]


def test_markers_of_predictions_are_the_errors_of_the_table(runs):
    table = FIGURES["predicted_measured"].data(runs)
    figure = FIGURES["predicted_measured"].draw(table, runs)
    for axes, kind in zip(figure.axes, ("forecast", "replay"), strict=True):
        own = table[(table.kind == kind) & ~table.drift_corrected]
        assert lines(axes, "tppo")[0].get_xdata().tolist() == (100 * own.error).tolist() == [0.0, 10.0, 20.0]
        assert to_rgba(lines(axes, "tppo")[0].get_color()) == to_rgba(style.BLUE)
        assert axes.get_title(loc="left") == kind.capitalize()
    assert figure.get_suptitle() == "Predicted (simulated) against measured"
    assert "within 10 %" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.drop(columns="kind"), "column 'kind' is missing"),
    (lambda t: t.assign(error="much"), "column 'error' has something that is not a number"),
    (lambda t: t.assign(error=None), "holds no error of a known quantity; `tppo demo` writes it anew"),
    (lambda t: t.assign(quantity="luck"), "holds no error of a known quantity"),
])  # fmt: skip
def test_faults_in_predictions_are_named(runs, tmp_path, change, message):
    path = tmp_path / "predictions.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(DataError, match=message) as error:
        figures.predicted_measured(runs)
    assert str(path) in str(error.value)


def test_a_kind_of_prediction_that_is_not_there_is_said_to_be_missing(runs, tmp_path):
    path = tmp_path / "predictions.csv"
    pd.read_csv(path).query("kind == 'replay'").to_csv(path, index=False)
    assert [text.get_text() for text in figures.predicted_measured(runs).axes[0].texts] == ["no such prediction"]
