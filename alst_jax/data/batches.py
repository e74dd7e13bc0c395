"""Sequences -> batches in an order that is a function of the seed, with a position that can be saved. On grain."""

import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from alst_jax.config import IGNORED
from alst_jax.data.documents import Sequence

ENDLESS = 2**40  # sequences: grain cannot count a truly endless repetition


class TrainingBatches:
    """An endless iterator: every sequence once an epoch, each epoch in another order.

    Yields {"tokens", "labels", "positions"}, int32[grad_accum, rows, padded_len]; what is beyond a document's end is
    padding: pad token, label IGNORED. `get_state` / `set_state` save and restore the position exactly.

    mixture: (number of sequences, weight) of each source, in the order of `sequences`; the weights sum to 1. Then each
    source has its own endless order, and the sources take turns by a fixed pattern: of the first n sequences, n times
    its weight come from a source, off by less than the number of sources.
    """

    def __init__(
        self, sequences: list[Sequence], padded_len: int, rows: int, grad_accum: int, seed: int, pad_token: int,
        mixture: list[tuple[int, float]] | None = None,
    ):
        import grain

        self._shape = (grad_accum, rows, padded_len)
        pad = lambda sequence: pad_sequence(sequence, padded_len, pad_token)
        # The batch is cut from the endless stream, so a step may hold the end of one epoch and the start of the next.
        if mixture is None:
            dataset = _endless(sequences, seed)
        else:
            ends = np.cumsum([count for count, _ in mixture])
            sources = [sequences[end - count : end] for (count, _), end in zip(mixture, ends)]
            endless = [_endless(source, (seed + i) % 2**32) for i, source in enumerate(sources)]
            dataset = grain.MapDataset.source(_Mixed(endless, [weight for _, weight in mixture]))
        dataset = dataset.map(pad).batch(grad_accum * rows)
        # Padding is a copy of a few MB: no threads, whose prefetching would blur the position.
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return {name: array.reshape(self._shape) for name, array in next(self._iterator).items()}

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-serialisable."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


class _Mixed:
    """Endless data sets that take turns. grain's own mixture rounds the weights to a hundredth of the smallest one."""

    def __init__(self, endless: list[Any], weights: list[float]):
        fractions = [Fraction(weight).limit_denominator(10**12) for weight in weights]
        common = math.lcm(*(fraction.denominator for fraction in fractions))
        self._endless, self._shares = endless, [int(fraction * common) for fraction in fractions]

    def __len__(self) -> int:
        return ENDLESS // 2

    def __getitem__(self, index: int) -> Sequence:
        """The first source gives its share of all sequences; the others divide the rest in the same way."""
        before, through, rest = int(index), int(index) + 1, sum(self._shares)
        for source, share in zip(self._endless, self._shares):
            others_before, others = (n * (rest - share) // rest for n in (before, through))
            if before - others_before != through - others:
                break
            before, through, rest = others_before, others, rest - share
        return source[before - others_before]


def _endless(sequences: list[Sequence], seed: int) -> Any:
    """A grain data set: every sequence once an epoch, each epoch in another order."""
    import grain

    return grain.MapDataset.source(sequences).shuffle(seed=seed).repeat(ENDLESS // len(sequences))


def evaluation_batches(
    sequences: list[Sequence], padded_len: int, rows: int, pad_token: int
) -> Iterator[dict[str, np.ndarray]]:
    """Every sequence once, in order: int32[rows, padded_len]; the last batch is filled up with rows without labels."""
    empty = Sequence(np.zeros(0, np.int32), np.zeros(0, np.int32))
    for start in range(0, len(sequences), rows):
        chosen = sequences[start : start + rows]
        chosen = chosen + [empty] * (rows - len(chosen))
        padded = [pad_sequence(sequence, padded_len, pad_token) for sequence in chosen]
        yield {name: np.stack([row[name] for row in padded]) for name in padded[0]}


def pad_sequence(sequence: Sequence, padded_len: int, pad_token: int) -> dict[str, np.ndarray]:
    """tokens, labels and positions, int32[padded_len]. Causal attention keeps the padding behind a document out of it."""
    tokens = np.full(padded_len, pad_token, np.int32)
    labels = np.full(padded_len, IGNORED, np.int32)
    tokens[: sequence.tokens.size] = sequence.tokens
    labels[: sequence.labels.size] = sequence.labels
    return {"tokens": tokens, "labels": labels, "positions": np.arange(padded_len, dtype=np.int32)}


def fingerprint(sequences: list[Sequence], mixture: list[tuple[int, float]] | None = None) -> str:
    """A hash of all tokens and labels and of how they are cut, with the mixture of sources: the same data, or other."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence.tokens).to_bytes(8, "little"))
        digest.update(sequence.tokens.tobytes())
        digest.update(sequence.labels.tobytes())
    mixed = "".join(f", {count} x {weight:.12g}" for count, weight in mixture or ())
    return digest.hexdigest()[:16] + mixed
