"""A file that is hashed while it is written, and pages of files that the system may forget.

The system keeps what was read or written in memory. For files larger than the memory it has to find new pages all the
time, and clearing them takes longer than the copy (docs/log.md). Conversions let it forget pages and use them again.
"""

import hashlib
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

Entry = list[Any]  # [bytes, SHA-256]
PIECE = 2**26  # bytes that are written at a time
QUEUED = 2  # pieces that go to the disk, and arrays that are hashed, while the next is written


class HashedFile:
    """A new file. Threads hash it and bring it to the disk."""

    def __init__(self, file: pathlib.Path):
        self._file, self._digest, self._bytes = open(file, "wb", buffering=0), hashlib.sha256(), 0
        self._hasher, self._flusher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._hashing: deque[Future] = deque()
        self._flushing: deque[Future] = deque()
        self.entry: Entry = []

    def write(self, data: bytes | np.ndarray) -> None:
        """Write bytes, or an array of them. It must not change afterwards."""
        data = memoryview(data)
        _wait(self._hashing, QUEUED - 1)
        self._hashing.append(self._hasher.submit(self._digest.update, data))
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            while len(piece):
                piece = piece[self._file.write(piece) :]
            _wait(self._flushing, QUEUED - 1)
            self._flushing.append(self._flusher.submit(self._flush))
        self._bytes += len(data)

    def _flush(self) -> None:
        os.fdatasync(self._file.fileno())
        forget_pages(self._file.name, 0, 0)

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind, *_) -> None:
        """Sets `entry`."""
        try:
            if kind is None:
                _wait(self._hashing, 0)
                _wait(self._flushing, 0)
                self.entry = [self._bytes, self._digest.hexdigest()]
        finally:
            self._hasher.shutdown(cancel_futures=True)
            self._flusher.shutdown(cancel_futures=True)
            self._file.close()


def _wait(works: deque[Future], left: int) -> None:
    while len(works) > left:
        works.popleft().result()


def read_ahead(reads: list[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """The results of functions, in order. The next one runs in a thread."""
    with ThreadPoolExecutor(1) as reader:
        following = deque(reader.submit(read) for read in reads[:1])
        for read in [*reads[1:], None]:
            if following:
                value = following.popleft().result()
                following.extend([reader.submit(read)] if read is not None else [])
                yield value


def forget_pages(file: str | os.PathLike, start: int, size: int) -> None:
    """Let the system forget pages of a file, from byte `start` on; size 0: to the end. Linux only."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), start, size, os.POSIX_FADV_DONTNEED)
