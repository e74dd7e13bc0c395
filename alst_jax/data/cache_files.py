"""The files of a store of tokenised documents: written, read where they are used, and removed."""

import contextlib
import fcntl
import mmap
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from alst_jax.config import UserError

ABANDONED = 60  # seconds without a writer after which a half-written store is removed


class Output:
    """A file of a store: buffered, and on the disk when it is closed. Errors of writing become UserErrors."""

    def __init__(self, path: pathlib.Path, failed: Callable[[OSError], UserError]):
        self._path, self._failed = path, failed
        self.checksum = 0  # crc32 of the bytes written

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> "Output":
        with self._errors():
            self._stream: BinaryIO = self._path.open("wb", buffering=1 << 20)
        return self

    def write(self, array: np.ndarray) -> None:
        with self._errors():
            content = np.ascontiguousarray(array).data.cast("B") if array.size else b""
            self._stream.write(content)
            self.checksum = zlib.crc32(content, self.checksum)

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                with self._errors():
                    self._stream.flush()
                    os.fsync(self._stream.fileno())
        finally:
            with contextlib.suppress(OSError):  # the store is given up, or nothing is left to write
                self._stream.close()


def remove_abandoned(folder: pathlib.Path) -> None:
    """Remove a half-written store whose writer was killed."""
    try:
        with (folder / "lock").open("rb") as lock:
            if time.time() - os.fstat(lock.fileno()).st_mtime < ABANDONED:
                return  # its writer may be about to lock it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except (FileNotFoundError, BlockingIOError, PermissionError):
        return  # another process has removed it, or writes it, or another user's did


def mapped(file: pathlib.Path, dtype: Any) -> tuple[np.ndarray, mmap.mmap | None]:
    """The array in a file, which is read where it is used. The lengths, which are few, are read at once."""
    if dtype is np.int64 or not file.stat().st_size:
        return np.fromfile(file, dtype), None
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype), mapped


def release_pages(maps: list[mmap.mmap | None]) -> None:
    """Unmap the pages that were read. Arrays stay valid: the next use of a page maps it again."""
    for mapped in filter(None, maps):
        mapped.madvise(mmap.MADV_DONTNEED)
