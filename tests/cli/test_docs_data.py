# python -m pytest tests/cli/test_docs_data.py
"""The rows of docs/data.md that show a record: the command reads it."""

import json
import pathlib
import shlex
import shutil
import sys

import pytest

import train
from alst_jax.hardware import environment

ROOT = pathlib.Path(__file__).parents[2]
TEMPLATES = {"tools.jinja": "qwen2.5.jinja", "thoughts.jinja": "qwen3.jinja"}


def rows():
    """(what one has, record, flags) of the table."""
    for line in (ROOT / "docs/data.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
        if len(cells) == 3 and cells[1].startswith("{"):
            yield pytest.param(json.loads(cells[1]), shlex.split(cells[2]), id=cells[0])


@pytest.mark.parametrize("record, flags", rows())
def test_the_command_of_a_row_learns_from_its_record(record, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "prepare", lambda *_, **__: None)
    pathlib.Path(flags[flags.index("--data") + 1]).write_text(json.dumps(record))
    for name, family in TEMPLATES.items():
        shutil.copyfile(ROOT / "tests/data/templates" / family, name)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--show-samples", "1"])
    code = train.main()
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    learned = [part.partition("]]")[0] for part in out.split("[[")[1:]]
    assert learned and not any("Go away." in text for text in learned)
    assert "2+3?" not in "".join(learned) or "all" in flags


def test_there_are_rows():
    assert len(list(rows())) >= 16
