"""Tile sizes of flash-attn-4 on Hopper and the sizes of its buffers: plain numbers, no package needed.

Numbers: flash_attn/cute/interface.py of flash-attn-4 4.0.0b36, `_tile_size_fwd_sm90` and `_tile_size_bwd_sm90`, where
q, k and v have one head dim.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from alst_jax.ops.attention.spec import AttentionSpec

MANY_DOCUMENTS = 256  # above it a block finds its document in a table, as in flash-attn-4's interface


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """A block: query rows (times the heads that share a kv head), keys; and where the softmax weights are held."""

    rows: int
    keys: int
    weights_in_registers: bool = True


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """A block: query rows, keys; stages of the pipelines; which products are transposed and how warp groups share them.

    scores: q k^T and do v^T. dkv: the products that make dk and dv. dq: the product that makes dq.
    """

    rows: int
    keys: int
    do_stages: int = 2
    score_stages: int = 2
    swap_scores: bool = True
    swap_dkv: bool = False
    swap_dq: bool = False
    atoms_dkv: int = 2
    atoms_dq: int = 1
    one_group_for_dq: bool = False

    @property
    def head_dim_multiple(self) -> int:
        """The head dim of float32 accumulators is a multiple of this, after rounding up. Served head dims need none."""
        return 64 if self.swap_dkv else 32


FORWARD = {  # head dim: causal, window, full
    64: (ForwardTiles(192, 128), ForwardTiles(192, 128), ForwardTiles(192, 128)),
    96: (ForwardTiles(192, 128, False), ForwardTiles(192, 128, False), ForwardTiles(192, 144, False)),
    128: (ForwardTiles(128, 128), ForwardTiles(128, 128), ForwardTiles(128, 128)),
    192: (ForwardTiles(128, 112), ForwardTiles(128, 96), ForwardTiles(128, 112)),
    256: (ForwardTiles(128, 80), ForwardTiles(128, 64), ForwardTiles(128, 80)),
}
_WIDE = dict(do_stages=1, score_stages=1, swap_scores=False, swap_dkv=True)
BACKWARD = {  # head dim: causal or window, full
    64: (BackwardTiles(128, 128, atoms_dq=2),) * 2,
    96: (BackwardTiles(64, 128, one_group_for_dq=True),) * 2,
    128: (BackwardTiles(64, 128), BackwardTiles(80, 128, swap_dq=True)),
    192: (BackwardTiles(64, 96, **_WIDE),) * 2,
    256: (BackwardTiles(64, 48, atoms_dkv=1, **_WIDE),) * 2,
}
HEAD_DIMS = tuple(FORWARD)


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything a compiled kernel depends on besides the shapes of its arrays. Static, a cache key.

    group: query heads of a kv head. window: tokens read before and behind the query. deterministic: gradients are
    summed in a fixed order.
    """

    dtype: str
    head_dim: int
    group: int
    scale: float
    causal: bool = True
    window: tuple[int, int] | None = None
    soft_cap: float | None = None
    deterministic: bool = False

    @classmethod
    def of(cls, q: Array, k: Array, spec: AttentionSpec, deterministic: bool = False) -> "Call":
        """The call for q[..., N, H] and k[..., K, H]."""
        head_dim, reach = q.shape[-1], None
        if spec.window is not None:
            reach = (spec.window - 1, 0 if spec.causal else spec.window - 1)
        group, scale = q.shape[-2] // k.shape[-2], float(spec.scale_of(head_dim))
        return cls(q.dtype.name, head_dim, group, scale, spec.causal, reach, spec.soft_cap, deterministic)

    @property
    def is_local(self) -> bool:
        return self.window is not None

    @property
    def is_causal(self) -> bool:
        """Causal without a window: a window has its own bound to the right."""
        return self.causal and self.window is None

    @property
    def forward_tiles(self) -> ForwardTiles:
        return FORWARD[self.head_dim][1 if self.is_local else 0 if self.causal else 2]

    @property
    def backward_tiles(self) -> BackwardTiles:
        return BACKWARD[self.head_dim][0 if self.causal or self.is_local else 1]

    def has_table(self, documents: int) -> bool:
        return documents > MANY_DOCUMENTS


def padded(length: int, rows: int, offsets: Array | None = None) -> int:
    """Rows of an accumulator of `length` rows in blocks of `rows`; with offsets[D + 1], room for a block a document."""
    return padded_of(length, rows, 0 if offsets is None else offsets.shape[0] - 1)


def padded_of(length: int, rows: int, documents: int = 0) -> int:
    """`padded`, by the number of documents; 0: dense arrays."""
    return (length + (documents + 1 if documents else 1) * rows - 1) // rows * rows


def block_offsets(offsets: Array, rows: int, heads: int = 1) -> Array:
    """int32[D + 1]: blocks of `rows` rows in all documents before each, when `heads` heads are packed into a block."""
    blocks = (jnp.diff(offsets) * heads + rows - 1) // rows
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(blocks, dtype=jnp.int32)])


def workspace_bytes(
    rows: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    documents: int = 0,
    causal: bool = True,
    ordered: bool = False,
) -> int:
    """Bytes of the backward pass's float32 buffers for q[rows, length, heads, head_dim]: dq, two statistics and, when
    query heads share a kv head, dk and dv. documents: the largest number of documents that is compiled for, 0: none.
    ordered: with the semaphores that fix the order of sums; each document has those of a whole sequence."""
    tiles = BACKWARD[head_dim][0 if causal else 1]
    if documents:
        rows, length = 1, rows * length
    queries, keys = (padded_of(length, size, documents) for size in (tiles.rows, tiles.keys))
    shared = 2 * kv_heads * keys * head_dim if heads != kv_heads else 0
    semaphores = heads * -(-length // tiles.rows) + (4 * kv_heads * -(-length // tiles.keys) if shared else 0)
    return 4 * rows * (heads * queries * (head_dim + 2) + shared + semaphores * max(documents, 1) * ordered)
