"""Tokenised documents, cut into sequences of at most seq_len tokens. A sequence is put together when it is read.

The tokens of all documents lie one behind the other in one array: in memory, or in a memory-mapped file of the cache
(data/cache.py). A piece is three numbers: its first token, its end, and its document's end.
"""

import collections.abc
import dataclasses
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np

from alst_jax.config import IGNORED

FLAGS_AT_ONCE = 1 << 20  # learned flags that are summed at a time, in int32: 4 MiB of sums, 0.5 s for 500 million
RELEASE_AFTER = 1 << 26  # bytes of memory-mapped files that become resident before their pages are released
NEIGHBOURS = 1 << 24  # bytes around a piece that are mapped with it, at most: large folios of 8 MiB in two files


@dataclasses.dataclass(frozen=True)
class Sequence:
    """tokens int32[n] and labels int32[n], n <= seq_len; labels[t] is the token after tokens[t], or IGNORED.
    lengths: of the packed documents; None: one document."""

    tokens: np.ndarray
    labels: np.ndarray
    lengths: tuple[int, ...] | None = None


@dataclasses.dataclass
class Tokenised:
    """The documents of one source, one behind the other.

    tokens int32[n]; learned bool[n]; lengths int64[documents]: the tokens of each document. highs: (token, origin) of
    each document with a larger token than all documents before it. key: the name of the cache's store, if it is one.
    release: releases the pages of memory-mapped arrays, which the operating system keeps as its file cache.
    """

    tokens: np.ndarray
    learned: np.ndarray
    lengths: np.ndarray
    highs: list[tuple[int, str]]
    key: str | None = None
    release: Callable[[], None] | None = None
    unreleased: int = 0  # bytes that were read since the last release, at most
    resident: int | None = None  # bytes of mapped files after the last release

    def count_read(self, tokens: int) -> None:
        """Count the tokens that were read, and release the pages from time to time: resident memory stays small."""
        if self.release is None:
            return
        self.unreleased += 5 * tokens + NEIGHBOURS
        now = mapped_bytes()
        if self.resident is None:
            self.resident = now
        if (self.unreleased if now is None else now - self.resident) >= RELEASE_AFTER:
            self.release()
            self.unreleased, self.resident = 0, mapped_bytes()


def mapped_bytes() -> int | None:
    """Bytes of mapped files in this process's resident memory; None where the system does not tell. A count of the
    bytes read would be too low: Linux maps a whole large folio where one page is read."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except FileNotFoundError:
        return None


class Pieces(collections.abc.Sequence):
    """The pieces of the documents of one source. spans int64[3, pieces]: start, stop, and the end of the document."""

    def __init__(self, source: Tokenised, spans: np.ndarray):
        self.source, self._spans = source, spans

    def __len__(self) -> int:
        return self._spans.shape[1]

    def __getitem__(self, index: int | slice) -> "Sequence | Pieces":
        """A sequence, or some of them. Its tokens are copied: a view would map the pages again after their release."""
        if isinstance(index, slice):
            return Pieces(self.source, self._spans[:, index])
        start, stop, end = self._spans[:, index].tolist()
        first, behind = min(start + 1, end), min(stop + 1, end)
        labels = np.full(stop - start, IGNORED, np.int32)
        np.copyto(labels[: behind - first], self.source.tokens[first:behind], where=self.source.learned[first:behind])
        tokens = self.source.tokens[start:stop].copy()
        self.source.count_read(stop - start)
        return Sequence(tokens, labels)

    @property
    def lengths(self) -> np.ndarray:
        """int64[pieces]: the tokens of each piece."""
        return self._spans[1] - self._spans[0]


class Joined(collections.abc.Sequence):
    """The sequences of several sources, one source behind the other. parts: Pieces, or packs of them."""

    def __init__(self, parts: list[Any]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    def __getitem__(self, index: int | slice) -> "Sequence | Joined":
        """A sequence, or neighbours."""
        if isinstance(index, slice):
            start, stop, _ = slice(index.start, index.stop).indices(len(self))
            begins = (self._ends - [len(part) for part in self.parts]).tolist()
            return Joined([part[max(0, start - at) : max(0, stop - at)] for part, at in zip(self.parts, begins)])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number][index - int(self._ends[number])]  # negative: from the part's end

    @property
    def lengths(self) -> np.ndarray:
        """int64[pieces]: the tokens of each piece."""
        return np.concatenate([part.lengths for part in self.parts] or [np.zeros(0, np.int64)])


def spans_of(lengths: np.ndarray, seq_len: int, kept: np.ndarray) -> np.ndarray:
    """int64[3, pieces]: start, stop and document's end of each piece of the kept documents (bool[documents])."""
    ends = np.cumsum(lengths, dtype=np.int64)[kept]
    lengths = lengths[kept].astype(np.int64)
    counts = -(-lengths // seq_len)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
    starts = np.repeat(ends - lengths, counts) + number * seq_len
    ends = np.repeat(ends, counts)
    return np.stack([starts, np.minimum(starts + seq_len, ends), ends])


def labels_in(source: Tokenised, spans: np.ndarray) -> np.ndarray:
    """int64[pieces]: how many tokens each piece predicts. The learned flags are read once, a part at a time."""
    starts, stops, ends = spans
    points = np.stack([np.minimum(starts + 1, ends), np.minimum(stops + 1, ends)])  # both rows ascend
    sums, before = np.zeros(points.shape, np.int64), 0
    for at in range(0, source.learned.size, FLAGS_AT_ONCE):
        running = np.cumsum(source.learned[at : at + FLAGS_AT_ONCE], dtype=np.int32)
        for row, found in zip(points, sums):
            low, high = np.searchsorted(row, [at + 1, at + running.size + 1])
            found[low:high] = running[row[low:high] - at - 1].astype(np.int64) + before
        before += int(running[-1])
        source.count_read(running.size)
    return sums[1] - sums[0]
