"""A run directory that somebody else made executes nothing unless the command line says so."""

import pytest

from profiling.errors import ConfigError
from tppo.cli import main
from tppo.commands.eval import Flags, config_of
from tppo.commands.train import read_config
from tppo.evaluation.source import Source

CODE = {
    "trust_remote_code = true": ("model", "model.trust_remote_code", "true"),
    'kind = "python"\nfunction = "timeit:timeit"': ("reward", "reward.function", "timeit:timeit"),
    'address = "ray://203.0.113.7:10001"': ("ray", "ray.address", "ray://203.0.113.7:10001"),
}


def run_that_says(folder, section, line):
    own = f'path = "tiny"\n{line}' if section == "model" else line
    model = "" if section == "model" else '[model]\npath = "tiny"\n'
    folder.mkdir()
    (folder / "config.toml").write_text(f"{model}[{section}]\n{own}\n")
    return folder


@pytest.mark.parametrize("line", CODE)
def test_resuming_executes_what_the_command_line_names_and_nothing_else(tmp_path, line, capsys):
    section, field, value = CODE[line]
    run = run_that_says(tmp_path / "run", section, line)
    assert main(["train", "--resume", str(run)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{run / 'config.toml'}: {field} = {value}: " in error
    assert error.endswith(f"a run directory does not decide that; if you trust it, add --{field} {value}")
    said = read_config(None, [f"--{field}", value], output=None, resume=run)
    assert read_config(run / "config.toml", [], output=None, resume=run) == said  # a file that the user names


@pytest.mark.parametrize("line", list(CODE)[:2])
def test_evaluating_executes_what_the_command_line_names_and_nothing_else(line):
    section, field, value = CODE[line]
    function = {"kind": "python", "function": "timeit:timeit"}
    source = Source("tiny", 1, {"model": {"trust_remote_code": True}} if section == "model" else {"reward": function})
    with pytest.raises(ConfigError, match=f"RUN: {field} = {value}: .*if you trust it, add --{field} {value}"):
        config_of(source, Flags(), None, {}, where="RUN")
    given = True if value == "true" else value
    assert config_of(source, Flags(), None, {field: given}, where="RUN").model.path == "tiny"


def test_what_is_switched_off_on_the_command_line_needs_no_word_and_what_is_switched_on_there_does():
    function = {"kind": "python", "function": "timeit:timeit"}
    source = Source("tiny", 1, {"reward": function})
    assert config_of(source, Flags(), None, {"reward.kind": "math"}, where="RUN").reward.kind == "math"
    source = Source("tiny", 1, {"reward": {**function, "kind": "math"}})
    assert config_of(source, Flags(), None, {}, where="RUN").reward.kind == "math"
    with pytest.raises(ConfigError, match=r"reward.function = timeit:timeit"):
        config_of(source, Flags(), None, {"reward.kind": "python"}, where="RUN")


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_a_cluster_on_this_machine_needs_no_word(tmp_path, address):
    run = run_that_says(tmp_path / "run", "ray", f'address = "{address}"')
    assert read_config(None, [], output=None, resume=run).ray.address == address
