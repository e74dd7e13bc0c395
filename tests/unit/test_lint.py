# pytest tests/unit/test_lint.py
"""ruff has nothing to say of the rules in pyproject.toml, and nothing to format. Files and functions are short, and tests
use public names alone."""

import ast
import functools
import pathlib
import subprocess
import sys
import textwrap
import warnings

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCES = sorted(file for name in ("alst_jax", "convert", "benchmarks") for file in (ROOT / name).rglob("*.py"))
MOST_LINES, LONG, MOST_PARAMETERS = 300, 60, 8  # of a file; lines at which a function is long


@pytest.mark.parametrize("command", [("check", "--output-format", "concise"), ("format", "--check")])
def test_ruff_finds_nothing(command):
    command = [sys.executable, "-m", "ruff", *command, "--no-cache", "--quiet", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------------------- lengths


@functools.lru_cache(1)
def nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def functions(source: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in nodes(source) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def long_functions(source: str) -> list[str]:
    """Functions of LONG lines or more, decorators apart."""
    return [f.name for f in functions(source) if f.end_lineno - f.lineno + 1 >= LONG]


def wide_functions(source: str) -> list[str]:
    """Functions of more than MOST_PARAMETERS parameters, self and cls apart."""
    found = []
    for function in functions(source):
        names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        if len(names) - (names[:1] in (["self"], ["cls"])) > MOST_PARAMETERS:
            found.append(function.name)
    return found


def test_files_and_functions_are_short():
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in (*SOURCES, *TESTS)}
    assert [file for file, text in texts.items() if len(text.splitlines()) > MOST_LINES] == []
    ours = {file: text for file, text in texts.items() if not file.startswith("tests")}
    assert len(ours) > 150 and len(texts) - len(ours) > 150  # the folders were found
    assert {file: found for file, text in ours.items() if (found := long_functions(text) + wide_functions(text))} == {}


def test_a_long_or_wide_function_is_found():
    of = lambda lines: "def f():\n" + "    x = 1\n" * (lines - 1)
    assert long_functions(of(59)) == [] and long_functions(of(60)) == long_functions("async " + of(60)) == ["f"]
    assert long_functions("class C:\n" + textwrap.indent(of(60), "  ")) == ["f"]
    assert wide_functions("def f(self, a, b, c, d, e, *, f, g, h): 1") == []
    assert wide_functions("def f(a, /, b, c, d, e, *, f, g, h, i): 1") == ["f"]


# -------------------------------------------------------------------------------------------------------- private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(source: str) -> set[str]:
    """The private names of a file: functions, classes, and what is assigned to names and attributes."""
    found = {function.name for function in functions(source)}
    for node in nodes(source):
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return set(filter(is_private, found))


def used(source: str, private: set[str]) -> list[str]:
    """The names among `private` that a test imports, reads from an object, or writes as a text: for setattr, or in a
    program of its own. `self._name` is the test's own."""
    found = []
    for node in nodes(source):
        if isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name in private]
        elif isinstance(node, ast.Attribute) and node.attr in private:
            found += [node.attr] * (not isinstance(node.value, ast.Name) or node.value.id != "self")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if is_program(node.value):
                found += used(node.value, private)
            elif (name := node.value.split(".")[-1]) in private:
                found.append(name)
    return found


def is_program(text: str) -> bool:
    if "import " not in text:
        return False
    try:
        with warnings.catch_warnings(action="ignore"):  # of regular expressions
            return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(text).body)
    except SyntaxError:
        return False


def test_tests_use_public_names():
    private = set().union(*(defined(file.read_text()) for file in (ROOT / "train.py", *SOURCES)))
    assert len(private) > 300
    assert {file.name: found for file in TESTS if (found := used(file.read_text(), private))} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "from alst_jax.data.cache import _f",
        "import alst_jax.run\nalst_jax.run._f()",
        "def test(log):\n    log.writer._f = 1",
        "monkeypatch.setattr(cache, '_f', None)",
        "monkeypatch.setattr('alst_jax.run._f', None)",
        "SCRIPT = 'from alst_jax import run\\nrun._f()'",
    ],
)
def test_a_private_name_in_a_test_is_found(planted):
    for source in ("def _f(): 1", "class _f: 1", "_f = 1", "def f(self):\n    self._f = 1"):
        assert used(planted, defined(source)) == ["_f"]
    assert not used(planted.replace("_f", "f"), {"_f"})


def test_names_of_the_test_itself_are_its_own():
    assert not used("def _f(self):\n    '''It calls run._f().'''\n    return self._f", {"_f"})
    assert not defined("def __init__(self):\n    a, _ = self.__b = 1, 2")
