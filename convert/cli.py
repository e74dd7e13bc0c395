"""The shared parts of both converters: the command line's errors, the output directory, the last line."""

import ctypes
import pathlib
import shutil
import sys
import time
from collections.abc import Callable

import rich.console
import rich.progress

from alst_jax.declare import UserError, command_line
from alst_jax.storage.disk import describe, disk_error

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def run(convert: Callable[..., tuple[int, int]]) -> int:
    """Parse the arguments of `convert(source, target)`, call it, report; exit code 2 for a user's mistake."""
    started = time.perf_counter()
    keep_freed_memory()
    try:
        tensors, total = command_line(convert)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (reason := disk_error(error)) is None:
            raise
        print(f"error: {describe(reason)}. Nothing of the conversion is kept; run it again after that", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing of the conversion is kept", file=sys.stderr)
        return 130
    print(f"{tensors} tensors, {total / 1e9:.3f} GB in {time.perf_counter() - started:.1f} s")
    return 0


def keep_freed_memory() -> None:
    """Make glibc keep the freed memory of chunks, where the C library is glibc.

    It would give the 16 MiB of each chunk back to the system, which clears them before it lends them again.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that glibc takes
        mallopt(M_TRIM_THRESHOLD, 2**30)


class Progress:
    """A bar on standard error, where that is a terminal: bytes, speed, time left."""

    def __init__(self, title: str, total: int):
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, size: int) -> None:
        """Count `size` bytes more. Threads may call it."""
        self._bar.advance(self._task, size)

    @property
    def done(self) -> int:
        """The bytes so far."""
        return int(self._bar.tasks[0].completed)


def check_target(target: pathlib.Path) -> None:
    """UserError unless `target` does not exist or is an empty directory."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; choose another output directory or delete it first")
    blocked = next((p for p in target.absolute().parents if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise UserError(f"{target}: {blocked} is a file, not a directory; choose another output directory")
    target.parent.mkdir(parents=True, exist_ok=True)


class Unfinished:
    """A directory beside the target that becomes the target when all is done, and goes away when it is not."""

    def __init__(self, target: pathlib.Path):
        target = target.absolute()
        check_target(target)
        self.target, self.path = target, target.with_name(f".{target.name}.unfinished")

    def __enter__(self) -> pathlib.Path:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        return self.path

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            if self.target.exists():
                self.target.rmdir()
            self.path.replace(self.target)
        else:
            shutil.rmtree(self.path, ignore_errors=True)
