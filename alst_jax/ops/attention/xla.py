"""Attention in plain jax.numpy, for any device and dtype: quadratic time, memory linear in S because queries are tiled.

With a window, a tile of queries reads only the keys that its window reaches: time grows with S x window.

B rows, S tokens, T query rows of a tile, R keys that a tile reaches, N query heads, K kv heads, G = N / K, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alst_jax.ops.attention.spec import AttentionSpec, Kernel
from alst_jax.ops.tiling import stream, tiled
from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.varying import vary_like

SCORES_BYTES = 2**20  # float32 scores of a tile: they stay in a CPU's cache
MIN_ROWS = 16  # queries in a tile at least


def forward(
    q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], spec: AttentionSpec,
    documents: Int[Array, "D1"] | None = None,
) -> tuple[Float[Array, "B S N H"], Float[Array, "B N S"]]:
    """The output and the log-sum-exp of each query's scores."""
    if tile := window_tile(q.shape, spec):
        o, lse = _window_forward(q, k, v, spec, documents, tile)
    else:
        o, lse = _attend(q, k, v, spec, documents, with_lse=True)
    return o, jnp.moveaxis(lse, 0, 2)


def backward(q, k, v, o, lse, do, spec, documents=None):
    """(dq, dk, dv). The forward pass is computed again, a tile at a time; o and lse are not needed."""
    if tile := window_tile(q.shape, spec):
        return _window_backward(q, k, v, do, spec, documents, tile)
    return jax.vjp(lambda q, k, v: _attend(q, k, v, spec, documents, with_lse=False), q, k, v)[1](do)


def _attend(q, k, v, spec, documents, with_lse):
    batch, length, heads, _ = q.shape
    tile = max(MIN_ROWS, SCORES_BYTES // (4 * batch * heads * length))
    number = None if documents is None else document_numbers(documents, batch, length)
    fn = functools.partial(_attend_rows, spec=spec, with_lse=with_lse, key_documents=number, keys=jnp.arange(length))
    fixed = (jnp.arange(length),) if number is None else (jnp.arange(length), number.T)
    out = tiled(fn, q.swapaxes(0, 1), (k, v), *fixed, tile=tile)
    o = out[0] if with_lse else out
    return (o.swapaxes(0, 1), out[1]) if with_lse else o.swapaxes(0, 1)


def document_numbers(documents: Int[Array, "D1"], batch: int, length: int) -> Int[Array, "B S"]:
    """The number of each token's document, from offsets into the flattened tokens."""
    tokens = jnp.arange(batch * length)
    return jnp.searchsorted(documents, tokens, side="right").reshape(batch, length)


def window_tile(q_shape: tuple[int, ...], spec: AttentionSpec) -> int | None:
    """Query rows of a tile that reads a part of the keys; None where tiles read all keys."""
    if spec.window is None:
        return None
    batch, length, heads, _ = q_shape
    # At least a quarter of the keys that a tile reads are its own, else their gradients are read and written too often.
    tile = max(MIN_ROWS, spec.window // 4, SCORES_BYTES // (4 * batch * heads * spec.window))
    return tile if reach(tile, spec) < length else None


def reach(tile: int, spec: AttentionSpec) -> int:
    """Keys that a tile of queries reads."""
    return tile + (spec.window - 1) * (1 if spec.causal else 2)


def _window_of(row_T, k, number, spec):
    """(first key, key positions [R], document numbers [B, R]) that the queries at row_T reach."""
    width = reach(row_T.shape[0], spec)
    # A shorter last tile may reach over the end; its keys then start earlier, and the mask leaves out what is too much.
    first = jnp.clip(row_T[0] - (spec.window - 1), 0, max(k.shape[1] - width, 0))
    keys = first + jnp.arange(min(width, k.shape[1]))
    documents = None if number is None else lax.dynamic_slice_in_dim(number, first, keys.shape[0], axis=1)
    return first, keys, documents


def _window_rows(q, k, v, documents, spec):
    """(arrays to be read in tiles of queries, fn(rows, with_lse) -> (first key, its keys and values, attention))"""
    number = None if documents is None else document_numbers(documents, *q.shape[:2])
    fixed = (jnp.arange(q.shape[1]),) if number is None else (jnp.arange(q.shape[1]), number.T)

    def of(fixed_rows, with_lse):
        first, keys, key_documents = _window_of(fixed_rows[0], k, number, spec)
        kv = tuple(lax.dynamic_slice_in_dim(x, first, keys.shape[0], axis=1) for x in (k, v))
        attend = lambda q_TBNH, kv: _attend_rows(
            q_TBNH, kv, *fixed_rows, spec=spec, with_lse=with_lse, key_documents=key_documents, keys=keys)
        return first, kv, attend

    return fixed, of


def _window_forward(q, k, v, spec, documents, tile):
    """o[B, S, N, H] and lse[S, B, N]."""
    batch, length, heads, _ = q.shape
    fixed, of = _window_rows(q, k, v, documents, spec)

    def body(carry, _, rows):
        _, kv, attend = of(rows[1:], with_lse=True)
        return carry, attend(rows[0], kv)

    q_SBNH = q.swapaxes(0, 1)
    written = jnp.zeros_like(q_SBNH), jnp.zeros((length, batch, heads), jnp.float32)
    written = tuple(vary_like(x, q, k, v) for x in written)
    o, lse = stream(body, (), written=written, read=(q_SBNH, *fixed), rows=tile)[1]
    return o.swapaxes(0, 1), lse


def _window_backward(q, k, v, do, spec, documents, tile):
    """(dq, dk, dv); tiles add to the gradients of the keys and values that they read."""
    fixed, of = _window_rows(q, k, v, documents, spec)

    def body(sums, _, rows):
        q_TBNH, do_TBNH, *fixed_rows = rows
        first, kv, attend = of(fixed_rows, with_lse=False)
        dq, dkv = jax.vjp(attend, q_TBNH, kv)[1](do_TBNH)
        add = lambda total, d: lax.dynamic_update_slice_in_dim(
            total, lax.dynamic_slice_in_dim(total, first, d.shape[1], axis=1) + d.astype(total.dtype), first, axis=1)
        return tuple(map(add, sums, dkv)), (dq,)

    vary = lambda x: vary_like(x, q, k, v, do)
    zeros = tuple(vary(jnp.zeros(x.shape, accumulation_dtype(x.dtype))) for x in (k, v))
    q_SBNH, do_SBNH = q.swapaxes(0, 1), do.swapaxes(0, 1)
    places = (vary(jnp.zeros_like(q_SBNH)),)
    (dk, dv), (dq,) = stream(body, zeros, written=places, read=(q_SBNH, do_SBNH, *fixed), rows=tile)
    return dq.swapaxes(0, 1), dk.astype(k.dtype), dv.astype(v.dtype)


def _attend_rows(q_TBNH, kv, row_T, documents_TB=None, *, spec, with_lse, key_documents, keys):
    """Some query rows, at positions row_T, against k[B, R, K, H], at positions keys[R]."""
    k, v = kv
    tokens, batch, heads, head_dim = q_TBNH.shape
    kv_heads = k.shape[2]
    q = q_TBNH.reshape(tokens, batch, kv_heads, heads // kv_heads, head_dim)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("tbkgh,bskh->bkgts", q, k, preferred_element_type=wide) * spec.scale_of(head_dim)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(_mask(row_T, documents_TB, keys, spec, key_documents), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    o = jnp.einsum("bkgts,bskh->tbkgh", weights, v).reshape(tokens, batch, heads, head_dim)
    if not with_lse:
        return o
    lse = jax.nn.logsumexp(scores, axis=-1).astype(jnp.float32)
    return o, jnp.moveaxis(lse, 3, 0).reshape(tokens, batch, heads)


def _mask(row_T, documents_TB, keys, spec, key_documents):
    """Which keys each query reads: bool[B or 1, 1, 1, T, R]."""
    query, key = row_T[:, None], keys[None, :]
    mask = key <= query if spec.causal else jnp.ones((row_T.shape[0], keys.shape[0]), bool)
    if spec.window is not None:
        mask &= key > query - spec.window
        mask &= key < query + spec.window
    mask = mask[None, None, None]
    if documents_TB is not None:
        mask &= (documents_TB.T[:, :, None] == key_documents[:, None, :])[:, None, None]
    return mask


KERNEL = Kernel("xla", forward, backward, serves=frozenset({"scale", "window", "soft cap", "full", "documents"}))
