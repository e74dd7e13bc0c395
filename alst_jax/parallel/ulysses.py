"""Ulysses sequence parallelism (arXiv 2309.14509): swap sequence for heads around attention, and back.

B rows, S tokens, N query heads, K kv heads, H head dim; `l` marks a dim of which this device holds a part.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from alst_jax.config import UserError
from alst_jax.models.config import ModelConfig
from alst_jax.ops.attention import AttentionSpec, Kernel, attention_backward, attention_forward, attention_from
from alst_jax.parallel import costs
from alst_jax.xla import scopes
from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.order import zeros_after


def qkv_to_heads(q_BlNH: Array, k_BlKH: Array, v_BlKH: Array, axis: str) -> tuple[Array, Array, Array]:
    """q[B, S/seq, N, H], k and v[B, S/seq, K, H] -> q[B, S, N/seq, H], k and v[B, S, K/seq, H]. kv heads that do not
    divide over the axis are repeated just as often as needed."""
    degree = lax.axis_size(axis)
    if reason := costs.why_not(q_BlNH.shape[2], k_BlKH.shape[2], degree, chunks=1):
        raise UserError(reason)
    repeats = degree // math.gcd(degree, k_BlKH.shape[2])
    if repeats > 1:
        k_BlKH, v_BlKH = jnp.repeat(k_BlKH, repeats, axis=2), jnp.repeat(v_BlKH, repeats, axis=2)
    return tuple(to_heads(x, axis) for x in (q_BlNH, k_BlKH, v_BlKH))


@jax.named_scope(scopes.ALL_TO_ALL)
def to_heads(x_BlNH: Array, axis: str) -> Array:
    """[B, S/seq, N, H] -> [B, S, N/seq, H]"""
    if lax.axis_size(axis) == 1:
        return x_BlNH
    return lax.all_to_all(x_BlNH, axis, split_axis=2, concat_axis=1, tiled=True)


@jax.named_scope(scopes.ALL_TO_ALL)
def to_tokens(x_BSlH: Array, axis: str) -> Array:
    """[B, S, N/seq, H] -> [B, S/seq, N, H]"""
    if lax.axis_size(axis) == 1:
        return x_BSlH
    return lax.all_to_all(x_BSlH, axis, split_axis=1, concat_axis=2, tiled=True)


@dataclasses.dataclass(frozen=True)
class Ulysses:
    """`SequenceParallel` by all-to-alls.

    project -> q[B, S/seq, N, H] -> all-to-all -> q[B, S, N/seq, H] -> attention -> all-to-all -> o[B, S/seq, N, H].

    chunks > 1: that many groups of heads go through these stages in turn, in both directions. Queries, keys,
    values and the kernel's workspace exist for one group at a time (UPipe, arXiv 2602.21196).
    """

    traffic = staticmethod(costs.traffic)
    work = staticmethod(costs.work)

    num_heads: int
    num_kv_heads: int
    kernel: str | Kernel
    axis: str
    chunks: int = 1

    def attend(
        self, project: Callable, spec: AttentionSpec, ready: Array, documents: Array | None = None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "C B n S"]]:
        """o, and the log-sum-exps of this device's heads, stacked over the chunks (see `SequenceParallel`)."""

        def one(i):
            q, k, v = qkv_to_heads(*project(i), self.axis)
            results = attention_forward(*lax.stop_gradient((q, k, v)), spec, documents, kernel=self.kernel)
            o = attention_from(q, k, v, results, spec, documents, kernel=self.kernel)
            return to_tokens(o, self.axis), results[1]

        if self.chunks == 1:
            o_BTNH, lse = one(0)
            return o_BTNH, lse[None]
        q = jax.eval_shape(project, 0)[0]
        out = zeros_after(ready, (*q.shape[:2], self.num_heads, q.shape[3]), q.dtype)

        def body(out, i):
            o, lse = one(i)
            return _write(out, o, i * o.shape[2]), lse

        return lax.scan(body, out, jnp.arange(self.chunks))

    def attend_backward(
        self,
        project: Callable,
        spec: AttentionSpec,
        results: tuple,
        do: Float[Array, "B T N H"],
        documents: Array | None = None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """The gradients of q, k and v; q's is written over `do` chunk by chunk (see `SequenceParallel`)."""
        o_BTNH, all_lse = results
        if self.chunks == 1:
            return self._back(project(0), spec, o_BTNH, all_lse[0], do, documents)
        q, k, v = jax.eval_shape(project, 0)
        shared = self.chunks > self.num_kv_heads  # several chunks read the same kv head: sum their gradients in float32
        zeros = lambda s: zeros_after(
            do, (*s.shape[:2], self.num_kv_heads, s.shape[3]), accumulation_dtype(s.dtype) if shared else s.dtype
        )

        def body(grads, chunk):
            i, lse = chunk
            do, all_dk, all_dv = grads
            q, k, v = project(i)
            width, kv_width, at = q.shape[2], k.shape[2], i * self.num_kv_heads // self.chunks
            take = lambda x: lax.dynamic_slice_in_dim(x, i * width, width, axis=2)
            dq, dk, dv = self._back((q, k, v), spec, take(o_BTNH), lse, take(do), documents)
            if shared:
                read = lambda x: lax.dynamic_slice_in_dim(x, at, kv_width, axis=2)
                dk, dv = read(all_dk) + dk.astype(all_dk.dtype), read(all_dv) + dv.astype(all_dv.dtype)
            return (_write(do, dq, i * width), _write(all_dk, dk, at), _write(all_dv, dv, at)), None

        grads, _ = lax.scan(body, (do, zeros(k), zeros(v)), (jnp.arange(self.chunks), all_lse))
        return tuple(g.astype(s.dtype) for g, s in zip(grads, (q, k, v)))

    def _back(self, qkv, spec, o, lse, do, documents):
        qkv, swap_back = jax.vjp(lambda q, k, v: qkv_to_heads(q, k, v, self.axis), *qkv)
        o, do = to_heads(o, self.axis), to_heads(do, self.axis)
        return swap_back(attention_backward(*qkv, (o, lse), do, spec, documents, kernel=self.kernel))

    @staticmethod
    def check(model: ModelConfig, degree: int, chunks: int) -> None:
        """UserError unless the degree divides each chunk's query heads, and chunks share kv heads evenly."""
        if reason := costs.why_not(model.num_heads, model.num_kv_heads, degree, chunks):
            raise UserError(reason)


def _write(buffer, heads, at):
    return lax.dynamic_update_slice_in_dim(buffer, heads.astype(buffer.dtype), at, axis=2)
