# python -m pytest tests/faults/test_parts.py
"""What a save holds is the table of storage/parts.py: on disk, in what a resume needs, in convert.verify and
--explain-run."""

import shutil

import numpy as np
import pytest

from alst_jax.config import UserError
from alst_jax.storage import parts, run_directory
from alst_jax.storage.about import explain
from alst_jax.storage.checkpoint import Checkpoints
from convert.verify import verify

LOOP = parts.Loop(3, {"next_index": 5}, 7, {"seq_len": 64})


@pytest.fixture
def run_dir(tmp_path):
    run_directory.write_run_file(tmp_path, "training", {"flags": {}})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.about = {}
    weights, states = {"a": np.ones(8, np.float32)}, {"count": np.ones(1, np.int32)}
    checkpoints.save(3, weights, states, LOOP.to_json())
    checkpoints.close()
    return tmp_path


def test_a_step_holds_each_part_and_nothing_else(run_dir):
    folder = run_dir / "checkpoints" / "3"
    names = {path.name for path in folder.iterdir()} - set(parts.LATE)
    assert names == {"params", "optimizer", "loop", "about.json", "checksums.json"} == {p.name for p in parts.PARTS}
    assert parts.present(folder) == list(parts.PARTS) and parts.missing(folder) == []
    assert Checkpoints(run_dir).restore_run(3) == {
        "step": 3,
        "data": {"next_index": 5},
        "seed": 7,
        "geometry": {"seq_len": 64},
    }


@pytest.mark.parametrize("name", ["step", "data", "geometry"])
def test_each_field_that_a_resume_needs_is_asked_for(tmp_path, name):
    loop = LOOP.to_json()
    assert parts.lacking(loop) == [] and parts.lacking(loop | {name: "text"}) == [name]
    del loop[name]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"a": np.ones(8, np.float32)}, None, loop)
    with pytest.raises(UserError, match=f"checkpoints/3 cannot be read: its loop does not say {name}; "):
        checkpoints.restore_run(3)


@pytest.mark.parametrize(
    "gone, message", [("params", "params not found"), ("loop", "loop not found"), ("optimizer", None)]
)
def test_a_checkpoint_without_checksums_lacks_a_needed_part(run_dir, gone, message, capsys):
    """As runs wrote them before there were checksums. A conversion has no optimizer."""
    folder = run_dir / "checkpoints" / "3"
    (folder / "checksums.json").unlink()
    loop = folder / "loop" / "metadata"
    loop.write_text(loop.read_text().replace('"checksums"', '"other"'))
    assert verify(run_dir) == 1
    shutil.rmtree(folder / gone)
    if message is None:
        assert verify(run_dir) == 1
    else:
        with pytest.raises(UserError, match=message):
            verify(run_dir)


def test_the_parts_are_explained(run_dir):
    (run_dir / "checkpoints/3/about.json").unlink()
    assert "holds     params: weights; optimizer: moments, master weights, count of updates; loop: step, position" in (
        explain(str(run_dir))
    )
