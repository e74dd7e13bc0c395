"""Limits in time for the parts of a run beside its steps: loading, evaluation, saves, the export, the end.

All processes wait for each other in each part. One that hangs (a collective, a disk) would let all wait for ever. The
first process whose part takes longer than its limit ends all of them. A run in one process has no limits.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

from alst_jax.processes.link import link

LEAST = 600.0  # seconds
FIRST = 3600.0  # seconds of the first of several parts alike, which is compiled
HUNG = 3.0  # times the longest part, for the next one
SLOWEST = 50e6  # bytes a second of the slowest storage that is waited for


def seconds_for(size: int | float) -> float:
    """The seconds in which a part that reads or writes `size` bytes must end."""
    return LEAST + size / SLOWEST


@contextlib.contextmanager
def within(what: str, seconds: float) -> Iterator[None]:
    """End all processes if the part inside takes longer. what: its words, as in "saving step 3"."""
    if not link().several:
        yield
        return
    words = f"gives up: {what} has run for {seconds:.0f} s: a collective or a disk that hangs"
    timer = threading.Timer(seconds, lambda: link().failed(words, 1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Turns:
    """Limits of parts alike, one after the other, as the batches of an evaluation. The first has FIRST seconds; each
    other one HUNG times the longest before it, and LEAST seconds at least."""

    def __init__(self, what: str):
        self._what, self._longest = what, None

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """The limit of the next part."""
        began, longest = time.monotonic(), self._longest
        with within(self._what, FIRST if longest is None else max(LEAST, HUNG * longest)):
            yield
        self._longest = max(longest or 0.0, time.monotonic() - began)
