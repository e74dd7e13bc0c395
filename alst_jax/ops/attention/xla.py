"""Attention in plain jax.numpy, for any device and dtype: memory linear in S because queries are tiled.

Without a window and documents, a tile of queries reads all keys: quadratic time. With them, it reads only the tiles of
keys from its first query's first key to its last query's last one: time grows with S x window, or with the sum of the
documents' squares.

B rows, S tokens, P = B S packed tokens, T query rows of a tile, R keys of a tile, N query heads, K kv heads, G = N / K,
H head dim.
"""

import functools
from typing import NamedTuple

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
MAX_TILE = 256  # queries, and keys, of a tile that reads a part of the keys


def forward(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
    documents: Int[Array, "D1"] | None = None,
) -> tuple[Float[Array, "B S N H"], Float[Array, "B N S"]]:
    """The output and the log-sum-exp of each query's scores."""
    if documents is not None or spec.window is not None:
        return _ranged_forward(q, k, v, spec, documents)
    o, lse = _attend(q, k, v, spec, with_lse=True)
    return o, jnp.moveaxis(lse, 0, 2)


def backward(q, k, v, o, lse, do, spec, documents=None):
    """(dq, dk, dv). Without a window, documents and sinks the forward pass is computed again, a tile at a time; o and
    lse are not needed."""
    if documents is not None or spec.window is not None or spec.sinks:
        return _ranged_backward(q, k, v, o, lse, do, spec, documents)
    return jax.vjp(lambda q, k, v: _attend(q, k, v, spec, with_lse=False), q, k, v)[1](do)


# -------------------------------------------------------------------------------------------------- all keys at a time


def _attend(q, k, v, spec, with_lse):
    batch, length, heads, _ = q.shape
    tile = max(MIN_ROWS, SCORES_BYTES // (4 * batch * heads * length))
    fn = functools.partial(_attend_rows, spec=spec, with_lse=with_lse)
    out = tiled(fn, q.swapaxes(0, 1), (k, v), jnp.arange(length), tile=tile)
    o = out[0] if with_lse else out
    return (o.swapaxes(0, 1), out[1]) if with_lse else o.swapaxes(0, 1)


def _attend_rows(q_TBNH, kv, row_T, *, spec, with_lse):
    """Some query rows, at positions row_T, against all keys k[B, S, K, H]."""
    k, v = kv
    tokens, batch, heads, head_dim = q_TBNH.shape
    kv_heads = k.shape[2]
    q = q_TBNH.reshape(tokens, batch, kv_heads, heads // kv_heads, head_dim)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("tbkgh,bskh->bkgts", q, k, preferred_element_type=wide) * spec.scale_of(head_dim)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    if spec.causal:
        mask = jnp.arange(k.shape[1])[None, :] <= row_T[:, None]
        scores = jnp.where(mask[None, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    o = jnp.einsum("bkgts,bskh->tbkgh", weights, v).reshape(tokens, batch, heads, head_dim)
    if not with_lse:
        return o
    lse = jax.nn.logsumexp(scores, axis=-1).astype(jnp.float32)
    return o, jnp.moveaxis(lse, 3, 0).reshape(tokens, batch, heads)


# --------------------------------------------------------------------------------------- the keys that a tile can reach


class Ranges(NamedTuple):
    """Query at row p reads the keys first[p], ..., last[p] - 1 of the P packed tokens."""

    first: Int[Array, "P"]
    last: Int[Array, "P"]


def key_ranges(batch: int, length: int, spec: AttentionSpec, documents: Int[Array, "D1"] | None) -> Ranges:
    """From offsets of documents into the B S tokens; None: each row is a document."""
    row = jnp.arange(batch * length, dtype=jnp.int32)
    if documents is None:
        first = row // length * length
        last = first + length
    else:
        number = jnp.searchsorted(documents, row, side="right")
        # Behind the last document nothing is read but the token itself.
        outside = (number == 0) | (number == documents.shape[0])
        first = jnp.where(outside, row, documents[jnp.maximum(number - 1, 0)])
        last = jnp.where(outside, row + 1, documents[jnp.minimum(number, documents.shape[0] - 1)])
    if spec.window is not None:
        first, last = jnp.maximum(first, row - (spec.window - 1)), jnp.minimum(last, row + spec.window)
    return Ranges(first.astype(jnp.int32), jnp.minimum(last, row + 1) if spec.causal else last.astype(jnp.int32))


class Tiles:
    """Scores of a tile of queries against the tiles of keys that it reaches."""

    def __init__(self, q, k, v, spec, documents):
        (batch, length, heads, self.head_dim), self.kv_heads, self.spec = q.shape, k.shape[2], spec
        self.rows, self.group = batch * length, heads // k.shape[2]
        self.ranges = key_ranges(batch, length, spec, documents)
        at_most = max(MIN_ROWS, int((SCORES_BYTES / (4 * heads)) ** 0.5))
        self.tile = min(self.rows, MAX_TILE, at_most)
        self.k, self.v = (x.reshape(self.rows, self.kv_heads, self.head_dim) for x in (k, v))

    def grouped(self, x):
        """x[B, S, N, ...] -> [P, K, G, ...]"""
        return x.reshape(self.rows, self.kv_heads, self.group, *x.shape[3:])

    def over_keys(self, body, carry, first, last):
        """body(carry, start, keys[R] that count) -> carry, for each tile of keys that rows with these ranges reach."""
        low, high = jnp.min(first) // self.tile, (jnp.max(last) - 1) // self.tile + 1

        def one(i, carry):
            start = jnp.minimum(i * self.tile, self.rows - self.tile)  # the last tile overlaps the one before
            keys = start + jnp.arange(self.tile, dtype=jnp.int32)
            return body(carry, start, jnp.where(keys >= i * self.tile, keys, -1))

        return lax.fori_loop(low, high, one, carry)

    def scores(self, q_TKGH, start, keys, first, last):
        """(scores [K, G, T, R], -inf where a query does not read a key; the factor of their gradient before the
        cap)."""
        k = lax.dynamic_slice_in_dim(self.k, start, self.tile)
        wide = accumulation_dtype(q_TKGH.dtype)
        raw = jnp.einsum("tkgh,rkh->kgtr", q_TKGH, k, preferred_element_type=wide) * self.spec.scale_of(self.head_dim)
        slope = None
        if self.spec.soft_cap is not None:
            bent = jnp.tanh(raw / self.spec.soft_cap)
            raw, slope = self.spec.soft_cap * bent, 1 - bent * bent
        mask = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
        return jnp.where(mask[None, None], raw, -jnp.inf), slope


def _ranged_forward(q, k, v, spec, documents):
    tiles, wide = Tiles(q, k, v, spec, documents), accumulation_dtype(q.dtype)
    like = (q, k, v, tiles.ranges.first)

    def of_queries(_, __, rows):
        q_TKGH, first, last = rows

        def add(carry, start, keys):
            most, total, o = carry
            scores, _ = tiles.scores(q_TKGH, start, keys, first, last)
            new = jnp.maximum(most, scores.max(-1))
            safe = jnp.where(jnp.isfinite(new), new, 0)  # of rows whose keys come later
            weights, shrink = jnp.exp(scores - safe[..., None]), jnp.exp(most - safe)
            v = lax.dynamic_slice_in_dim(tiles.v, start, tiles.tile)
            part = jnp.einsum("kgtr,rkh->kgth", weights.astype(v.dtype), v, preferred_element_type=wide)
            return new, total * shrink + weights.sum(-1), o * shrink[..., None] + part

        shape = (tiles.kv_heads, tiles.group, q_TKGH.shape[0])
        zeros = jnp.full(shape, -jnp.inf, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, tiles.head_dim), wide)
        most, total, o = tiles.over_keys(add, tuple(vary_like(x, *like) for x in zeros), first, last)
        o, lse = o / total[..., None], most + jnp.log(total)
        return (), (jnp.moveaxis(o, 2, 0).astype(q.dtype), jnp.moveaxis(lse, 2, 0).astype(jnp.float32))

    q_PKGH = tiles.grouped(q)
    written = tuple(vary_like(x, *like) for x in (jnp.zeros_like(q_PKGH), jnp.zeros(q_PKGH.shape[:3], jnp.float32)))
    _, (o, lse) = stream(of_queries, (), written=written, read=(q_PKGH, *tiles.ranges), rows=tiles.tile)
    return o.reshape(q.shape), jnp.moveaxis(lse.reshape(q.shape[:3]), 1, 2)


def _ranged_backward(q, k, v, o, lse, do, spec, documents):
    """(dq, dk, dv); tiles of queries add to the gradients of the keys and values that they read."""
    tiles, wide = Tiles(q, k, v, spec, documents), accumulation_dtype(q.dtype)
    like = (q, k, v, do, tiles.ranges.first)
    scale = spec.scale_of(tiles.head_dim)

    def of_queries(sums, _, rows):
        q_TKGH, do_TKGH, lse_TKG, delta_TKG, first, last = rows
        lse_KGT, delta_KGT = (jnp.moveaxis(x, 0, 2) for x in (lse_TKG, delta_TKG))

        def add(carry, start, keys):
            dq, dk, dv = carry
            scores, slope = tiles.scores(q_TKGH, start, keys, first, last)
            weights = jnp.exp(scores - lse_KGT[..., None])
            k, v = (lax.dynamic_slice_in_dim(x, start, tiles.tile) for x in (tiles.k, tiles.v))
            dweights = jnp.einsum("tkgh,rkh->kgtr", do_TKGH, v, preferred_element_type=wide)
            dscores = weights * (dweights - delta_KGT[..., None]) * scale
            dscores = (dscores if slope is None else dscores * slope).astype(q.dtype)
            dq += jnp.einsum("kgtr,rkh->tkgh", dscores, k, preferred_element_type=wide)
            more = lambda x, w: jnp.einsum("kgtr,tkgh->rkh", w, x, preferred_element_type=wide)
            put = lambda total, new: lax.dynamic_update_slice_in_dim(
                total, lax.dynamic_slice_in_dim(total, start, tiles.tile) + new, start, axis=0
            )
            return dq, put(dk, more(q_TKGH, dscores)), put(dv, more(do_TKGH, weights.astype(q.dtype)))

        zeros = vary_like(jnp.zeros(q_TKGH.shape, wide), *like)
        dq, dk, dv = tiles.over_keys(add, (zeros, *sums), first, last)
        return (dk, dv), (dq.astype(q.dtype),)

    delta = jnp.sum(o.astype(wide) * do.astype(wide), axis=-1)
    read = (*map(tiles.grouped, (q, do, jnp.moveaxis(lse, 1, 2), delta)), *tiles.ranges)
    sums = tuple(vary_like(jnp.zeros(x.shape, wide), *like) for x in (tiles.k, tiles.v))
    written = (vary_like(jnp.zeros_like(read[0]), *like),)
    (dk, dv), (dq,) = stream(of_queries, sums, written=written, read=read, rows=tiles.tile)
    return dq.reshape(q.shape), dk.reshape(k.shape).astype(k.dtype), dv.reshape(v.shape).astype(v.dtype)


KERNEL = Kernel(
    "xla", forward, backward, serves=frozenset({"scale", "window", "soft cap", "full", "documents", "sinks"})
)
