"""Ulysses sequence parallelism (arXiv 2309.14509): swap sequence for heads around attention, and back."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from alst_jax.config import UserError
from alst_jax.ops.attention import attention_backward, attention_forward, attention_from
from alst_jax.ops.tiling import accumulation_dtype
from alst_jax.parallel.vma import vary_like


def _qkv_to_heads(q, k, v, axis):
    degree = lax.axis_size(axis)
    check_degree(degree, q.shape[2])
    repeats = degree // math.gcd(degree, k.shape[2])
    if repeats > 1:
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    return tuple(_to_heads(x, axis) for x in (q, k, v))


def _to_heads(x, axis):
    """[B, S/seq, N, H] -> [B, S, N/seq, H]"""
    return x if lax.axis_size(axis) == 1 else lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


def _to_tokens(x, axis):
    """[B, S, N/seq, H] -> [B, S/seq, N, H]"""
    return x if lax.axis_size(axis) == 1 else lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)


def check_degree(degree: int, heads: int, chunks: int = 1) -> None:
    """UserError, with the degrees that would work, unless `degree` divides the query heads of each of the chunks."""
    if heads % chunks:
        raise UserError(f"--head-chunks {chunks} must divide {heads} query heads; use {_divisors(heads)}")
    if heads // chunks % degree:
        of_chunk = f" of each of {chunks} chunks (--head-chunks)" if chunks > 1 else ""
        raise UserError(f"sp={degree} must divide {heads // chunks} query heads{of_chunk}; use "
                        f"{_divisors(heads // chunks)} (--sp)")


def _divisors(number: int) -> str:
    works = [str(d) for d in range(1, number + 1) if number % d == 0]
    return works[0] if len(works) == 1 else ", ".join(works[:-1]) + " or " + works[-1]


# ------------------------------------------------------------------------------------------ projections and attention


def project_and_attend(
    project: Callable, x: Array, weights: Any, rope: tuple, heads: tuple[int, int], implementation: str, axis: str,
    chunks: int = 1, kept: tuple | None = None,
) -> tuple[Float[Array, "B T N H"], tuple]:
    """Causal attention over the whole sequence, from and to local tokens of it. Runs inside a shard_map over `axis`.

    project(x, weights, rope) -> q[B, S/seq, N, H], k, v[B, S/seq, K, H] -> all-to-all -> q[B, S, N/seq, H] -> attention
    -> all-to-all -> o[B, S/seq, N, H]. kv heads that do not divide over the axis are repeated just as often as needed, so
    that every device has the kv heads its query heads read.

    chunks > 1: that many groups of heads go through all of this one after the other, in both directions, so that queries,
    keys, values and the kernel's workspace exist for one group at a time. weights: (shared, q, k, v); `project` must work
    on any columns (slices of the last dim) of those of q, k and v. heads: (N, K).

    Returns o and the attention's statistics. Both may be handed in again as `kept`: attention is then not run, and what
    comes out is `kept` with the gradients of attention.
    """
    if kept is None and chunks == 1:
        q, k, v = _qkv_to_heads(*project(x, weights, rope), axis)
        results = attention_forward(*lax.stop_gradient((q, k, v)), implementation)
        return _to_tokens(attention_from(q, k, v, results, implementation), axis), results[1]
    spec = (project, heads, implementation, axis, chunks)
    if kept is None:
        kept = _forward(*spec, *lax.stop_gradient((x, weights, rope)))
    elif chunks == 1:
        kept = kept[0], jax.tree.map(lambda y: y[None], kept[1])
    return _from_kept(spec, x, weights, rope, kept), kept[1]


def _chunk(weights, heads, chunks, i):
    """Columns of the (q, k, v) projections that make query heads [i N/C, (i+1) N/C) and the kv heads they read."""
    def columns(w, count):
        head_dim, per_chunk = w.shape[-1] // count, max(1, count // chunks)
        return lax.dynamic_slice_in_dim(w, i * count // chunks * head_dim, per_chunk * head_dim, axis=-1)

    shared, q_weights, k_weights, v_weights = weights
    pick = lambda tree, count: jax.tree.map(lambda w: columns(w, count), tree)
    return shared, pick(q_weights, heads[0]), pick(k_weights, heads[1]), pick(v_weights, heads[1])


def _forward(project, heads, implementation, axis, chunks, x, weights, rope):
    """o and statistics, the latter stacked over the chunks, without gradients."""
    q_shape, *_ = jax.eval_shape(project, x, weights, rope)

    def body(out, i):
        q, k, v = project(x, _chunk(weights, heads, chunks, i), rope)
        o, statistics = attention_forward(*_qkv_to_heads(q, k, v, axis), implementation)
        return _write(out, _to_tokens(o, axis), i * q.shape[2]), statistics

    return lax.scan(body, vary_like(jnp.zeros(q_shape.shape, q_shape.dtype), x), jnp.arange(chunks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_kept(spec, x, weights, rope, kept):
    return kept[0]


def _from_kept_fwd(spec, x, weights, rope, kept):
    return kept[0], (x, weights, rope, kept)


def _from_kept_bwd(spec, residuals, do):
    project, heads, implementation, axis, chunks = spec
    x, weights, rope, (o, statistics) = residuals
    _, pullback = jax.vjp(lambda x, w: project(x, w, rope), x, weights)
    shared = chunks > heads[1]  # several chunks read the same kv head: sum their gradients in float32

    def body(grads, chunk):
        i, statistics = chunk
        q, k, v = project(x, _chunk(weights, heads, chunks, i), rope)
        width, kv_width, at = q.shape[2], k.shape[2], i * heads[1] // chunks
        (q, k, v), swap_back = jax.vjp(lambda q, k, v: _qkv_to_heads(q, k, v, axis), q, k, v)
        take = lambda y: _to_heads(lax.dynamic_slice_in_dim(y, i * width, width, axis=2), axis)
        dq, dk, dv = swap_back(attention_backward(q, k, v, take(o), statistics, take(do), implementation))
        all_dq, all_dk, all_dv = grads
        if shared:
            read = lambda y: lax.dynamic_slice_in_dim(y, at, kv_width, axis=2)
            dk, dv = read(all_dk) + dk.astype(all_dk.dtype), read(all_dv) + dv.astype(all_dv.dtype)
        return (_write(all_dq, dq, i * width), _write(all_dk, dk, at), _write(all_dv, dv, at)), None

    shapes = jax.eval_shape(project, x, weights, rope)
    zeros = tuple(vary_like(jnp.zeros(s.shape, accumulation_dtype(s.dtype) if shared and n else s.dtype), x, do)
                  for n, s in enumerate(shapes))
    grads, _ = lax.scan(body, zeros, (jnp.arange(chunks), statistics))
    # For all heads at once: large products, and no sum over chunks to round.
    dx, dweights = pullback(tuple(g.astype(s.dtype) for g, s in zip(grads, shapes)))
    return dx, dweights, None, None


_from_kept.defvjp(_from_kept_fwd, _from_kept_bwd)


def _write(buffer, heads, at):
    return lax.dynamic_update_slice_in_dim(buffer, heads.astype(buffer.dtype), at, axis=2)
