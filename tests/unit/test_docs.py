# pytest tests/unit/test_docs.py
"""README.md and docs/: links lead somewhere, pictures are current, no package and no field is missing."""

import ast
import dataclasses
import pathlib
import re
import sys

import pytest

from alst_jax.config import TrainConfig
from alst_jax.declare import flag
from alst_jax.profile import MemoryFlags
from tests.unit.test_layers import LAYERS

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import draw_architecture  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = [link.partition("#")[0] for link in LINK.findall(page.read_text()) if not link.startswith("http")]
        waiting += [(page.parent / link).resolve() for link in links if link]
    assert not set(map(pathlib.Path.resolve, PAGES)) - reached


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_architecture_names_every_layer():
    page, picture = (ROOT / "docs" / "architecture.md").read_text(), draw_architecture.PICTURE.read_text()
    drawn = re.findall(r"\w+", " ".join(re.findall(r'font-weight="bold"[^>]*>([^<]*)<', picture)))
    assert set(drawn) == set(LAYERS), "run: python docs/draw_architecture.py"
    assert [layer for layer in LAYERS if f"`{layer}.py`" not in page and f"`{layer}/`" not in page] == []
    assert [
        layer
        for layer in LAYERS
        if not any(layer in layers and purpose for layers, purpose in draw_architecture.boxes())
    ] == []


RENAMED = {  # copied from a run
    "extend-loss.svg": "loss-by-position.svg",
    "extend-needle.svg": "needle.svg",
    "extend-smollm2-loss.svg": "loss-by-position.svg",
    "extend-smollm2-before.svg": "needle.svg",
    "extend-smollm2-after.svg": "needle.svg",
}


def test_every_picture_is_made_by_a_script():
    scripts = "".join(
        path.read_text()
        for path in [
            *(ROOT / "docs").glob("*.py"),
            *(ROOT / "benchmarks").glob("*.py"),
            *(ROOT / "alst_jax" / "at_length").glob("*.py"),
        ]
    )
    for page in PAGES:
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            name = RENAMED.get(pathlib.Path(picture).name, pathlib.Path(picture).name)
            assert re.sub(r"\d", "{n}", name) in scripts or name in scripts, picture


def test_the_page_of_memory_flags_has_every_flag():
    page = (ROOT / "docs" / "memory-flags.md").read_text()
    assert [field.name for field in dataclasses.fields(MemoryFlags) if f"`{flag(field.name)}" not in page] == []


FOREIGN = {  # of uv, of converters and campaigns, of benchmarks, of launchers (docs/clusters.md)
    "--extra",
    "--help",
    "--accept",
    "--results",
    "--megabytes",
    "--longest",
    "--compiled",
    "--alone",
    "--ways",
    "--models",
    "--lengths",
    "--measure",
    "--python",
    "--folder",
} | {
    f"--{name}"
    for name in (
        "nodes requeue gpus-per-node kill-on-bad-exit gpus-per-task ntasks-per-node map-by open-mode bind-to hostfile "
        "signal cpus-per-task job-name mem time"
    ).split()
}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_flags_and_modules_that_are_named_exist(page):
    text = page.read_text()
    known = {flag(field.name) for field in dataclasses.fields(TrainConfig)}
    known |= {f"--no-{name[2:]}" for name in known} | FOREIGN
    named = re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*[a-z0-9])", text)
    assert [name for name in named if name not in known] == []
    for module in re.findall(r"python -m ((?:benchmarks|convert|tests)[\w.]*)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for script in re.findall(r"python (docs/\w+\.py)", text):
        assert (ROOT / script).is_file(), script


METRICS = (ROOT / "docs" / "metrics.md").read_text()


def written() -> set[str]:
    """The keys of dictionaries, as the code that writes metrics.jsonl spells them."""
    keys = set()
    for name, functions in (("trainer", ("optimizer_step", "evaluate_sources", "train")), ("metrics", ("speed",))):
        for node in ast.walk(ast.parse((ROOT / "alst_jax" / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in functions:
                keys |= {
                    key.value
                    for part in ast.walk(node)
                    if isinstance(part, ast.Dict)
                    for key in part.keys
                    if isinstance(key, ast.Constant)
                }
    return keys - {""}


def test_the_page_of_metrics_has_every_field():
    assert {"loss", "grad_norm", "compilations", "tokens_per_second"} <= written()
    assert [key for key in written() if f"`{key}`" not in METRICS] == []
