# pytest tests/unit/test_how_it_works.py
"""docs/how-it-works.md: its table and pictures are current, its arithmetic is right, its code exists and runs."""

import ast
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

from benchmarks.shapes import LLAMA_8B

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import draw_ideas  # noqa: E402
import draw_ladder  # noqa: E402

PAGE = draw_ladder.PAGE.read_text(encoding="utf-8")
SUMS = re.findall(r"`([\d*+() ]+)`(?: bytes)? = ([\d.]+) GiB", PAGE.replace("\n", " "))


def test_the_ladder_is_current():
    assert draw_ladder.page(PAGE) == PAGE, "run: python docs/draw_ladder.py"
    assert draw_ladder.PICTURE.read_text() == draw_ladder.draw(), "run: python docs/draw_ladder.py"


def test_the_last_rung_fits_and_no_other_does():
    device, host = draw_ladder.limits()
    fits = [rung.device <= device and rung.host <= host for rung in draw_ladder.rungs()]
    assert fits == [False] * (len(fits) - 1) + [True]


def test_the_pictures_are_current():
    for name, svg in draw_ideas.pictures().items():
        assert (ROOT / "docs" / name).read_text() == svg, "run: python docs/draw_ideas.py"
    before, after = (gib for _, gib in draw_ideas.IDEAS[4].bars)
    found = {rung.name: rung.device for rung in draw_ladder.rungs()}
    assert found["+ tiled MLP"] == pytest.approx(before, abs=0.05)
    assert found["+ layer inputs in host memory"] == pytest.approx(after, abs=0.05)


def test_the_arithmetic():
    assert len(SUMS) >= 12
    for factors, gib in SUMS:
        assert f"{eval(factors) / 2**30:.1f}" == gib, factors
    assert str(LLAMA_8B.num_params) in PAGE
    assert (LLAMA_8B.hidden_size, LLAMA_8B.intermediate_size, LLAMA_8B.num_layers) == (4096, 14336, 32)


def names_in(file: pathlib.Path) -> set[str]:
    """Functions and classes of a file, and `Class.method`."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_code_that_is_named_exists():
    paragraphs = re.findall(r"^Code: (.*?)\n\n", PAGE, re.M | re.S)
    assert len(paragraphs) == 6
    for paragraph in paragraphs:
        names = set()
        for word in re.findall(r"`([\w./]+)`", paragraph):
            if word.endswith(".py"):
                names = names_in(ROOT / "alst_jax" / word)
            else:
                assert word in names, word


def test_the_block_runs():
    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", PAGE, re.S)[1], "docs/how-it-works.md", "exec"), names)
    attention = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    wanted = names["block"](names["h_BTD"], names["tokens"], attention)
    np.testing.assert_array_equal(names["next_h_BTD"], wanted)
    assert (names["q_BTNH"].shape, names["k_BTKH"].shape) == ((1, 16, 8, 8), (1, 16, 2, 8))
