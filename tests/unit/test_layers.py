# pytest tests/unit/test_layers.py
"""The packages of alst_jax are layers: a file imports only from the layers above its own, and nothing acts when imported."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2] / "alst_jax"
LAYERS = ("config", "hardware", "profile", "xla", "ops", "data", "models", "parallel", "stack", "optim", "in_backward", "step",
          "storage", "metrics", "trainer", "planning", "run")  # docs/architecture.md
ORDER = {name: number for number, name in enumerate(LAYERS)}


def imports(source: str) -> set[str]:
    """Dotted names below alst_jax that a file imports, at its top or inside of functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide their layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("alst_jax.") for name in names if name.startswith("alst_jax.")}


def upward(file: str, source: str) -> list[str]:
    """Imports of a file (its path below alst_jax) from its own layer's outside or from a later layer."""
    mine = file.removesuffix(".py").split("/")[0]
    layers = {name.split(".")[0] for name in imports(source)}
    return sorted(f"{file} imports {layer}" for layer in layers if layer != mine and ORDER[layer] > ORDER[mine])


FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file):
    if file != "__init__.py":
        assert not upward(file, (ROOT / file).read_text())


def test_every_file_has_a_layer():
    assert {file.removesuffix(".py").split("/")[0] for file in FILES} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("planted", ["from alst_jax.stack.layer import Layer", "import alst_jax.planning.plan",
                                     "from alst_jax import step", "def f():\n    from alst_jax.run import main"])
def test_a_planted_upward_import_is_found(planted):
    assert upward("ops/linear.py", planted)
    assert not upward("ops/linear.py", "from alst_jax.xla import order")
