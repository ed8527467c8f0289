"""A run directory that somebody else made executes nothing unless the command line says so."""

import shlex

import pytest

from profiling.errors import ConfigError
from profiling.settings import read_toml
from tppo.cli import main
from tppo.commands.eval import Flags, config_of
from tppo.commands.train import read_config
from tppo.consent import words_that_allow
from tppo.evaluation.source import Source

CODE = {
    "trust_remote_code = true": ("model", "model.trust_remote_code", "true"),
    'kind = "python"\nfunction = "timeit:timeit"': ("reward", "reward.function", "timeit:timeit"),
    'kind = "http"\nurl = "http://x"\nheader_env = "SECRET"': ("reward", "reward.header_env", "SECRET"),
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
    words = [f"--{field}", value, *(["--reward.url", "http://x"] if field == "reward.header_env" else [])]
    said = read_config(None, words, output=None, resume=run)
    assert read_config(run / "config.toml", [], output=None, resume=run) == said  # a file that the user names


@pytest.mark.parametrize("line", CODE)
def test_the_words_for_going_on_are_those_that_are_asked_for(tmp_path, line):
    section, field, value = CODE[line]
    run = run_that_says(tmp_path / "run", section, line)
    words = words_that_allow(read_toml(run / "config.toml"))
    assert f" --{field} {value}" in words
    assert read_config(None, shlex.split(words), output=None, resume=run)
    assert words_that_allow({"model": {"path": "tiny"}}) == ""


def test_a_run_directory_does_not_say_who_gets_a_secret(tmp_path):
    run = run_that_says(tmp_path / "run", "reward", 'kind = "http"\nurl = "http://x"\nheader_env = "SECRET"')
    with pytest.raises(ConfigError, match=r"reward.url = http://x: is sent the value of reward.header_env"):
        read_config(None, ["--reward.header_env", "SECRET"], output=None, resume=run)


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
