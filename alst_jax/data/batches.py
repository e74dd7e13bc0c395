"""Sequences -> batches in an order that is a function of the seed, with a position that can be saved. On grain."""

import collections.abc
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from alst_jax.config import IGNORED
from alst_jax.data.documents import Sequence
from alst_jax.data.order import Stages, ordered
from alst_jax.data.packing import offsets_of, pieces_of

Sequences = collections.abc.Sequence[Sequence]
Arrays = dict[str, np.ndarray]
Packing = tuple[int, int | None]  # data-parallel replicas, documents of a replica at most (None: a pack is one text)


class TrainingBatches:
    """An endless iterator: every sequence once an epoch, each epoch in another order.

    Yields {"tokens", "labels", "positions"}, int32[grad_accum, rows, padded_len]; positions beyond a document's end
    are padding: pad token, label IGNORED. `get_state` / `set_state` save and restore the position exactly.

    lengths: padded_len, or several, ascending. Then it yields a list of grad_accum batches {...}, int32[rows, length]:
    the sequences of the step, the longest first. Each batch has the smallest length that holds its sequences. A step
    takes the same sequences as with the last length alone.

    order: see order.ordered.

    packing: for packed sequences, (data-parallel replicas, documents of a replica at most). Batches then also have
    "documents", int32[grad_accum, replicas, documents + 1] (see stack/batch.py), and "padding", int32[grad_accum,
    rows], the tokens of padding in each row. Without a number of documents a pack is one text: "padding" alone.
    """

    def __init__(
        self, sequences: Sequences, lengths: int | tuple[int, ...], rows: int, grad_accum: int, seed: int,
        pad_token: int, order: list[tuple[int, float]] | Stages | None = None, packing: Packing | None = None,
    ):
        import grain

        self._lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
        self._shape, self._packing = (grad_accum, rows), packing
        pad = lambda sequence: pad_sequence(sequence, self._lengths[-1], pad_token, packing and packing[1]) | {
            "size": np.int32(sequence.tokens.size)}
        # The batch is cut from the endless stream, so a step may hold the end of one epoch and the start of the next.
        dataset = ordered(sequences, seed, order).map(pad).batch(grad_accum * rows)
        # Padding is a copy of a few MB: no threads, whose prefetching would blur the position.
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def __iter__(self) -> Iterator[Arrays | list[Arrays]]:
        return self

    def __next__(self) -> Arrays | list[Arrays]:
        arrays = next(self._iterator)
        rows = np.arange(arrays["size"].size)
        if len(self._lengths) > 1:  # batches of sequences of about one length
            rows = np.argsort(-arrays["size"], kind="stable")
        parts = [_fitted({name: array[chosen] for name, array in arrays.items()}, self._lengths, self._packing)
                 for chosen in rows.reshape(self._shape)]
        if len(self._lengths) > 1:
            return parts
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-serialisable."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


def _fitted(arrays: Arrays, lengths: tuple[int, ...], packing: Packing | None) -> Arrays:
    """A batch in the smallest length that holds its rows, with the fields of `TrainingBatches`. arrays: rows of
    `pad_sequence` in the last length, and "size", the tokens of each."""
    size = arrays["size"]
    length = next(length for length in lengths if length >= size.max())
    batch = {name: arrays[name][:, :length] for name in ("tokens", "labels", "positions")}
    if packing is None:
        return batch
    batch["padding"] = np.int32(length) - size
    if packing[1] is None:
        return batch
    documents = [row[: np.count_nonzero(row) - (n < lengths[-1])].tolist() for row, n in zip(arrays["lengths"], size)]
    return batch | {"documents": offsets_of(documents, length, *packing)}


def evaluation_batches(
    sequences: Sequences, lengths: int | tuple[int, ...], rows: int, pad_token: int,
    packing: Packing | None = None,
) -> Iterator[Arrays]:
    """Every sequence once, in order: int32[rows, length]; the last batch is filled up with rows without labels.

    lengths, packing: see TrainingBatches.
    """
    lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    empty = Sequence(np.zeros(0, np.int32), np.zeros(0, np.int32))
    for start in range(0, len(sequences), rows):
        chosen = [sequences[i] for i in range(start, min(start + rows, len(sequences)))]
        chosen = chosen + [empty] * (rows - len(chosen))
        padded = [pad_sequence(sequence, lengths[-1], pad_token, packing and packing[1]) for sequence in chosen]
        arrays = {name: np.stack([row[name] for row in padded]) for name in padded[0]}
        arrays["size"] = np.array([sequence.tokens.size for sequence in chosen], np.int32)
        batch = _fitted(arrays, lengths, packing)
        batch.pop("padding", None)
        yield batch


def pad_sequence(
    sequence: Sequence, padded_len: int, pad_token: int, most: int | None = None
) -> dict[str, np.ndarray]:
    """tokens, labels and positions, int32[padded_len]. Causal attention keeps the padding behind a document out of it.

    most: documents of a packed sequence at most; then also "lengths" of its documents and its padding, int32[most]. The
    positions of packed documents start at 0; padding has position 0.
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
            "lengths": np.asarray(lengths + [0] * (most - len(lengths)), np.int32)}


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
