# pytest tests/unit/test_layers.py
"""The packages of alst_jax are layers: a file imports only from the layers above its own, and nothing acts when
imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2] / "alst_jax"
LAYERS = (
    "declare",
    "segments",
    "profile",
    "data_flags",
    "lora_flags",
    "watch_flags",
    "extend_flags",
    "process_flags",
    "config",
    "flag_checks",
    "processes",
    "hardware",
    "xla",
    "ops",
    "data",
    "models",
    "parallel",
    "stack",
    "optim",
    "in_backward",
    "step",
    "lowered",
    "storage",
    "metrics",
    "profiling",
    "watch",
    "refused",
    "trainer",
    "at_length",
    "planning",
    "preflight",
    "run_packs",
    "run_data",
    "run_long",
    "run_lora",
    "run_state",
    "run",
    "run_report",
)  # docs/architecture.md
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


@pytest.mark.parametrize(
    "planted",
    [
        "from alst_jax.stack.layer import Layer",
        "import alst_jax.planning.plan",
        "from alst_jax import step",
        "def f():\n    from alst_jax.run import main",
    ],
)
def test_a_planted_upward_import_is_found(planted):
    assert upward("ops/linear.py", planted)
    assert not upward("ops/linear.py", "from alst_jax.xla import order")


IMPORT_ALL = """
import os, pkgutil, importlib, logging
before, filters = dict(os.environ), list(logging.getLogger("absl").filters)
import jax, alst_jax
from orbax.checkpoint._src.serialization import serialization
settings, orbax = dict(jax.config.values), serialization.async_serialize_from_host
for module in pkgutil.walk_packages(alst_jax.__path__, "alst_jax."):
    if module.name != "alst_jax.ops.attention.flash_kernels":  # imports flash-attn-4, when that is used
        importlib.import_module(module.name)
ours = {name: value for name, value in os.environ.items() if before.get(name) != value}
assert not {n for n in ours if n.startswith(("XLA", "JAX", "TOKENIZERS", "TF_"))}, ours
assert dict(jax.config.values) == settings, "jax's settings"
assert serialization.async_serialize_from_host is orbax, "orbax is patched"
assert list(logging.getLogger("absl").filters) == filters, "a filter of the log"
"""


def test_nothing_acts_when_imported():
    """The environment, jax's settings and orbax are as before after every module was imported."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, cwd=ROOT.parent)
    assert not done.returncode, done.stderr
