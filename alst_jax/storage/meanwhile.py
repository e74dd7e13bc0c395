"""Checksums made while files are read or written, not before or after: large files are read from the disk once.

Pages of files that both have read are forgotten (hashed_file.py).
"""

import concurrent.futures
import contextlib
import hashlib
import mmap
import os
import pathlib
import threading
from collections import deque
from collections.abc import Callable

from alst_jax.models.hashed_file import Entry, forget_pages
from alst_jax.storage import checksums
from alst_jax.storage.checksums import THREADS

SECONDS = 0.1  # between two looks at a directory, or at the bytes done
AHEAD = 3 * 10**8  # bytes that a check may have read more than the work beside it
PIECE = 2**26  # bytes that are forgotten at once: Linux keeps a page of 2 MiB if a part of it is forgotten
BEHIND = 2 * 10**9  # bytes done before the pages that a check has read are forgotten: the parts in flight


class Checking:
    """Runs check(self) in a thread beside the body, near the bytes that the body works on, and waits for it at the end.

    The check's error is raised, also if the body fails: damaged files explain that. It ends early if the body was
    interrupted. done: the body's bytes so far. threads: most files that are hashed at once.
    """

    def __init__(self, check: Callable[["Checking"], object], done: Callable[[], int], threads: int = THREADS):
        self.threads, self._check, self._done = threads, check, done
        self._ended, self._stopped, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._bytes, self._read, self._pieces = 0, deque(), {}

    @property
    def active(self) -> bool:
        """Whether files have been hashed."""
        return self._bytes > 0

    def hashed(self, file: pathlib.Path, position: int, read: int) -> None:
        """Waits while the check is far ahead, and forgets pages far behind. read 0: the end of the file.
        CancelledError if the body was interrupted."""
        with self._lock:
            self._bytes += read
            start, size = self._pieces.pop(file, (position - read, 0))
            if size + read < PIECE and read:
                self._pieces[file] = start, size + read
            else:
                self._read.append((self._bytes, file, start, size + read))
            old = []
            while self._read and self._read[0][0] < self._done() - BEHIND:
                old.append(self._read.popleft())
        for _, past, start, size in old:
            forget_pages(past, start, size)
        while not self._ended.is_set() and self._bytes > self._done() + AHEAD:
            self._ended.wait(SECONDS)
        if self._stopped.is_set():
            raise concurrent.futures.CancelledError

    def __enter__(self) -> "Checking":
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._checked = self._pool.submit(self._check, self)
        return self

    def __exit__(self, kind, *_) -> None:
        self._ended.set()
        if kind is not None and not issubclass(kind, Exception):
            self._stopped.set()
        self._pool.shutdown()
        if not self._stopped.is_set():
            self._checked.result()


class Ahead:
    """Hashes the files below a directory while others are written there.

    A file counts as written when its name does not end in `.__lock`: tensorstore renames a complete file, and never
    changes it. A file whose size, time or inode changed after that is hashed again.
    """

    def __init__(self, top: pathlib.Path):
        self._top, self._stop = top, threading.Event()
        self._found: dict[tuple[int, ...], concurrent.futures.Future[Entry | None]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Ahead":
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._watcher.join()
        self._pool.shutdown(cancel_futures=True)

    def _watch(self) -> None:
        while not self._stop.wait(SECONDS):
            for folder, _, names in os.walk(self._top):
                if pathlib.Path(folder).name != "d":  # the data files of an OCDBT database
                    continue
                for file in (pathlib.Path(folder, name) for name in names if not name.endswith(".__lock")):
                    with contextlib.suppress(FileNotFoundError):  # its directory got another name
                        if (key := _key(file)) not in self._found:
                            self._found[key] = self._pool.submit(self._hash, file)

    def _hash(self, file: pathlib.Path) -> Entry | None:
        try:
            with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as pages:
                entry = [len(pages), hashlib.new(checksums.ALGORITHM, pages).hexdigest()]  # without a copy
            forget_pages(file, 0, 0)
            return entry
        except (FileNotFoundError, ValueError):
            return None  # hash_files reads it: under its new name, or as an empty file

    def hash_files(self, top: pathlib.Path, names: list[str]) -> dict[str, Entry]:
        """Name -> [bytes, hash], as checksums.hash_files."""
        known = {}
        for name in names:
            found = self._found.get(_key(top / name))
            if found is not None and (entry := found.result()) is not None:
                known[name] = entry
        return known | checksums.hash_files(top, [name for name in names if name not in known])


def _key(file: pathlib.Path) -> tuple[int, ...]:
    about = file.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
