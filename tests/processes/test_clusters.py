# pytest tests/processes/test_clusters.py
"""The SLURM script of docs/clusters.md, with programs in the place of srun and scontrol."""

import os
import pathlib
import re
import subprocess

import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "clusters.md"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (1, False), (143, True)])
@pytest.mark.parametrize("saved", [False, True])
def test_a_job_at_its_time_limit_is_requeued_and_goes_on(tmp_path, code, requeued, saved):
    """143: SIGTERM came, and the state is saved (test_train.py). A mistake (2) or a death (1) is not requeued."""
    (script,) = re.findall(r"## SLURM\n```bash\n(.*?)```", PAGE.read_text(), re.S)
    run, calls = tmp_path / "books", tmp_path / "calls"
    (run / "checkpoints" / ("100" if saved else "100.orbax-checkpoint-tmp")).mkdir(parents=True)
    for name, body in {"srun": f"exit {code}", "scontrol": ""}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/bash\necho {name} "$@" >> {calls}\n{body}\n')
        program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script.replace("/shared/runs/books", str(run))],
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77"},
        capture_output=True,
        text=True,
    )
    called = calls.read_text()
    assert done.returncode == code and "--signal=TERM@600" in script and "--requeue" in script, done.stderr
    assert ("scontrol requeue 77" in called) == requeued
    assert ("--resume" in called) == saved and ("--model" in called) == (not saved)
