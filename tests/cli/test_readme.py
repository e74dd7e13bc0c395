# pytest tests/cli/test_readme.py
"""What README.md tells a newcomer to type."""

import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import tyro

import train
from alst_jax.flag_checks import check_run

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks."""
    blocks = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", page, re.S | re.M) if kind in ("", "sh")]
    return [line.partition("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]


COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.replace("\\\n", " ").splitlines()
]
PAGES = sorted(
    {
        line
        for page in (ROOT / "docs").glob("*.md")
        for line in commands(page.read_text())
        if re.match(r"(uv run |python )(--extra \w+ )*train\.py", line) and " ... " not in line
    }
)


def test_readme_has_commands_and_ci_runs_its_test_command():
    tests = [line for line in COMMANDS if "pytest" in line]
    assert len(tests) == 1 and tests[0].startswith("uv run ")
    assert "grep -m1 '^uv run .*pytest' README.md" in (ROOT / ".ci" / "run").read_text()
    assert "uv run train.py" in COMMANDS and len(COMMANDS) >= 6


@pytest.mark.parametrize("command", dict.fromkeys([line for line in COMMANDS if "train.py" in line] + PAGES))
def test_training_commands_have_flags_that_exist(command):
    arguments = shlex.split(command.partition("train.py")[2])
    if "--resume" in arguments:
        config = tyro.cli(train.TrainConfig, args=arguments)
    else:
        config = train.parse(arguments)
    check_run(config)


@pytest.mark.parametrize("command", [line for line in COMMANDS if " -m " in line])
def test_modules_of_commands_exist(command, monkeypatch, capsys):
    module = command.split(" -m ")[1].split()[0]
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)  # as python -m does, once more where it is imported already
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert stopped.value.code in (0, None) and "usage:" in capsys.readouterr().out


# train.py, with one topic held out instead of three: an evaluation of 44,449 tokens takes 17 s.
TRAIN = """
import runpy, sys
from alst_jax.data import embedded
embedded.HELD_OUT_EVERY = 25
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_without_flags_a_model_learns(tmp_path):
    """The first command, a few short steps of it: sequence parallelism is on, the loss falls, a Hugging Face directory
    is left."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, ROOT / "train.py", "--steps", "6", "--seq-len", "512"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "mesh    dp 1 x sp 4 on cpu" in done.stdout and "eval loss" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert [field for line in lines for field in line if f"`{field}`" not in page] == []
    losses = [line["loss"] for line in lines]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1
    assert (run / "hf" / "model.safetensors").is_file()
