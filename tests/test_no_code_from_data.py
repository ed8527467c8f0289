"""Nothing that is shipped can execute what it reads: the ways to do so are looked for in the syntax of every file."""

import ast
from pathlib import Path

import pytest

from tppo.rewards.worker import _check_math

ROOT = Path(__file__).parent.parent
SOURCES = [
    path for package in ("tppo", "simulator", "profiling", "analysis", "benchmarks")
    for path in sorted((ROOT / package).rglob("*.py"))
]  # fmt: skip
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HARMLESS = {"UnpicklingError"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
SHELLS = {("os", "system"), ("os", "popen"), ("subprocess", "getoutput"), ("subprocess", "getstatusoutput")}
READERS = {"read_pickle", "unsafe_load", "full_load"}


def faults_in(source: str) -> list[str]:
    """A line for each way to execute what is read."""
    return [fault for node in ast.walk(ast.parse(source)) for fault in faults_of(node)]


def faults_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
    if isinstance(node, ast.ImportFrom):
        unpickles = (node.module or "").split(".")[0] in UNPICKLERS
        return [alias.name for alias in node.names if unpickles and alias.name not in HARMLESS]
    if not isinstance(node, ast.Call):
        return []
    given = {word.arg: word.value for word in node.keywords}
    if isinstance(node.func, ast.Name):
        owner, name = "", node.func.id
    elif isinstance(node.func, ast.Attribute):
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else "?"
        name = node.func.attr
    else:
        return []

    def is_true(word: str) -> bool:
        return word in given and not (isinstance(given[word], ast.Constant) and not given[word].value)

    found = {
        name: (owner == "" and name in BUILTINS) or (owner, name) in SHELLS or name in READERS,
        "torch.load": (owner, name) == ("torch", "load") and not _is_constant(given.get("weights_only"), True),
        "yaml.load": (owner, name) == ("yaml", "load"),
        "shell": is_true("shell"),
        "allow_pickle": is_true("allow_pickle"),
        "trust_remote_code": _is_constant(given.get("trust_remote_code"), True),
        "autoescape": name == "Environment" and owner == "jinja2" and not _is_constant(given.get("autoescape"), True),
    }
    return [fault for fault, is_one in found.items() if is_one]


def _is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize(
    "source",
    ["torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=given)",
     "import pickle", "from pickle import loads", "from cloudpickle import loads as safe", "eval(text)", "exec(text)",
     "os.system(text)", "subprocess.run(text, shell=True)", "subprocess.Popen(text, shell=given)",
     "np.load(path, allow_pickle=True)", "yaml.load(text)", "pd.read_pickle(path)",
     "AutoModel.from_pretrained(path, trust_remote_code=True)", "jinja2.Environment()", "__import__(name)"],
)  # fmt: skip
def test_each_way_to_execute_what_is_read_is_found(source):
    assert len(faults_in(source)) == 1


@pytest.mark.parametrize(
    "source",
    ["torch.load(path, weights_only=True)", "from pickle import UnpicklingError", "model.eval()", "re.compile(text)",
     "subprocess.run([text])", "np.load(path, allow_pickle=False)", "json.loads(text)", "simpy.Environment()",
     "AutoModel.from_pretrained(path, trust_remote_code=config.trust)", "jinja2.Environment(autoescape=True)"],
)  # fmt: skip
def test_what_executes_nothing_is_not_complained_of(source):
    assert faults_in(source) == []


def test_no_file_of_ours_executes_what_it_reads():
    assert len(SOURCES) > 200  # they were found
    assert {str(path.relative_to(ROOT)): faults_in(path.read_text()) for path in SOURCES
            if faults_in(path.read_text())} == {}  # fmt: skip


@pytest.mark.parametrize(
    "wrapped",
    ["\\boxed{%s}", "The answer is 1+%s", "\\boxed{\\text{%s}}", "$\\mathrm{%s}$", "$\\operatorname{%s}$", "1+(%s)"],
)
def test_an_answer_that_is_code_is_not_executed_when_it_is_compared(wrapped, tmp_path):
    mark = tmp_path / "executed"
    _check_math({"gold": "2", "text": wrapped % f"__import__('os').mkdir('{mark}')"})
    assert not mark.exists()
