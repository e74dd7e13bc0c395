"""The arrays of one step, how they are sharded, and the numbers of their labels."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alst_jax.config import IGNORED
from alst_jax.parallel.mesh import DATA, SEQ
from alst_jax.processes.link import link


class Batch(NamedTuple):
    """int32 arrays. tokens, labels, positions [B, S], sharded over (data, seq). Labels are already shifted: labels[t]
    follows tokens[t].

    documents [data, D + 1], sharded over data: for each data-parallel replica the offsets of its packed documents into
    its B S / data tokens, from 0 to their number; repeated last offsets are empty documents. None: each sequence is one
    document.

    draws uint32[2], equal on all devices: the number of the optimizer step, and the tokens of its earlier batches; they
    say which inputs of adapters dropout sets to zero. None: none.
    """

    tokens: jax.Array
    labels: jax.Array
    positions: jax.Array
    documents: jax.Array | None = None
    draws: jax.Array | None = None

    @staticmethod
    def specs() -> "Batch":
        """The PartitionSpec of each field."""
        return Batch(BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, DOCUMENTS_SPEC, P())

    @staticmethod
    def abstract(rows: int, length: int, mesh: Mesh, documents: int = 0, dropout: bool = False) -> "Batch":
        """The fields as ShapeDtypeStructs. documents: the largest number of documents of a replica; 0: not packed."""
        made = lambda shape, spec, dtype="int32": jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        offsets = made((mesh.shape[DATA], documents + 1), DOCUMENTS_SPEC) if documents else None
        draws = made((2,), P(), "uint32") if dropout else None
        return Batch(*[made((rows, length), BATCH_SPEC)] * 3, offsets, draws)


BATCH_SPEC = P(DATA, SEQ)  # [sequences/data, tokens/seq]
DOCUMENTS_SPEC = P(DATA)  # [1, offsets]


def count_labels(labels: np.ndarray) -> int:
    """Labels that take part in the loss."""
    return int(np.count_nonzero(labels != IGNORED))


def labels_of_rows(labels: np.ndarray) -> list[int]:
    """The labels of each row that take part in the loss. labels int32[rows, S]."""
    return np.count_nonzero(labels != IGNORED, axis=1).tolist()


def count_all_labels(rows: list[int]) -> int:
    """The sum of `labels_of_rows` over all rows. Each process has the labels of the rows that it reads, and none of the
    others."""
    return int(np.max(link().exchange("labels", rows), axis=0).sum()) if rows else 0
