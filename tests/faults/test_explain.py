# python -m pytest tests/faults/test_explain.py
"""--explain-run prints what a checkpoint's numbers depend on. It is written beside each checkpoint, and checksummed."""

import json
import subprocess

import jax
import numpy as np
import pytest

import train
from alst_jax import run_report, run_state
from alst_jax.config import TrainConfig, UserError
from alst_jax.planning.job import Job
from alst_jax.storage import about, checksums, run_directory
from alst_jax.storage.checkpoint import Checkpoints
from tests.helpers import TINY, make_step


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    config = TrainConfig(model="m", data=("d.jsonl",), seq_len=64, learning_rate=3e-4, out=str(run_dir))
    step = make_step(dp=2, sp=2)
    job = Job(TINY, step.profile, 2, 64, 2, 2, 1, "float32", "float32")
    run_directory.write_run_file(run_dir, "training", {"flags": {"learning_rate": 1.0}})
    checkpoints = Checkpoints(run_dir)
    checkpoints.about = run_report.about_run(
        config, step, job, run_state.geometry(config, job, np.dtype("float32"), "0a1b"), None
    )
    for number in (1, 2):
        checkpoints.save(number, {"a": np.zeros(4, np.float32)}, None, {"step": number})
    checkpoints.close()
    return run_dir


def test_all_of_it_is_printed(run_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--explain-run", str(run_dir)])
    assert train.main() == 0
    lines = capsys.readouterr().out.splitlines()
    line = lambda start: next(line for line in lines if line.startswith(start))
    assert lines[0] == f"{run_dir}/checkpoints/2"
    assert f"jax {jax.__version__}, " in line("versions") and "transformers 5." in line("versions")
    assert "4 x cpu, dp 2 x sp 2" in line("devices") and "cores" in line("host")
    assert about.git_revision() in line("program")
    assert "rows 2, length 64, grad_accum 1" in line("shapes") and "data 0a1b, seed 0, samples_per_step 2" in line(
        "settings"
    )
    assert "remat False" in line("profile") and line("plan").startswith("plan      none: the flags alone")
    assert line("  attention").split() == ["attention", "xla", "(the", "only", "one", "without", "a", "GPU)"]
    assert "  --learning-rate 0.0003" in lines and "  --beta1 0.9  (default)" in lines and "  --data d.jsonl" in lines


def test_every_flag_is_there(run_dir):
    record = json.loads((run_dir / "checkpoints/2/about.json").read_text())
    assert record["flags"].keys() == vars(TrainConfig()).keys()
    assert record["settings"].keys() == {
        "data",
        "seed",
        "samples_per_step",
        "seq_len",
        "dtype",
        "optimizer_states",
        "master_weights",
        "freeze",
        "rope_scaling",
        "rope_factor",
        "rope_theta",
    }


def test_it_is_covered_by_the_checksums(run_dir):
    folder = run_dir / "checkpoints" / "1"
    before = (folder / "about.json").read_text()
    (folder / "about.json").write_text(before.replace("0.0003", "0.0004"))
    with pytest.raises(UserError, match="about.json has other content"):
        checksums.verify_step(folder)
    (folder / "about.json").write_text("[]")
    with pytest.raises(UserError, match="about.json is not what a run writes.*python -m convert.verify"):
        about.explain(str(folder))


def test_older_runs_show_what_they_have(tmp_path):
    run_directory.write_run_file(tmp_path, "training", {"flags": {"learning_rate": 0.5}})
    with pytest.raises(UserError, match="the run has saved no checkpoint yet"):
        about.explain(str(tmp_path))
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    text = about.explain(str(tmp_path))
    assert f"jax {jax.__version__}" in text and "--learning-rate 0.5" in text and "saved without about.json" in text
    with pytest.raises(UserError, match="no checkpoint there"):
        about.explain(str(tmp_path / "nowhere"))


def test_the_revision_says_whether_files_were_changed(tmp_path):
    assert about.git_revision(tmp_path) is None
    git = lambda *words: subprocess.run(
        ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "a")
    assert about.git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a.py").write_text("2")
    assert about.git_revision(tmp_path) == git("rev-parse", "HEAD") + " with changes"
