"""Sequences -> batches in an order that is a function of the seed, with a position that can be saved. On grain."""

import collections.abc
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from alst_jax.config import IGNORED
from alst_jax.data.documents import Sequence
from alst_jax.data.order import Stages, ordered
from alst_jax.data.packing import offsets_of, pieces_of

Sequences = collections.abc.Sequence[Sequence]
Arrays = dict[str, np.ndarray]
Packing = tuple[int, int | None]  # data-parallel replicas, documents of a replica at most (None: a pack is one text)
EMPTY = Sequence(np.zeros(0, np.int32), np.zeros(0, np.int32))


class Layout(NamedTuple):
    """How rows are filled, and which of them. packing, mine: see Rows."""

    packing: Packing | None = None
    mine: frozenset[int] | None = None


class Rows:
    """Sequences as rows of padded batches.

    lengths: padded lengths, ascending. A batch has the smallest that holds its rows.
    packing: for packed sequences, (data-parallel replicas, documents of a replica at most). Batches then also have
    "documents", int32[replicas, documents + 1] (see stack/batch.py), and "padding", int32[rows], the tokens of padding
    in each row. Without a number of documents a pack is one text: "padding" alone.
    mine: the rows of a batch that this process reads; None: all. Other rows have no tokens and no labels; sizes and
    documents are those of all rows.
    """

    def __init__(
        self,
        sequences: Sequences,
        lengths: int | tuple[int, ...],
        pad_token: int,
        packing: Packing | None = None,
        mine: frozenset[int] | None = None,
    ):
        self.lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
        self._sequences, self._pad, self._packing, self._mine = sequences, pad_token, packing, mine
        self._apart = packing is not None and packing[1] is not None  # the documents of a pack
        self._sizes = getattr(sequences, "lengths", None)  # the index; a list of sequences has none

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """int64[n]: the tokens of sequences; 0 for the index -1, a row without a sequence."""
        if self._sizes is None:
            return np.asarray([self._sequences[i].tokens.size if i >= 0 else 0 for i in indices.tolist()], np.int64)
        return np.where(indices < 0, 0, self._sizes[indices])

    def batch(self, indices: np.ndarray) -> Arrays:
        """The arrays of a batch, int32[rows, length]. indices: a sequence for each row, or -1."""
        sizes = self.sizes(indices)
        length = next(length for length in self.lengths if length >= sizes.max())
        rows, documents = [], []
        for row, index in enumerate(indices.tolist()):
            if index < 0 or self._mine is not None and row not in self._mine:
                rows.append(pad_sequence(EMPTY, length, self._pad, self._apart))
                documents.append(self._documents(index) or [int(sizes[row])] if index >= 0 else [])
                continue
            sequence = self._sequences[index]
            rows.append(pad_sequence(sequence, length, self._pad, self._apart))
            documents.append(list(sequence.lengths or [sequence.tokens.size]))
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if self._packing is None:
            return batch
        batch["padding"] = (length - sizes).astype(np.int32)
        return batch | ({"documents": offsets_of(documents, length, *self._packing)} if self._apart else {})

    def _documents(self, index: int) -> list[int] | None:
        of = getattr(self._sequences, "documents", None)
        return of and of(index)


class TrainingBatches:
    """An endless iterator: every sequence once an epoch, each epoch in another order.

    Yields {"tokens", "labels", "positions"}, int32[grad_accum, rows, padded_len]; positions beyond a document's end
    are padding: pad token, label IGNORED. `get_state` / `set_state` save and restore the position exactly.

    lengths: padded_len, or several, ascending. Then it yields a list of grad_accum batches {...}, int32[rows, length]:
    the sequences of the step, the longest first. Each batch has the smallest length that holds its sequences. A step
    takes the same sequences as with the last length alone.

    order: see order.ordered.
    """

    def __init__(
        self,
        sequences: Sequences,
        lengths: int | tuple[int, ...],
        rows: int,
        grad_accum: int,
        seed: int,
        pad_token: int,
        order: list[tuple[int, float]] | Stages | None = None,
        layout: Layout = Layout(),
    ):
        import grain

        self._shape, self._rows = (grad_accum, rows), Rows(sequences, lengths, pad_token, *layout)
        # Of indices: tokens are read only for the rows of this process. The batch is cut from the endless stream, so a
        # step may hold the end of one epoch and the start of the next.
        dataset = ordered(range(len(sequences)), seed, order).batch(grad_accum * rows)
        # Padding is a copy of a few MB: no threads, whose prefetching would blur the position.
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def __iter__(self) -> Iterator[Arrays | list[Arrays]]:
        return self

    def __next__(self) -> Arrays | list[Arrays]:
        indices = np.asarray(next(self._iterator), np.int64)
        several = len(self._rows.lengths) > 1
        if several:  # batches of sequences of about one length
            indices = indices[np.argsort(-self._rows.sizes(indices), kind="stable")]
        parts = [self._rows.batch(part) for part in indices.reshape(self._shape)]
        return parts if several else {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-serialisable."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


def one_by_one(batches: Arrays | list[Arrays]) -> list[Arrays]:
    """The batches of a step, each of arrays [B, S]."""
    if isinstance(batches, list):
        return batches
    return [{name: array[i] for name, array in batches.items()} for i in range(len(batches["tokens"]))]


def evaluation_batches(
    sequences: Sequences,
    lengths: int | tuple[int, ...],
    rows: int,
    pad_token: int,
    packing: Packing | None = None,
    mine: frozenset[int] | None = None,
) -> Iterator[Arrays]:
    """Every sequence once, in order: int32[rows, length]; the last batch is filled up with rows without labels.

    lengths: see TrainingBatches. packing, mine: see Rows.
    """
    made = Rows(sequences, lengths, pad_token, packing, mine)
    for start in range(0, len(sequences), rows):
        indices = np.arange(start, start + rows)
        batch = made.batch(np.where(indices < len(sequences), indices, -1))
        batch.pop("padding", None)
        yield batch


def pad_sequence(sequence: Sequence, padded_len: int, pad_token: int, packed: bool = False) -> Arrays:
    """tokens, labels and positions, int32[padded_len]. Causal attention keeps the padding behind a document out of it.

    packed: the positions of the sequence's documents start at 0 each; padding has position 0.
    """
    tokens = np.full(padded_len, pad_token, np.int32)
    labels = np.full(padded_len, IGNORED, np.int32)
    tokens[: sequence.tokens.size] = sequence.tokens
    labels[: sequence.labels.size] = sequence.labels
    positions = np.arange(padded_len, dtype=np.int32)
    if packed:
        lengths = pieces_of(sequence, padded_len)
        positions -= np.repeat(np.cumsum([0, *lengths[:-1]], dtype=np.int32), lengths)
        positions[sequence.tokens.size :] = 0  # padding is no long document
    return {"tokens": tokens, "labels": labels, "positions": positions}


def fingerprint(sequences: Sequences, mixture: list[tuple[int, float]] | None = None, known: str | None = None) -> str:
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
