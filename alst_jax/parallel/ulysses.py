"""Ulysses sequence parallelism (arXiv 2309.14509): swap sequence for heads around attention, and back."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from alst_jax.config import UserError
from alst_jax.ops.attention import attention_backward, attention_forward, attention_from
from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.order import zeros_after


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


@dataclasses.dataclass(frozen=True)
class Ulysses:
    """Causal attention over the whole sequence, from and to local tokens of it. Runs inside a shard_map over `axis`.

    project(weights) -> q[B, S/seq, N, H], k, v[B, S/seq, K, H] -> all-to-all -> q[B, S, N/seq, H] -> attention
    -> all-to-all -> o[B, S/seq, N, H]. kv heads that do not divide over the axis are repeated just as often as needed, so
    that every device has the kv heads its query heads read.

    chunks > 1: that many groups of heads go through all of this one after the other, in both directions, so that queries,
    keys, values and the kernel's workspace exist for one group at a time (UPipe, arXiv 2602.21196). Weights are then
    (shared, q, k, v), and `project` must work on any columns (slices of the last dim) of those of q, k and v.
    """

    num_heads: int
    num_kv_heads: int
    implementation: str
    axis: str
    chunks: int = 1

    def attend(self, project: Callable, weights: Any, after: Array) -> tuple[Float[Array, "B T N H"], tuple]:
        """o, and the statistics that the kernel's backward pass needs, stacked over the chunks. after: what `project`
        reads, which is there when this begins."""
        def one(i):
            q, k, v = _qkv_to_heads(*project(self._columns(weights, i)), self.axis)
            results = attention_forward(*lax.stop_gradient((q, k, v)), self.implementation)
            return _to_tokens(attention_from(q, k, v, results, self.implementation), self.axis), results[1]

        if self.chunks == 1:
            o, statistics = one(0)
            return o, jax.tree.map(lambda x: x[None], statistics)
        q = jax.eval_shape(project, weights)[0]
        out = zeros_after(after, q.shape, q.dtype, *jax.tree.leaves(weights))

        def body(out, i):
            o, statistics = one(i)
            return _write(out, o, i * o.shape[2]), statistics

        return lax.scan(body, out, jnp.arange(self.chunks))

    def attend_backward(
        self, project: Callable, weights: Any, kept: tuple, do: Float[Array, "B T N H"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """The gradients of q, k and v, from what `attend` gave (`kept`) and the gradient of o, over which that of q is
        written group by group."""
        o, statistics = kept
        if self.chunks == 1:
            return self._back(project(weights), o, jax.tree.map(lambda x: x[0], statistics), do)
        shapes = jax.eval_shape(project, weights)
        shared = self.chunks > self.num_kv_heads  # several chunks read the same kv head: sum their gradients in float32
        zeros = lambda s: zeros_after(do, s.shape, accumulation_dtype(s.dtype) if shared else s.dtype, o)

        def body(grads, chunk):
            i, statistics = chunk
            do, all_dk, all_dv = grads
            q, k, v = project(self._columns(weights, i))
            width, kv_width, at = q.shape[2], k.shape[2], i * self.num_kv_heads // self.chunks
            take = lambda x: lax.dynamic_slice_in_dim(x, i * width, width, axis=2)
            dq, dk, dv = self._back((q, k, v), take(o), statistics, take(do))
            if shared:
                read = lambda x: lax.dynamic_slice_in_dim(x, at, kv_width, axis=2)
                dk, dv = read(all_dk) + dk.astype(all_dk.dtype), read(all_dv) + dv.astype(all_dv.dtype)
            return (_write(do, dq, i * width), _write(all_dk, dk, at), _write(all_dv, dv, at)), None

        grads, _ = lax.scan(body, (do, *map(zeros, shapes[1:])), (jnp.arange(self.chunks), statistics))
        return tuple(g.astype(s.dtype) for g, s in zip(grads, shapes))

    def _back(self, qkv, o, statistics, do):
        qkv, swap_back = jax.vjp(lambda q, k, v: _qkv_to_heads(q, k, v, self.axis), *qkv)
        o, do = _to_heads(o, self.axis), _to_heads(do, self.axis)
        return swap_back(attention_backward(*qkv, o, statistics, do, self.implementation))

    def _columns(self, weights, i):
        """Columns of the projections that make query heads [i N/C, (i+1) N/C) and the kv heads they read."""
        if self.chunks == 1:
            return weights

        def columns(w, count):
            head_dim, per_chunk = w.shape[-1] // count, max(1, count // self.chunks)
            return lax.dynamic_slice_in_dim(w, i * count // self.chunks * head_dim, per_chunk * head_dim, axis=-1)

        shared, q_weights, k_weights, v_weights = weights
        pick = lambda tree, count: jax.tree.map(lambda w: columns(w, count), tree)
        return shared, pick(q_weights, self.num_heads), pick(k_weights, self.num_kv_heads), pick(v_weights, self.num_kv_heads)


def _write(buffer, heads, at):
    return lax.dynamic_update_slice_in_dim(buffer, heads.astype(buffer.dtype), at, axis=2)
