"""Several documents in one sequence: which ones go together, and where each begins.

Only the lengths are packed. The tokens of a pack are put together when it is read.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from alst_jax.data import documents as cut

AT_ONCE = 1 << 16  # documents that are packed at a time


@dataclasses.dataclass(frozen=True)
class Groups(Sequence):
    """Groups of indices. members int64[indices]: one group behind the other; ends int64[groups]: where each ends."""

    members: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return self.ends.size

    def __getitem__(self, index: int | slice) -> "np.ndarray | Groups":
        """The members of a group, or some neighbouring groups."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            first, ends = self._begin(start), self.ends[start:stop]
            return Groups(self.members[first : ends[-1] if ends.size else first], ends - first)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        return self.members[self._begin(index) : self.ends[index]]

    def _begin(self, index: int) -> int:
        return int(self.ends[index - 1]) if index else 0

    @property
    def counts(self) -> np.ndarray:
        """int64[groups]: how many members each has."""
        return np.diff(self.ends, prepend=0)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """int64[groups]: the sum over each group's members. values int64: by index."""
        sums = np.cumsum(values[self.members])[self.ends - 1]
        return np.diff(sums, prepend=0)

    def lists(self) -> list[list[int]]:
        """As lists."""
        return [group.tolist() for group in self]

    @staticmethod
    def joined(parts: list["Groups"], shifts: list[int]) -> "Groups":
        """The groups of several parts, with a number added to the members of each part."""
        ends = np.cumsum([0, *(part.members.size for part in parts)]).tolist()
        empty = np.zeros(0, np.int64)
        return Groups(
            np.concatenate([empty, *(part.members + shift for part, shift in zip(parts, shifts))]),
            np.concatenate([empty, *(part.ends + end for part, end in zip(parts, ends))]),
        )


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Groups:
    """Indices of documents, pack by pack, each of at most `capacity` tokens. Best fit, longest first; documents of one
    length are taken in an order drawn from the seed, so that neighbours in a file do not stay neighbours.

    ValueError if a document is longer than the capacity.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a document of {lengths.max()} tokens and packs of {capacity}")
    drawn = np.random.default_rng(seed).permutation(len(lengths))
    order = drawn[np.argsort(-lengths[drawn], kind="stable")]
    spaces: list[int] = []  # the different numbers of tokens that are left in some pack, ascending
    packs_of: dict[int, list[int]] = {}
    numbers, count = np.empty(len(lengths), np.int64), 0  # of the pack of each document
    for start in range(0, len(order), AT_ONCE):  # a part at a time: lists of numbers are large
        for place, length in enumerate(lengths[order[start : start + AT_ONCE]].tolist(), start):
            at = bisect.bisect_left(spaces, length)
            if at == len(spaces):
                number, left = count, capacity - length
                count += 1
            else:
                space = spaces[at]
                number, left = packs_of[space].pop(), space - length
                if not packs_of[space]:
                    del spaces[at], packs_of[space]
            numbers[place] = number
            if left:
                if left not in packs_of:
                    bisect.insort(spaces, left)
                    packs_of[left] = []
                packs_of[left].append(number)
    return Groups(order[np.argsort(numbers, kind="stable")], np.cumsum(np.bincount(numbers, minlength=count)))


class Packs(Sequence):
    """Packs of sequences as sequences. together: attention crosses the borders of documents, and positions go on."""

    def __init__(self, pieces: Sequence[cut.Sequence], packs: Groups, together: bool = False):
        self._pieces, self._packs, self._together = pieces, packs, together

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int | slice) -> "cut.Sequence | Packs":
        """A pack, or some of them."""
        if isinstance(index, slice):
            return Packs(self._pieces, self._packs[index], self._together)
        pieces = [self._pieces[i] for i in self._packs[index].tolist()]
        tokens, labels = (np.concatenate([getattr(p, name) for p in pieces]) for name in ("tokens", "labels"))
        return cut.Sequence(tokens, labels, None if self._together else tuple(p.tokens.size for p in pieces))

    @property
    def lengths(self) -> np.ndarray:
        """int64[packs]: the tokens of each pack."""
        return self._packs.sums(self._of_pieces)

    @functools.cached_property
    def _of_pieces(self) -> np.ndarray:
        return self._pieces.lengths

    def documents(self, index: int) -> list[int] | None:
        """The `lengths` of a pack, from the index: no token is read."""
        return None if self._together else self._of_pieces[self._packs[index]].tolist()


@dataclasses.dataclass(frozen=True)
class Fullness:
    """How full packs are. lengths: tokens of each packed document; counts, tokens: of the documents of each pack."""

    capacity: int
    lengths: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(capacity: int, lengths: np.ndarray, packs: Groups) -> "Fullness":
        """The fullness of packs of documents with these lengths."""
        return Fullness(capacity, lengths, packs.counts, packs.sums(lengths))

    def plus(self, other: "Fullness") -> "Fullness":
        """With the packs of other data."""
        join = lambda name: np.concatenate([getattr(self, name), getattr(other, name)])
        return Fullness(self.capacity, join("lengths"), join("counts"), join("tokens"))

    @property
    def packs(self) -> int:
        return self.counts.size

    @property
    def part(self) -> float:
        """The part of all positions that holds a token."""
        return float(self.lengths.sum()) / (self.packs * self.capacity)

    def most_documents(self, padded_len: int) -> int:
        """Documents in a padded pack at most; the padding is one."""
        return int((self.counts + (self.tokens < padded_len)).max())

    def summary(self) -> str:
        """One line, and the lengths of the documents as bars: one a doubling."""
        line = (
            f"{self.lengths.size:,} documents in {self.packs:,} packs of {self.capacity:,}, {self.part:.1%} full; "
            f"at most {self.counts.max():,} in a pack"
        )
        edges = [0] + [2**i for i in range(4, int(self.capacity).bit_length())] + [self.capacity + 1]
        tokens = np.histogram(self.lengths, edges, weights=self.lengths)[0]
        counts = np.histogram(self.lengths, edges)[0]
        bars = [
            f"  {low:>9,} {'#' * max(1, round(40 * n / tokens.max())):40} {count:,} documents, "
            f"{n / tokens.sum():.0%} of the tokens"
            for low, n, count in zip(edges, tokens, counts)
            if count
        ]
        return "\n".join([line, *bars])


def pieces_of(sequence: cut.Sequence, padded_len: int) -> list[int]:
    """Lengths of the documents of a padded sequence; the padding is the last one."""
    lengths = [sequence.tokens.size] if sequence.lengths is None else list(sequence.lengths)
    padding = padded_len - sequence.tokens.size
    return lengths + [padding] * (padding > 0)


def offsets_of(rows: list[list[int]], length: int, replicas: int, most: int) -> np.ndarray:
    """int32[replicas, most + 1]: offsets of the documents of each replica's share of the rows, as `Batch.documents`.

    rows: lengths of the documents in each sequence of `length` tokens; the padding is one document more.
    most: the most documents of a replica that a program is compiled for. ValueError for more.
    """
    share, out = len(rows) // replicas, np.empty((replicas, most + 1), np.int32)
    for replica in range(replicas):
        lengths: list[int] = []
        for row in rows[replica * share : (replica + 1) * share]:
            rest = length - sum(row)
            lengths += [n for n in (*row, rest) if n]
        if len(lengths) > most:
            raise ValueError(f"{len(lengths)} documents in the {share} sequences of a replica, and at most {most}")
        ends = np.cumsum(lengths, dtype=np.int64)
        out[replica] = np.concatenate([[0], ends, np.full(most - len(lengths), ends[-1])])
    return out


def room_for(most: int, rows: int) -> int:
    """The documents of a replica that a program is compiled for, if a padded pack holds at most `most`: the next power
    of two, so that other data of the kind need no other program."""
    return 1 << max(3, (most * rows - 1).bit_length())
