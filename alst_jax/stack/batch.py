"""The arrays of one step, and how they are sharded."""

from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from alst_jax.parallel.mesh import DATA, SEQ


class Batch(NamedTuple):
    """int32 arrays [B, S], sharded over (data, seq). Labels are already shifted: labels[t] follows tokens[t]."""

    tokens: jax.Array
    labels: jax.Array
    positions: jax.Array

    @staticmethod
    def specs() -> "Batch":
        """The PartitionSpec of each field."""
        return Batch(*[BATCH_SPEC] * len(Batch._fields))

    @staticmethod
    def abstract(rows: int, length: int, sharding: jax.sharding.NamedSharding) -> "Batch":
        """The fields as ShapeDtypeStructs; sharding: on a mesh, of BATCH_SPEC."""
        return Batch(*[jax.ShapeDtypeStruct((rows, length), "int32", sharding=sharding)] * len(Batch._fields))


BATCH_SPEC = P(DATA, SEQ)  # [sequences/data, tokens/seq]
