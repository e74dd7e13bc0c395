"""Attention in plain jax.numpy, for any device and dtype: quadratic time, memory linear in S because queries are tiled.

B rows, S tokens, T query rows of a tile, N query heads, K kv heads, G = N / K, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alst_jax.ops.attention.spec import AttentionSpec, Kernel
from alst_jax.ops.tiling import tiled

SCORES_BYTES = 2**20  # float32 scores of a tile: they stay in a CPU's cache
MIN_ROWS = 16  # queries in a tile at least


def forward(
    q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], spec: AttentionSpec,
    documents: Int[Array, "D1"] | None = None,
) -> tuple[Float[Array, "B S N H"], Float[Array, "B N S"]]:
    """The output and the log-sum-exp of each query's scores."""
    o, lse = _attend(q, k, v, spec, documents, with_lse=True)
    return o, jnp.moveaxis(lse, 0, 2)


def backward(q, k, v, o, lse, do, spec, documents=None):
    """(dq, dk, dv). The forward pass is computed again, a tile at a time; o and lse are not needed."""
    return jax.vjp(lambda q, k, v: _attend(q, k, v, spec, documents, with_lse=False), q, k, v)[1](do)


def _attend(q, k, v, spec, documents, with_lse):
    batch, length, heads, _ = q.shape
    tile = max(MIN_ROWS, SCORES_BYTES // (4 * batch * heads * length))
    number = None if documents is None else document_numbers(documents, batch, length)
    fn = functools.partial(_attend_rows, spec=spec, with_lse=with_lse, key_documents=number)
    fixed = (jnp.arange(length),) if number is None else (jnp.arange(length), number.T)
    out = tiled(fn, q.swapaxes(0, 1), (k, v), *fixed, tile=tile)
    o = out[0] if with_lse else out
    return (o.swapaxes(0, 1), out[1]) if with_lse else o.swapaxes(0, 1)


def document_numbers(documents: Int[Array, "D1"], batch: int, length: int) -> Int[Array, "B S"]:
    """The number of each token's document, from offsets into the flattened tokens."""
    tokens = jnp.arange(batch * length)
    return jnp.searchsorted(documents, tokens, side="right").reshape(batch, length)


def _attend_rows(q_TBNH, kv, row_T, documents_TB=None, *, spec, with_lse, key_documents):
    """Some query rows, at positions row_T, against all keys k[B, S, K, H]."""
    k, v = kv
    tokens, batch, heads, head_dim = q_TBNH.shape
    kv_heads = k.shape[2]
    q = q_TBNH.reshape(tokens, batch, kv_heads, heads // kv_heads, head_dim)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("tbkgh,bskh->bkgts", q, k, preferred_element_type=wide) * spec.scale_of(head_dim)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(_mask(row_T, documents_TB, k.shape[1], spec, key_documents), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    o = jnp.einsum("bkgts,bskh->tbkgh", weights, v).reshape(tokens, batch, heads, head_dim)
    if not with_lse:
        return o
    lse = jax.nn.logsumexp(scores, axis=-1).astype(jnp.float32)
    return o, jnp.moveaxis(lse, 3, 0).reshape(tokens, batch, heads)


def _mask(row_T, documents_TB, length, spec, key_documents):
    """Which keys each query reads: bool[B or 1, 1, 1, T, S]."""
    query, key = row_T[:, None], jnp.arange(length)[None, :]
    mask = key <= query if spec.causal else jnp.ones((row_T.shape[0], length), bool)
    if spec.window is not None:
        mask &= key > query - spec.window
        mask &= key < query + spec.window
    mask = mask[None, None, None]
    if documents_TB is not None:
        mask &= (documents_TB.T[:, :, None] == key_documents[:, None, :])[:, None, None]
    return mask


KERNEL = Kernel("xla", forward, backward, serves=frozenset({"scale", "window", "soft cap", "full", "documents"}))
