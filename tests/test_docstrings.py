"""Docstrings say what a caller cannot see: errors, shapes, sources. What is checked is what a machine can check."""

import ast
import re
from pathlib import Path

import pytest

from profiling import errors

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tppo", "simulator", "profiling", "analysis")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OURS = {name for name, own in vars(errors).items() if isinstance(own, type) and issubclass(own, errors.ToolkitError)}
OURS |= {"EngineError", "RewardError", "NotFinite"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FORMULAS = ROOT / "tppo" / "algorithms"


def name_of(path):
    return str(path.relative_to(ROOT))


def public_functions(path):
    """Of a module and its public classes."""
    body = ast.parse(path.read_text()).body
    classes = [own for own in body if isinstance(own, ast.ClassDef) and not own.name.startswith("_")]
    for node in [*body, *(method for own in classes for method in own.body)]:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield node


def raised_in(function):
    """Names of our errors that it raises itself, not in a function of its own."""
    left, found = list(function.body), set()
    while left:
        node = left.pop()
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
        left += ast.iter_child_nodes(node)
    return found & OURS


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package):
    without = [name_of(path) for path in MODULES if path.parts[-1] != "__main__.py" and package in path.parts
               and not ast.get_docstring(ast.parse(path.read_text()))]  # fmt: skip
    assert without == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_public_function_with_a_docstring_names_the_errors_that_it_raises(package):
    silent = [
        f"{name_of(path)}: {function.name} raises {error}"
        for path in MODULES if package == path.relative_to(ROOT).parts[0]
        for function in public_functions(path) if (said := ast.get_docstring(function))
        for error in raised_in(function) if error not in said
    ]  # fmt: skip
    assert silent == []


def test_every_tensor_of_a_formula_has_its_shape():
    bare = [
        f"{name_of(path)}: {function.name}({argument.arg})"
        for path in FORMULAS.glob("*.py")
        for function in public_functions(path)
        for argument in [*function.args.args, *function.args.kwonlyargs]
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Tensor"
    ]
    assert bare == []


def test_every_formula_has_its_source():
    """In its own docstring or its module's: a paper, a standard name, or the implementation that it follows."""
    source = re.compile(r"\d{4}\.\d{4,5}|METHOD|TRL|verl|Blelloch", re.IGNORECASE)
    without = [
        name_of(path) for path in FORMULAS.glob("*.py")
        if path.name != "__init__.py" and any(True for _ in public_functions(path))
        and not source.search(path.read_text())
    ]  # fmt: skip
    assert without == []


def documented():
    """Names that the page of the API shows."""
    return re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


def test_everything_on_the_page_of_the_api_has_a_docstring():
    import importlib

    names = documented()
    assert len(names) > 10
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
                break
            except ModuleNotFoundError:
                continue
        for part in parts[cut:]:
            found = getattr(found, part)
        assert (found.__doc__ or "").strip(), name


def test_an_error_that_a_docstring_leaves_out_is_found():
    source = "def f(x):\n    if x:\n        raise ConfigError(1)\n    def g():\n        raise DataError(2)\n"
    (function,) = ast.parse(source).body
    assert raised_in(function) == {"ConfigError"}
