# python -m pytest tests/faults/test_corruption.py
"""Files of checkpoints, runs and exports that are not what was written are refused by name."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from alst_jax.config import UserError
from alst_jax.storage import checksums, run_directory
from alst_jax.storage.checkpoint import Checkpoints
from convert.verify import verify

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run with two checkpoints of one small array, and an export."""
    run_dir = tmp_path_factory.mktemp("intact") / "run"
    run_directory.write_run_file(run_dir, "training", {"flags": {}})
    (run_dir / "model").mkdir()
    (run_dir / "model" / "config.json").write_text('{"rope_theta": 500000}')
    checkpoints = Checkpoints(run_dir)
    for step in (2, 4):
        tree = {"a": {"kernel": jnp.arange(4096, dtype=jnp.float32) + step}}
        checkpoints.save(step, tree, tree, {"step": step, "geometry": {"rows": 2}})
    checkpoints.close()
    (run_dir / "hf").mkdir()
    safetensors.numpy.save_file({"norm": np.arange(64, dtype=np.float32)}, run_dir / "hf" / "model.safetensors")
    checksums.seal_weights(run_dir / "hf")
    return run_dir


@pytest.fixture
def run_dir(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "run")


def read(run_dir: pathlib.Path, step: int = 4) -> None:
    """All that a resumed run reads."""
    checkpoints = Checkpoints(run_dir)
    try:
        checkpoints.restore_loop(step)
        checkpoints.check_run_files(step)
        dict(checkpoints.read_params(step))
        checkpoints.restore_optimizer(step, {})
    finally:
        checkpoints.close()


def flip(file: pathlib.Path, at: float = 0.5, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    file.write_bytes(content)


def data_file(run_dir: pathlib.Path, item: str, step: int = 4) -> pathlib.Path:
    """The largest file of an item: it holds the chunks."""
    return max((run_dir / "checkpoints" / str(step) / item).rglob("*"), key=lambda p: p.stat().st_size * p.is_file())


def test_intact_files_are_read_and_verified(run_dir, capsys):
    with pytest.raises(UserError, match="has the optimizer of another model"):  # read() wants no array of it
        read(run_dir)
    assert verify(run_dir) == 0
    assert [line.split(": ")[-1] for line in capsys.readouterr().out.splitlines()] == ["verified"] * 3


DAMAGES = {
    "flipped in weights": (lambda run: flip(data_file(run, "params")), r"params/\S+ has other content"),
    "flipped in the optimizer": (
        lambda run: flip(data_file(run, "optimizer"), 0.3, 7),
        r"optimizer/\S+ has other content",
    ),
    "flipped in the loop": (
        lambda run: flip(run / "checkpoints/4/loop/metadata", 0.6),
        "loop/metadata has other content",
    ),
    "cut short": (
        lambda run: os.truncate(f := data_file(run, "params"), f.stat().st_size - 1),
        "bytes and was written with",
    ),
    "longer": (lambda run: data_file(run, "params").open("ab").write(b"\0"), "bytes and was written with"),
    "missing": (lambda run: (run / "checkpoints/4/params/_METADATA").unlink(), "params/_METADATA is missing"),
    "of another step": (
        lambda run: shutil.copy(data_file(run, "params", 2), data_file(run, "params")),
        r"params/\S+ has ",
    ),
    "an item of another step": (
        lambda run: shutil.copytree(
            run / "checkpoints/2/optimizer", run / "checkpoints/4/optimizer", dirs_exist_ok=True
        ),
        "optimizer/",
    ),
    "a file too many": (
        lambda run: (
            (run / "checkpoints/4/params/d").mkdir(exist_ok=True) or (run / "checkpoints/4/params/d/stale").touch()
        ),
        "params/d/stale is not one of its files",
    ),
    "another step's folder": (
        lambda run: (
            shutil.rmtree(run / "checkpoints/4") or shutil.copytree(run / "checkpoints/2", run / "checkpoints/4")
        ),
        "it is step 2, under another name",
    ),
    "no checksums": (lambda run: (run / "checkpoints/4/checksums.json").unlink(), "checksums.json is missing"),
    "checksums changed": (lambda run: flip(run / "checkpoints/4/checksums.json"), "checksums.json is damaged"),
    "checksums cut": (lambda run: os.truncate(run / "checkpoints/4/checksums.json", 50), "checksums.json is damaged"),
    "the model's config": (
        lambda run: (run / "model/config.json").write_text('{"rope_theta": 500001}'),
        "model/config.json has other content than was written, since .*--accept",
    ),
    "the run's flags": (lambda run: flip(run / "run.json"), "run.json has other content"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_what_was_not_written_is_refused(run_dir, damage, message):
    damage(run_dir)
    with pytest.raises(UserError, match=message):
        read(run_dir)
    with pytest.raises(UserError, match=message):
        verify(run_dir)


def test_the_command_names_the_file_and_the_newest_checkpoint_that_is_whole(run_dir):
    file = data_file(run_dir, "params")
    flip(file)
    done = subprocess.run(
        [sys.executable, "-m", "convert.verify", str(run_dir)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"{run_dir}/checkpoints/2: verified" in done.stdout and f"{run_dir}/checkpoints/4: DAMAGED" in done.stdout
    assert (
        f"error: {run_dir}/checkpoints/4: {file.relative_to(run_dir / 'checkpoints/4')} has other content"
        in done.stderr
    )
    assert "step 2 was verified. To go on from it: mv " in done.stderr and "Traceback" not in done.stderr


def test_old_checkpoints_load_and_say_that_they_are_not_verified(tmp_path, capfd):
    old = shutil.copytree(ROOT / "tests/data/run-eb801e0/converted", tmp_path / "old")
    checkpoints = Checkpoints(old)
    assert len(dict(checkpoints.read_params(0))) > 10
    checkpoints.close()
    assert "checkpoints/0 was saved without checksums: it is not verified" in capfd.readouterr().err
    assert verify(old) == 1 and "has no checksums: not verified" in capfd.readouterr().out
    assert verify(old, accept=True) == 0 and verify(old) == 0
    flip(data_file(old, "params", 0))
    with pytest.raises(UserError, match="has other content"):
        verify(old)


def test_a_change_of_ones_own_is_accepted(run_dir):
    (run_dir / "model/config.json").write_text('{"rope_theta": 500001}')
    assert verify(run_dir, accept=True) == 0
    checkpoints = Checkpoints(run_dir)
    checkpoints.check_run_files(4)
    checkpoints.close()


@pytest.mark.parametrize("at", [0.05, 0.5, 0.99])
def test_exported_weights_are_verified(run_dir, at):
    hf = run_dir / "hf"
    assert checksums.verify_weights(hf)
    flip(hf / "model.safetensors", at)
    with pytest.raises(UserError, match="hf: model.safetensors has other content than was written.*--accept"):
        checksums.verify_weights(hf)


def test_weights_of_the_hub_are_compared_with_the_names_of_their_files(tmp_path):
    """The hub's cache: snapshots/REVISION/model.safetensors is a link to blobs/SHA256."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    safetensors.numpy.save_file({"norm": np.arange(64, dtype=np.float32)}, blobs / "new")
    assert not checksums.verify_weights(snapshot)
    (digest,) = checksums.hash_files(blobs, ["new"]).values()
    blob = (blobs / "new").rename(blobs / digest[1])
    (snapshot / "model.safetensors").symlink_to(blob)
    assert checksums.verify_weights(snapshot)
    flip(blob)
    with pytest.raises(UserError, match="model.safetensors has other content"):
        checksums.verify_weights(snapshot)


def test_every_file_of_a_checkpoint_is_covered(intact):
    """100 random single bits, whichever file they are in: each is found."""
    rng, folder = random.Random(0), intact / "checkpoints" / "4"
    record = json.loads((folder / "checksums.json").read_text())
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert there == {*record["files"], "checksums.json", "commit_success.txt", "_CHECKPOINT_METADATA"}
    for _ in range(100):
        name = rng.choice([name for name, (size, _) in record["files"].items() if size])
        place = folder / name
        before = place.read_bytes()
        flip(place, rng.random(), rng.randrange(8))
        with pytest.raises(UserError, match=f"{name} has other content"):
            checksums.verify_step(folder)
        place.write_bytes(before)
    assert checksums.verify_step(folder)


def test_an_addition_to_the_data_changes_no_file_that_is_checked(run_dir):
    added = [{"data": ["more.jsonl"], "step": 4, "batches": 5, "hash": "0a"}]
    run_directory.record_added(run_dir, added)
    assert run_directory.read_added(run_dir) == added
    assert verify(run_dir) == 0
