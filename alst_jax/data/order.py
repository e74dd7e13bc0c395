"""The order in which a run meets its sequences: a function of the seed and of the position alone. On grain."""

import collections.abc
import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from alst_jax.data.pieces import Sequence

ENDLESS = 2**40  # sequences: grain cannot count a truly endless repetition


class Stages(NamedTuple):
    """Data that were added to a run. counts: sequences of each part, the first one included; starts: the position, in
    sequences, at which the part was added: 0 for the first, then ascending."""

    counts: tuple[int, ...]
    starts: tuple[int, ...]


def ordered(sequences: collections.abc.Sequence, seed: int, order: list[tuple[int, float]] | Stages | None) -> Any:
    """An endless grain data set over the sequences.

    order: None: every sequence once an epoch, each epoch in another order. (number of sequences, weight) of each
    source, in the order of `sequences`, the weights summing to 1: each source has its own endless order, and the
    sources take turns by a fixed pattern. Stages: see `Extended`.
    """
    import grain

    if order is None:
        return endless(sequences, seed)
    if isinstance(order, Stages):
        return grain.MapDataset.source(Extended(sequences, order, seed))
    ends = np.cumsum([count for count, _ in order])
    sources = [sequences[end - count : end] for (count, _), end in zip(order, ends)]
    parts = [endless(source, (seed + i) % 2**32) for i, source in enumerate(sources)]
    return grain.MapDataset.source(Mixed(parts, [weight for _, weight in order]))


def endless(sequences: collections.abc.Sequence, seed: int) -> Any:
    """A grain data set: every sequence once an epoch, each epoch in another order."""
    import grain

    return grain.MapDataset.source(sequences).shuffle(seed=seed).repeat(ENDLESS // len(sequences))


class Mixed:
    """Endless data sets that take turns: of the first n sequences, n times its weight come from a source, off by less
    than the number of sources. grain's own mixture rounds the weights to a hundredth of the smallest one."""

    def __init__(self, parts: list[Any], weights: list[float]):
        fractions = [Fraction(weight).limit_denominator(10**12) for weight in weights]
        common = math.lcm(*(fraction.denominator for fraction in fractions))
        self._parts, self._shares = parts, [int(fraction * common) for fraction in fractions]

    def __len__(self) -> int:
        return ENDLESS // 2

    def __getitem__(self, index: int) -> Sequence:
        """The first source gives its share of all sequences; the others divide the rest in the same way."""
        before, through, rest = int(index), int(index) + 1, sum(self._shares)
        for source, share in zip(self._parts, self._shares):  # noqa: B007
            others_before, others = (n * (rest - share) // rest for n in (before, through))
            if before - others_before != through - others:
                break
            before, through, rest = others_before, others, rest - share
        return source[before - others_before]


class Extended:
    """Sequences, some added later. Before an addition the order is the same as without it. From there on,
    first come the sequences that the epoch had left and all added ones, in an order drawn from the seed. Then come
    epochs over all. An addition costs 0.1 ms for each sequence that the epoch had left."""

    def __init__(self, sequences: collections.abc.Sequence, stages: Stages, seed: int):
        self._sequences = sequences
        self._stages: list[_Stage] = []
        before = 0
        for number, (count, start) in enumerate(zip(*stages)):
            first = np.zeros(0, np.int64)
            if number:
                last = self._stages[-1]
                first = np.concatenate([last.left_of_epoch(start - last.start), np.arange(before, before + count)])
                first = np.random.default_rng([seed, number]).permutation(first)
            before += count
            self._stages.append(_Stage(start, first, before, (seed + number) % 2**32))

    def __len__(self) -> int:
        return ENDLESS // 2

    def __getitem__(self, position: int) -> Any:
        """The sequence at a position."""
        stage = next(stage for stage in reversed(self._stages) if stage.start <= position)
        return self._sequences[stage.index(int(position) - stage.start)]


class _Stage:
    """From the position `start` on: the indices `first`, then epochs over the first `count` sequences."""

    def __init__(self, start: int, first: np.ndarray, count: int, seed: int):
        self.start, self._first, self._count = start, first, count
        self._epochs = endless(range(count), seed)

    def index(self, position: int) -> int:
        """The sequence at a position, counted from `start`."""
        return int(self._first[position] if position < self._first.size else self._epochs[position - self._first.size])

    def left_of_epoch(self, position: int) -> np.ndarray:
        """The indices from a position to the end of its epoch; none if an epoch ends there."""
        if position < self._first.size:
            return self._first[position:]
        done = (position - self._first.size) % self._count
        left = self._count - done if done else 0
        return np.array([self.index(position + i) for i in range(left)], np.int64)
