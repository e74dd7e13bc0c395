# pytest tests/unit/test_python_api.py
"""docs/python-api.md: its examples run, and its table names every program of a step."""

import inspect
import pathlib
import re

import jax
import numpy as np
import pytest

from alst_jax.parallel.program import Program
from alst_jax.step import TrainStep
from tests.helpers import make_step

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python-api.md").read_text()
TRAINING, TILING = re.findall(r"```python\n(.*?)```", PAGE, re.S)
PROGRAMS = {name: value for name, value in vars(TrainStep).items() if isinstance(value, Program)}


def test_thirty_lines_train():
    assert len(TRAINING.splitlines()) <= 30 and "train.py" not in TRAINING
    names = {}
    exec(compile(TRAINING, "docs/python-api.md", "exec"), names)
    losses = names["losses"]
    assert losses[0] == pytest.approx(np.log(256), abs=0.3)  # each of 256 tokens is equally likely at first
    assert losses[-1] < losses[0] - 2
    assert names["step"].mesh.shape["seq"] == jax.device_count() > 1


def test_a_function_of_ones_own_is_tiled():
    names = {}
    exec(compile(TILING, "docs/python-api.md", "exec"), names)
    loss, arguments = names["loss"], (names["x_TD"], names["weights"])
    value, gradients = jax.jit(jax.value_and_grad(lambda *x: loss(*x, None), argnums=(0, 1)))(*arguments)
    np.testing.assert_allclose(names["value"], value, rtol=1e-5)
    for ours, untiled in zip(jax.tree.leaves(names["gradients"]), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, untiled, rtol=1e-5, atol=1e-5 * np.abs(untiled).max())
    text = lambda tile: str(jax.make_jaxpr(jax.grad(lambda *x: loss(*x, tile), argnums=(0, 1)))(*arguments))
    assert "[1000,64]" in text(None) and "[1000,64]" not in text(128)  # the hidden activations of all tokens


def test_programs_are_methods_with_docstrings():
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == PROGRAMS.keys()
    for name in PROGRAMS:
        method = getattr(TrainStep, name)
        assert len(inspect.getdoc(method)) > 40 and list(inspect.signature(method).parameters)[0] == "self", name
    step = make_step()
    assert step.loss is step.loss and hasattr(step.loss, "lower") and step.loss is not make_step().loss
