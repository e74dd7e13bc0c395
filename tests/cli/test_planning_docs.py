# pytest -m slow tests/cli/test_planning_docs.py
"""The outputs that docs/planning.md shows are current; so is the profile of docs/how-it-works.md."""

import json
import pathlib
import re
import shlex
import sys

import pytest

import train
from alst_jax.hardware import environment
from alst_jax.models.hf_config import hf_config_dict
from alst_jax.profile import Profile
from benchmarks.shapes import LLAMA_8B

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "planning.md").read_text()
sys.path.insert(0, str(DOCS))
import draw_ladder  # noqa: E402


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """printed(command): its output, with a config.json of Llama-8B at `path/to/llama-8b`."""
    directory = tmp_path / "path" / "to" / "llama-8b"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf_config_dict(LLAMA_8B)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "prepare", lambda *_, **__: None)

    def run(command):
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(command.partition("train.py")[2])])
        assert train.main() == 0
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_plan_is_current(printed):
    command, output = re.search(r"```sh\n(.*--plan-only.*)\n```\n\n```\n(.*?)```", PAGE, re.S).groups()
    assert printed(command) == output


@pytest.mark.slow
def test_the_longest_length_is_current(printed):
    command, length = re.search(r"```sh\n(.*--find-max-seq-len.*)\n```\n\nprints ([\d,]+) tokens", PAGE).groups()
    assert printed(command).startswith(f"longest sequence: {length} tokens")


@pytest.mark.slow
def test_the_last_rung_of_the_ladder_is_the_choice(printed):
    (command,) = [line for line in draw_ladder.PAGE.read_text().splitlines() if "--plan-only" in line]
    (line,) = [line for line in printed(command).splitlines() if line.startswith("memory: ")]
    changes = draw_ladder.START | {name: value for _, more, _ in draw_ladder.RUNGS for name, value in more.items()}
    for flag in Profile(**changes).flags():
        assert f"{flag} " in line, line
