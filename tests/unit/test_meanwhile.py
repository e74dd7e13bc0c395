# pytest tests/unit/test_meanwhile.py
"""Checksums beside a copy: nothing is missed, an interruption ends them, files that change are hashed again."""

import hashlib
import os
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

from alst_jax.config import UserError
from alst_jax.models.hashed_file import PIECE, HashedFile, read_ahead
from alst_jax.storage import checksums, meanwhile
from alst_jax.storage.meanwhile import Ahead, Checking
from alst_jax.storage.stored import Buffers


def entry_of(file):
    content = file.read_bytes()
    return [len(content), hashlib.sha256(content).hexdigest()]


@pytest.mark.parametrize("sizes", [[], [0], [5], [PIECE - 1, PIECE, 3, 2 * PIECE + 1]])
def test_a_hashed_file_is_what_was_written(tmp_path, sizes):
    parts = [np.random.default_rng(0).integers(0, 256, size, np.uint8) for size in sizes]
    with HashedFile(tmp_path / "a") as file:
        file.write(b"start")
        for part in parts:
            file.write(part)
    assert file.entry == entry_of(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"start" + b"".join(part.tobytes() for part in parts)


def test_a_hashed_file_that_failed_has_no_entry(tmp_path):
    with pytest.raises(KeyboardInterrupt), HashedFile(tmp_path / "a") as file:
        file.write(b"start")
        raise KeyboardInterrupt
    assert file.entry == []


@pytest.mark.parametrize("count", [0, 1, 4])
def test_one_is_read_ahead(count):
    read = []
    values = read_ahead([lambda i=i: read.append(i) or np.array(i) for i in range(count)])
    for i, value in enumerate(values):
        time.sleep(0.05)
        assert value == i and len(read) == min(i + 2, count)


def test_the_error_of_a_check_is_raised_at_the_end_and_before_another():
    def check(_):
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"), Checking(check, lambda: 0):
        pass
    with pytest.raises(UserError, match="damaged"), Checking(check, lambda: 0):
        raise ValueError("what the damage led to")
    with pytest.raises(ValueError), Checking(lambda _: None, lambda: 0):
        raise ValueError


def test_an_interruption_ends_a_check(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 5 * checksums.BLOCK)
    ended = []

    def check(beside):
        try:
            while True:
                checksums.hash_file(tmp_path / "a", beside)
        except CancelledError:
            ended.append(True)
            raise

    with pytest.raises(KeyboardInterrupt), Checking(check, lambda: 10**18):
        raise KeyboardInterrupt
    assert ended == [True]


def test_a_check_stays_near_the_work_and_ends_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(meanwhile, "AHEAD", 2 * checksums.BLOCK)
    monkeypatch.setattr(meanwhile, "BEHIND", checksums.BLOCK)
    size = 40 * checksums.BLOCK
    (tmp_path / "a").write_bytes(os.urandom(size))
    hashed, done, most = [], [0], []

    class Counted(Checking):
        def hashed(self, file, position, read):
            most.append(position - done[0])
            super().hashed(file, position, read)

    with Counted(lambda beside: hashed.append(checksums.hash_file(tmp_path / "a", beside)), lambda: done[0]):
        for _ in range(20):
            time.sleep(0.01)
            done[0] += checksums.BLOCK
        assert not hashed
    assert hashed == [entry_of(tmp_path / "a")]
    assert max(most[:20]) <= 4 * checksums.BLOCK


def test_files_are_hashed_while_others_are_written_and_again_if_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(meanwhile, "SECONDS", 0.01)
    folder = tmp_path / "part" / "d"
    folder.mkdir(parents=True)
    read = []
    monkeypatch.setattr(meanwhile, "forget_pages", lambda file, *_: read.append(file.name))
    with Ahead(tmp_path) as ahead:
        for name in ("a", "b", "c.__lock"):
            (folder / name).write_bytes(os.urandom(1000))
        wait_for(lambda: {"a", "b"} <= set(read))
        (folder / "c.__lock").rename(folder / "c")
        (tmp_path / "part").rename(tmp_path / "final")  # the same files
        final = tmp_path / "final" / "d"
        wait_for(lambda: "c" in read)
        (final / "b").write_bytes(b"other")
        (tmp_path / "loop").write_bytes(b"not watched")
        names = ["loop", *(f"final/d/{name}" for name in "abc")]
        assert ahead.hash_files(tmp_path, names) == {name: entry_of(tmp_path / name) for name in names}
    assert read.count("a") == 1 and read.count("c") == 1 and "c.__lock" not in read


def test_memory_is_lent_again_when_nobody_refers_to_it():
    buffers, dtype = Buffers(100), np.dtype("uint16")
    place = lambda array: array.__array_interface__["data"][0]
    first = buffers.array((5, 10), dtype, "F")
    assert first.flags.f_contiguous and first.shape == (5, 10) and first.dtype == dtype
    start, view = place(first), memoryview(first.T[2:].reshape(-1).view(np.uint8))
    del first
    assert place(second := buffers.array((50,), dtype, "C")) != start
    del view
    assert place(third := buffers.array((10, 5), dtype, "C")) == start
    assert place(buffers.array((49,), dtype, "C")) not in (start, place(second), place(third))
    large = buffers.array((51,), dtype, "C")
    assert large.base is None and buffers.array((0, 3), dtype, "C").shape == (0, 3)


def wait_for(condition, seconds=20):
    ended = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ended and threading.active_count()
        time.sleep(0.01)
