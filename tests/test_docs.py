"""The documentation: every command in it parses, every tutorial runs, every name on it exists, the site builds."""

import ast
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from analysis.figures import FIGURES
from profiling.errors import ConfigError
from profiling.schema import CAUSES, PHASES
from profiling.settings import parse_overrides
from tppo.cli import build_parser, joined_overrides, split_at_dashes

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "hooks"))

import site_links  # noqa: E402
import site_reference  # noqa: E402
import site_shared  # noqa: E402
import site_tutorials  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    tppo .*\n?)+", re.MULTILINE)


def commands(text):
    """The words after `tppo` of every command line in a page's blocks, without comments and redirections."""
    shell = [block for language, block in FENCED.findall(text) if language in ("", "sh")]
    for block in [*shell, *INDENTED.findall(FENCED.sub("", text))]:
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s[|>] ?.*", "", line)
            found = re.match(r"\s*(?:\S+=\S+ )*(?:tppo|(?:torchrun|python) .*-m tppo) (.*)", line)
            if found and not found[1].startswith("("):
                yield shlex.split(found[1], comments=True)


def parse(words):
    """As `tppo` does: options first, then overrides. Raises ConfigError or SystemExit."""
    own, others = split_at_dashes(words)
    words = [*joined_overrides(own), *others]
    options, rest = build_parser(words[0]).parse_known_args([word for word in words if word != "..."])
    if rest and not options.overrides:
        raise ConfigError(f"{rest[0]}: unknown option")
    return options, parse_overrides(rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_a_page_is_one_that_the_program_takes(page):
    for words in commands(page.read_text()):
        if words[0].startswith("COMMAND"):
            continue
        try:
            options, overrides = parse(words)
        except (ConfigError, SystemExit) as error:
            pytest.fail(f"tppo {' '.join(words)}: {error}")
        for name in overrides:
            assert knows(options.command, name), f"tppo {' '.join(words)}: no setting is called {name}"


def knows(command, dotted):
    """Whether a dotted name is a field of the file that the command reads."""
    from profiling.settings import sibling_keys
    from simulator.experiment import Experiment
    from tppo.config import RunConfig

    model = Experiment if command in ("simulate", "sweep") else RunConfig
    *sections, key = dotted.split(".")
    return key in sibling_keys(model, sections)


SPANS = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
OTHERS = {"--algorithm", "--backend-store-uri"}
"""Flags of no parser: a short spelling of ours (joined_overrides), and mlflow's."""
FOLDERS = "tppo|simulator|profiling|analysis|tests|configs|benchmarks|docs"


@pytest.mark.parametrize("page", [p for p in PAGES if "results" not in p.parts], ids=lambda page: page.stem)
def test_every_flag_setting_and_file_in_a_pages_text_exists(page):
    from simulator.experiment import Experiment
    from tppo.config import RunConfig

    parsers = site_reference.subcommands(build_parser())
    flags = {
        flag
        for name in parsers
        for action in site_reference.subcommands(build_parser(name))[name]._actions
        for flag in action.option_strings
    }
    sections = {*RunConfig.model_fields, *Experiment.model_fields}
    for span in SPANS.findall(FENCED.sub("", page.read_text())):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", span):
            assert "." in flag or flag in flags | OTHERS, f"{span}: no command has {flag}"
        dotted = re.fullmatch(r"(?:--)?((\w+)(?:\.\w+)+)(?:[ =].*)?", span)
        if dotted and dotted[2] in sections and not re.search(r"\.(json|parquet|jsonl)$", dotted[1]):
            assert knows("train", dotted[1]) or knows("simulate", dotted[1]), f"no setting is called {dotted[1]}"
        path = re.fullmatch(rf"(?:{FOLDERS})/[\w/.-]+", span)
        assert not path or (ROOT / span).exists(), f"no such file: {span}"


def test_commands_are_found_in_blocks_of_every_kind():
    page = (
        "text\n\n```toml\nx = 1\n```\n\n```\ntppo train run.toml --train.steps 5   # why\n```\n\n"
        "    tppo plan --gpus 8\n\n"
        "```sh\ntorchrun --nproc-per-node 4 -m tppo train X.toml\nmake demo\n"
        "tppo simulate a.toml | grep x\ntppo export R \\\n    --format csv > y\n```\n"
    )
    assert sorted(map(tuple, commands(page))) == [
        ("export", "R", "--format", "csv"),
        ("plan", "--gpus", "8"),
        ("simulate", "a.toml"),
        ("train", "X.toml"),
        ("train", "run.toml", "--train.steps", "5"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", site_tutorials.PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_prints_what_it_shows(page, tmp_path):
    site_tutorials.prepare(tmp_path)
    for output in site_tutorials.run(page.read_text(), tmp_path):
        assert output.agrees, f"shown:\n{output.shown.text}\nprinted:\n{output.printed}"


def test_a_tutorials_blocks_are_files_commands_outputs_or_excused():
    page = (
        '```toml title="a.toml"\nx = 1\n```\n\n```sh\ncat a.toml\n```\n\n```text title="prints"\nx = 1\n```\n\n'
        "*Not run by the tests: needs a GPU.*\n\n```sh\nfalse\n```\n"
    )
    found = list(site_tutorials.blocks(page))
    assert [(b.language, b.is_file, b.is_output, b.reason) for b in found] == [
        ("toml", True, False, ""), ("sh", False, False, ""), ("text", False, True, ""),
        ("sh", False, False, "needs a GPU."),
    ]  # fmt: skip
    assert page[found[2].place] == "x = 1\n"


def test_a_tutorial_writes_its_files_runs_its_commands_and_keeps_what_they_print(tmp_path):
    page = '```toml title="a.toml"\nx = 1\n```\n\n```sh\ncat a.toml\n```\n\n```text title="prints"\nx = 2\n```\n'
    (output,) = site_tutorials.run(page, tmp_path)
    assert (output.printed, output.agrees) == ("x = 1\n", False)
    with pytest.raises(RuntimeError, match="exit code 1"):
        site_tutorials.run("```sh\nfalse\n```\n", tmp_path)


def test_an_output_agrees_whatever_its_columns_widths_but_not_with_another_number():
    assert site_tutorials.agree("│ 1,000 │ a │\n", "│   1,001 │ a │\n")
    assert not site_tutorials.agree("│ 1,000 │ a │\n", "│ 1,020 │ a │\n")
    assert not site_tutorials.agree("│ 1 │ a │\n", "│ 1 │ b │\n")
    assert site_tutorials.have_the_same_columns("┃ device ┃ W ┃\n│ 1 │\n", "┃ device  ┃ W ┃\n│ 2 │\n│ 3 │\n")
    assert not site_tutorials.have_the_same_columns("┃ device ┃\n", "nothing\n")


def test_every_test_on_the_page_of_checks_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (DOCS / "checked.md").read_text())
    assert len(named) > 40
    for path, test in named:
        source = ROOT / path
        assert source.is_file(), path
        functions = {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert not test or test in functions, f"{path}::{test}"


def test_every_function_on_the_page_of_checks_exists():
    page = " ".join((DOCS / "checked.md").read_text().split())
    named = re.findall(r"\[`([\w/]+)\.py`\]\([^)]+\): ((?:`\w+`(?:, )?)+)", page)
    assert len(named) > 15
    for module, functions in named:
        for name in re.findall(r"`(\w+)`", functions):
            assert hasattr(importlib.import_module(module.replace("/", ".")), name), f"{module}.py: {name}"


def entries():
    return re.findall(r"^- \*\*(.+?)\*\*: (.+(?:\n  .+)*)", (DOCS / "glossary.md").read_text(), re.MULTILINE)


def test_the_glossary_has_every_cause_phase_schedule_and_figure():
    from typing import get_args

    from simulator.experiment import ScheduleSettings
    from simulator.plan.question import ScheduleName

    words = set(re.findall(r"`(\w+)`", (DOCS / "glossary.md").read_text()))
    kinds = {site_reference.kind_of(model) for model in get_args(ScheduleSettings)}
    wanted = {*CAUSES, *PHASES, *kinds, *get_args(ScheduleName), *FIGURES} - {"rollout"}
    assert not wanted - words


def test_the_glossary_is_alphabetic_and_short():
    names = [re.sub(r"[^a-z0-9]", "", name.split("`, `")[0].lower()) for name, _ in entries()]
    assert len(names) > 60
    assert names == sorted(names)
    assert all(len(text.splitlines()) <= 2 for _, text in entries())


def test_the_page_of_the_ledger_has_its_causes_in_the_order_in_which_they_win():
    page = (DOCS / "concepts" / "ledger.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == CAUSES


def test_references_name_every_command_and_setting():
    from simulator.experiment import Experiment
    from tppo.commands.train import fields_of
    from tppo.config import RunConfig

    written = site_reference.pages()
    for name in site_reference.subcommands(build_parser()):
        assert f"## tppo {name}\n" in written["reference/cli.md"]
    assert "| `--seed SEED` | first seed | `0` |" in written["reference/cli.md"]
    assert "| `--finished-rows VALUE` |" in written["reference/cli.md"]
    for name, _, _ in fields_of(RunConfig):
        assert f"| `{name.split('.')[-1]}` |" in written["reference/training.md"]
    assert re.search(r"^\| `window` \| .+ \| whole number \| `85` \|$", written["reference/training.md"], re.MULTILINE)
    for section in Experiment.model_fields:
        assert f"## [{section}]\n" in written["reference/experiment.md"]
    assert '### schedule.kind = "truncated"' in written["reference/experiment.md"]
    for name in FIGURES:
        assert f"| `{name}` |" in written["reference/figures.md"]


def test_a_link_to_a_source_goes_to_a_page_that_shows_it_and_others_stay():
    text = "[a](../tppo/cli.py) [b](training.md#lora) [c](https://x.org)\n```\n[e](../tppo/cli.py)\n```\n"
    changed = site_links.for_the_site("docs/planning.md", text, at="planning.md")
    assert changed.startswith("[a](source/tppo/cli.py.md) [b](training.md#lora) [c](https://x.org)")
    assert changed.endswith("```\n[e](../tppo/cli.py)\n```\n")
    assert site_links.sources_in("docs/planning.md", text) == {"tppo/cli.py"}
    assert "def main(" in site_links.source_page("tppo/cli.py")


def test_a_link_that_leads_nowhere_is_left_for_the_build_to_find():
    text = "[a](../tppo/no_such_file.py)"
    assert site_links.for_the_site("docs/planning.md", text, at="planning.md") == text


def test_links_of_the_readme_work_on_the_home_page():
    taken = site_links.for_the_site("README.md", "[t](docs/training.md#lora) [s](tppo/cli.py)", at="index.md")
    assert taken == "[t](training.md#lora) [s](source/tppo/cli.py.md)"


def test_a_page_takes_a_section_or_a_line_and_complains_about_one_that_is_not_there():
    text = "# A\n\n## B\n\none\n\n```\n## not a heading\n```\n\n### C\n\ntwo\n\n## D\n"
    assert site_shared.section(text, "B") == "one\n\n```\n## not a heading\n```\n\n### C\n\ntwo"
    with pytest.raises(LookupError, match=r"docs/index.md: README.md has no section 'Nothing'; name one"):
        site_shared.expanded("docs/index.md", "<!-- section README.md: Nothing -->")
    with pytest.raises(LookupError, match=r"no line of docs/results/demo/README.md begins with 'Xyz'; quote one"):
        site_shared.expanded("docs/checked.md", "<!-- quote results/demo/README.md: Xyz -->")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("mkdocs", reason='the site needs the extra docs: pip install "tppo[docs]"')
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    site = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), strict=True))  # raises on a warning
    return site


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_page(built):
    for page in DOCS.rglob("*.md"):
        where = page.relative_to(DOCS)
        folder = where.parent if where.name in ("README.md", "index.md") else where.with_suffix("")
        assert (built / folder / "index.html").is_file(), where
    for folder in (DOCS / "results").glob("*/README.md"):
        assert f'href="{folder.parent.name}/"' in (built / "results" / "index.html").read_text()
    assert not (built / "hooks").exists()


@pytest.mark.slow
def test_a_page_of_the_site_fetches_nothing_from_elsewhere(built):
    fetched = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(\w+:)?//|<link\b[^>]*href=\"https?://")
    for page in built.rglob("*.html"):
        assert not fetched.search(page.read_text()), page


@pytest.mark.slow
def test_the_api_page_has_the_formulas_and_names_of_the_public_functions(built):
    page = (built / "api" / "index.html").read_text()
    for name in ("egae", "gae", "Truncated", "load_experiment", "simulate", "Profiler", "write_report"):
        assert f"{name}" in page
    assert "delta_t = r_t + gamma V(s_{t+1}) - V(s_t)" in page


def test_the_settings_of_the_site_keep_it_offline():
    text = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in text
    assert "repo_url" not in text
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    assert any(name.startswith("mkdocs-material") for name in scripts)
