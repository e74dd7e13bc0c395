# python -m pytest tests/faults/test_kills.py
"""A run that is killed goes on as if it had never been: a few kills of tests/faults/campaign_kills.py."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.faults import kills
from tests.faults.campaign_kills import MOST
from tests.faults.kills import Kill

ROOT = pathlib.Path(__file__).parents[2]


def campaign(tmp_path, *stages: str) -> list[dict]:
    """The trials of a campaign with a kill at each of the stages."""
    command = [
        sys.executable,
        "-m",
        "tests.faults.campaign_kills",
        "999",
        "--results",
        str(tmp_path / "r"),
        "--stages",
        *stages,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]


@pytest.mark.slow  # two of twelve runs on a busy machine ended in XLA's collectives on CPUs
@pytest.mark.timeout(1800)
def test_killed_between_the_last_byte_and_the_final_name(tmp_path):
    """Call 7 of `committing` is in the save of the second step: the run goes on from the first."""
    (line,) = campaign(tmp_path, "committing:7")
    assert line["kills"] == ["committing 7"] and line["exit_codes"] == [-9, 0, 0] and line["same"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_each_stage(tmp_path):
    lines = campaign(
        tmp_path,
        "starting:2",
        "loading:3",
        "caching:3",
        "stepping:5",
        "logging:4",
        "saving:9",
        "committing:10",
        "rotating:5",
        "exporting:7",
    )
    assert [line["kills"] for line in lines] == [
        [kill.replace(":", " ")]
        for kill in (
            "starting:2",
            "loading:3",
            "caching:3",
            "stepping:5",
            "logging:4",
            "saving:9",
            "committing:10",
            "rotating:5",
            "exporting:7",
        )
    ]
    assert all(line["same"] for line in lines)


def test_the_stages_name_functions_that_are_there():
    stages = kills.stages()
    assert stages.keys() == MOST.keys()
    assert all(callable(getattr(owner, name)) for functions in stages.values() for owner, name in functions)
    assert str(Kill("saving", 3)) == "saving 3" and str(Kill(seconds=1.5)) == "after 1.50 s"
