"""Sequences -> batches in an order that is a function of the seed, with a position that can be saved. On grain."""

import collections.abc
import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from alst_jax.config import IGNORED
from alst_jax.data.documents import Sequence
from alst_jax.data.packing import offsets_of, pieces_of

Sequences = collections.abc.Sequence[Sequence]
ENDLESS = 2**40  # sequences: grain cannot count a truly endless repetition


class TrainingBatches:
    """An endless iterator: every sequence once an epoch, each epoch in another order.

    Yields {"tokens", "labels", "positions"}, int32[grad_accum, rows, padded_len]; what is beyond a document's end is
    padding: pad token, label IGNORED. `get_state` / `set_state` save and restore the position exactly.

    mixture: (number of sequences, weight) of each source, in the order of `sequences`; the weights sum to 1. Then each
    source has its own endless order, and the sources take turns by a fixed pattern: of the first n sequences, n times
    its weight come from a source, off by less than the number of sources.

    packing: for packed sequences, (data-parallel replicas, documents of a replica at most). Then there are also
    "documents", int32[grad_accum, replicas, documents + 1] (see stack/batch.py), and "padding", int32[grad_accum, rows],
    the tokens of padding in each row.
    """

    def __init__(
        self, sequences: Sequences, padded_len: int, rows: int, grad_accum: int, seed: int, pad_token: int,
        mixture: list[tuple[int, float]] | None = None, packing: tuple[int, int] | None = None,
    ):
        import grain

        self._shape, self._packing = (grad_accum, rows, padded_len), packing
        pad = lambda sequence: pad_sequence(sequence, padded_len, pad_token, packing and packing[1])
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
        arrays = next(self._iterator)
        lengths, padding = arrays.pop("lengths", None), arrays.pop("padding", None)
        batches = {name: array.reshape(self._shape) for name, array in arrays.items()}
        if self._packing is None:
            return batches
        accumulation, rows, length = self._shape
        documents = [offsets_of([row[row > 0].tolist() for row in part], length, *self._packing)
                     for part in lengths.reshape(accumulation, rows, -1)]
        return batches | {"documents": np.stack(documents), "padding": padding.reshape(accumulation, rows)}

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


def _endless(sequences: Sequences, seed: int) -> Any:
    """A grain data set: every sequence once an epoch, each epoch in another order."""
    import grain

    return grain.MapDataset.source(sequences).shuffle(seed=seed).repeat(ENDLESS // len(sequences))


def evaluation_batches(
    sequences: Sequences, padded_len: int, rows: int, pad_token: int, packing: tuple[int, int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Every sequence once, in order: int32[rows, padded_len]; the last batch is filled up with rows without labels.

    packing: see TrainingBatches.
    """
    empty = Sequence(np.zeros(0, np.int32), np.zeros(0, np.int32))
    for start in range(0, len(sequences), rows):
        chosen = [sequences[i] for i in range(start, min(start + rows, len(sequences)))]
        chosen = chosen + [empty] * (rows - len(chosen))
        padded = [pad_sequence(sequence, padded_len, pad_token, packing and packing[1]) for sequence in chosen]
        batch = {name: np.stack([row[name] for row in padded]) for name in ("tokens", "labels", "positions")}
        if packing:
            lengths = [row["lengths"][row["lengths"] > 0].tolist() for row in padded]
            batch["documents"] = offsets_of(lengths, padded_len, *packing)
        yield batch


def pad_sequence(
    sequence: Sequence, padded_len: int, pad_token: int, most: int | None = None
) -> dict[str, np.ndarray]:
    """tokens, labels and positions, int32[padded_len]. Causal attention keeps the padding behind a document out of it.

    most: documents of a packed sequence at most; then also "lengths" of its documents and its padding, int32[most], and
    "padding", their number of tokens. The positions of packed documents start at 0; those of the padding are 0.
    """
    tokens = np.full(padded_len, pad_token, np.int32)
    labels = np.full(padded_len, IGNORED, np.int32)
    tokens[: sequence.tokens.size] = sequence.tokens
    labels[: sequence.labels.size] = sequence.labels
    positions = np.arange(padded_len, dtype=np.int32)
    if most is None:
        return {"tokens": tokens, "labels": labels, "positions": positions}
    lengths = pieces_of(sequence, padded_len)
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int32)
    positions -= np.repeat(starts, lengths)
    positions[sequence.tokens.size :] = 0  # padding is no long document
    return {"tokens": tokens, "labels": labels, "positions": positions,
            "lengths": np.asarray(lengths + [0] * (most - len(lengths)), np.int32),
            "padding": np.int32(padded_len - sequence.tokens.size)}


def fingerprint(
    sequences: Sequences, mixture: list[tuple[int, float]] | None = None, known: str | None = None
) -> str:
    """A hash of all tokens and labels and of how they are cut, with the mixture of sources: the same data, or other.

    known: the `content_hash` of the sequences, if it is known.
    """
    mixed = "".join(f", {count} x {weight:.12g}" for count, weight in mixture or ())
    return (known or content_hash(sequences)) + mixed


def content_hash(sequences: Sequences) -> str:
    """A hash of all tokens and labels and of how they are cut."""
    digest = hashlib.sha256()
    for sequence in sequences:
        for length in sequence.lengths or (len(sequence.tokens),):
            digest.update(length.to_bytes(8, "little"))
        digest.update(sequence.tokens.tobytes())
        digest.update(sequence.labels.tobytes())
    return digest.hexdigest()[:16]
