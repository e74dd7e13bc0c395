"""What some layers keep on the device besides their attention output, so that less is computed again.

Nested levels: a layer's input; its attention output; queries, keys and values; the MLP's gate and up. Arrays of a run
of layers are stacked, and are read and written in place: a copy of one layer's row would need as much memory again.

B batch, T local tokens, N query heads, K kv heads, H head dim, F ffn.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from alst_jax.segments import Run
from alst_jax.xla.order import zeros_after

Index = Array | int


class Kept(NamedTuple):
    """The saved arrays of a run of layers; None: not saved.

    qkv: q[layers, B, T, N, H], k[layers, B, T, K, H] and v, after rope. gated: gate and up[layers, B T, F].
    row: of the layer that reads or writes them.
    """

    qkv: tuple[Array, Array, Array] | None = None
    gated: tuple[Array, Array] | None = None
    row: Index = 0

    def projector(self, chunks: int) -> Callable:
        """project(i) -> q, k, v of chunk i, as `SequenceParallel` asks for them."""
        return lambda i: heads_of(self.qkv, self.row, i, chunks)

    def tile(self, start: Index, tokens: int) -> tuple[Array, Array] | None:
        """gate and up of some tokens of the layer; None: they are not saved."""
        cut = lambda x: lax.dynamic_slice(x, _index(self.row, start, 0), (1, tokens, x.shape[2]))[0]
        return self.gated and tuple(map(cut, self.gated))


def heads_of(qkv: tuple, row: Index, i: Index, chunks: int) -> tuple[Array, Array, Array]:
    """q, k, v of chunk i: the heads that `Block.heads` would make."""
    q, k, v = qkv
    kv = min(chunks, k.shape[3])  # parts of the kv heads

    def cut(x, at, parts):
        heads = x.shape[3] // parts
        return lax.dynamic_slice(x, _index(row, 0, 0, at * heads, 0), (1, *x.shape[1:3], heads, x.shape[4]))[0]

    return cut(q, i, chunks), *(cut(x, i * kv // chunks, kv) for x in (k, v))


def put_tile(gated: tuple, new: tuple, row: Index, start: Index) -> tuple:
    """The stacks of gate and up with some tokens of one layer replaced, in place."""
    return tuple(lax.dynamic_update_slice(x, part[None], _index(row, start, 0)) for x, part in zip(gated, new))


def places(run: Run, h: Array, ffn: int) -> tuple | None:
    """Stacks for gate and up of a run of layers, made after h[B, T, D]; None: the run does not save them."""
    shape = (run.layers, h.shape[0] * h.shape[1], ffn)
    return tuple(zeros_after(h, shape, h.dtype) for _ in range(2)) if run.mlp else None


def _index(*numbers):
    return tuple(jnp.asarray(n, jnp.int32) for n in numbers)
