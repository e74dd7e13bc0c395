# python -m pytest tests/faults/test_disk.py
"""A disk that is full, has no inodes, is read-only or gone: one line that says what is safe; the last checkpoint
loads."""

import errno
import os
import resource
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import train
from alst_jax import metrics
from alst_jax.config import UserError
from alst_jax.metrics import MetricsLog
from alst_jax.storage import disk, run_directory
from alst_jax.storage.checkpoint import Checkpoints
from convert.verify import verify


def weights(size: int):
    return {"a": {"kernel": jnp.asarray(np.random.default_rng(size).normal(size=size), jnp.float32)}}


def refused(run_dir, change, caplog) -> str:
    """The words of a save that fails after `change`. The checkpoint before it is whole, nothing of the new one is
    left."""
    run_directory.write_run_file(run_dir, "training", {"flags": {}})
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, weights(1000), weights(1000), {"step": 1})
    change()
    with pytest.raises(UserError) as error:
        checkpoints.save(2, weights(500_000), None, {"step": 2})
    checkpoints.close()
    assert [p.name for p in (run_dir / "checkpoints").iterdir() if p.name != "1"] == []
    assert (
        f"Step 1 is saved in {run_dir}/checkpoints; go on from it with: python train.py --resume --out {run_dir}"
        in str(error.value)
    )
    assert verify(run_dir) == 0
    assert not caplog.records  # orbax's threads log tracebacks
    return str(error.value)


@pytest.fixture
def small(tmp_path):
    """A file system of 1 MiB and 150 files."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=150", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(small, caplog):
    words = refused(small / "run", lambda: None, caplog)
    assert words.startswith("the checkpoint of step 2 cannot be written: ") and "\n" not in words
    assert "No space left on device; free space there, or inodes (df -h and df -i" in words


def test_no_inodes(small, caplog):
    def use_up():
        with pytest.raises(OSError, match="No space"):
            for number in range(200):
                (small / f"file-{number}").touch()

    assert "No space left on device" in refused(small / "run", use_up, caplog)


def test_files_that_are_too_large(tmp_path, caplog):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
        words = refused(tmp_path / "run", limit, caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large; raise the limit on the size of files (ulimit -f)" in words


def test_a_read_only_disk(small):
    remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", small], check=True)
    run_dir = small / "run"
    run_directory.write_run_file(run_dir, "training", {"flags": {}})
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, weights(1000), None, {"step": 1})
    remount("ro")
    try:
        with pytest.raises(UserError, match="Read-only file system; make it writable: .*Step 1 is saved in"):
            checkpoints.save(2, weights(1000), None, {"step": 2})
        assert verify(run_dir) == 0
    finally:
        remount("rw")


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "/data/x.txt: No space left on device; free space there"),
        (errno.EROFS, "Read-only file system; make it writable"),
        (errno.EACCES, "Permission denied; give this user the right"),
        (errno.ESTALE, "Stale file handle; mount the network file system again"),
        (errno.EIO, "Input/output error; check the disk"),
        (errno.ENOENT, "/data/x.txt: No such file or directory; put it back"),
        (errno.EDQUOT, "free space of your quota there"),
    ],
)
def test_train_py_ends_with_one_line(monkeypatch, capsys, tmp_path, number, words):
    def fails(config):
        raise OSError(number, os.strerror(number), "/data/x.txt")

    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    monkeypatch.setattr(train, "run", fails)
    monkeypatch.setattr(train.environment, "prepare", lambda *_: None)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--model", "m", "--data", "d", "--seq-len", "8", "--out", str(tmp_path)]
    )
    assert train.main() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words in line
    assert line.endswith(
        f"Step 7 is saved in {tmp_path}/checkpoints; go on from it with: python train.py --resume --out {tmp_path}"
    )


def test_the_errors_of_others_are_found():
    """tensorstore writes the number of the error into its text; orbax raises groups."""
    text = "RESOURCE_EXHAUSTED: Failed writing: \"/a/b/c\": Failed to write 9 bytes: No space left [os_error_code='28']"
    assert disk.disk_error(ValueError(text)).errno == errno.ENOSPC
    assert disk.disk_error(ExceptionGroup("save", [ValueError("other"), ValueError(text)])).errno == errno.ENOSPC
    outer = RuntimeError("a save failed")
    outer.__cause__ = OSError(errno.EDQUOT, "quota")
    assert disk.disk_error(outer).errno == errno.EDQUOT
    assert disk.disk_error(ValueError("RESOURCE_EXHAUSTED: out of memory")) is None


def test_the_metrics_of_a_full_disk_are_an_error_and_no_traceback(tmp_path, monkeypatch, capsys):
    log = MetricsLog(tmp_path, 0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = log.tensorboard._output._ev_writer._async_writer  # TensorBoard has no public names for its thread
    monkeypatch.setattr(writer._writer, "write", full)
    values = {"step": 1, "seconds": 1.0, "loss": 2.0}
    with pytest.raises(OSError, match="No space left"):
        for _ in range(100):
            log.write(values)
            writer._worker.join(0.05)
    assert threading.excepthook is metrics.quiet_writer
    assert "Traceback" not in capsys.readouterr().err
