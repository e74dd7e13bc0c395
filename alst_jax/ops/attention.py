"""Causal attention over whole sequences, for the heads that are here. No kernel is used past the length where it is right."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alst_jax.config import UserError
from alst_jax.ops.tiling import tiled
from alst_jax.xla.opaque import opaque

SCORES_BYTES = 2**20  # float32 scores the XLA implementation works on at once: they stay in a CPU's cache
MIN_ROWS = 16  # queries in a tile at least
# cuDNN's backward indexes q with 32-bit integers: above 2^31 elements its dQ is wrong without an error (measured, jax
# 0.11.2, cuDNN 9.19: the rows past element 2^31 are off by 100%).
CUDNN_MAX_ELEMENTS = 2**31
TOKAMAX_KERNEL = "tokamax._src.ops.attention.pallas_mosaic_gpu"
TOKAMAX_TILES = dict(block_q=64, block_kv=128, num_stages=2, persistent=False)  # the fastest tried, see docs/log.md


def import_kernel(implementation: str) -> None:
    """Import a kernel's package, if it is here. Call before anything is traced: tokamax adds options of its own to the key of
    jax's caches (`jax.make_user_context`), so that a program in whose trace it is imported is compiled twice."""
    if implementation == "tokamax" and importlib.util.find_spec("tokamax") is not None:
        importlib.import_module(TOKAMAX_KERNEL)


def attention(
    q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], implementation: str
) -> Float[Array, "B S N H"]:
    """softmax(q k^T / sqrt(H)) v over earlier and equal positions; query head n reads kv head n // (N / K).

    implementation: "cudnn" (GPU, bfloat16 or float16, S a multiple of 128), "tokamax" (the same, with tokamax's kernel for
    Hopper forward and cuDNN's backward: each is the faster one at length) or "xla" (any device and dtype; quadratic time,
    memory linear in S because queries are tiled).
    """
    return attention_from(q, k, v, attention_forward(*jax.lax.stop_gradient((q, k, v)), implementation), implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention_from(q: Array, k: Array, v: Array, results: tuple, implementation: str) -> Array:
    """o, where (o, statistics) = results are what `attention_forward` gave for q, k, v: only the gradient is computed."""
    return results[0]


def _attention_from_fwd(q, k, v, results, implementation):
    return results[0], (q, k, v, *results)


def _attention_from_bwd(implementation, residuals, do):
    return *attention_backward(*residuals, do, implementation), None


attention_from.defvjp(_attention_from_fwd, _attention_from_bwd)


def attention_forward(q: Array, k: Array, v: Array, implementation: str) -> tuple[Array, tuple[Array, ...]]:
    """The output o[B, S, N, H] and what the backward pass needs besides q, k, v and o: log-sum-exp[B, N, S], or nothing."""
    if implementation in ("cudnn", "tokamax"):
        forward = _cudnn_forward if implementation == "cudnn" else _tokamax_forward
        outputs, statistics = zip(*(forward(*piece) for piece in _split_heads(q, k, v)))
        return _concatenate(outputs, axis=2), tuple(_concatenate(parts, axis=1) for parts in zip(*statistics))
    if implementation == "xla":
        return _xla_attention(q, k, v), ()
    raise ValueError(f"attention implementation {implementation!r}: cudnn, tokamax or xla")


def attention_backward(
    q: Array, k: Array, v: Array, o: Array, statistics: tuple[Array, ...], do: Array, implementation: str
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of `attention_forward`, from its results; no forward is run again."""
    if implementation == "xla":
        return jax.vjp(_xla_attention, q, k, v)[1](do)
    pieces = _split_heads(q, k, v)
    split = lambda x, axis: jnp.split(x, len(pieces), axis=axis)
    grads = [_cudnn_backward(*piece, o_i, (lse_i,), do_i) for piece, o_i, lse_i, do_i in zip(
        pieces, split(o, 2), split(statistics[0], 1), split(do, 2))]
    dq, dk, dv = zip(*grads)
    shared = len(pieces) // k.shape[2]  # groups that read the same kv head
    return _concatenate(dq, axis=2), *(_concatenate(_sum_runs(d, shared), axis=2) for d in (dk, dv))


def _concatenate(parts, axis):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def _sum_runs(parts, run):
    """Sums of each `run` neighbours, in float32."""
    if run <= 1:
        return parts
    return [sum(x.astype(jnp.float32) for x in parts[i : i + run]).astype(parts[0].dtype) for i in range(0, len(parts), run)]


def _xla_attention(q, k, v):
    batch, length, heads, head_dim = q.shape
    tile = max(MIN_ROWS, SCORES_BYTES // (4 * batch * heads * length))
    out = tiled(_attend_rows, tile, q.swapaxes(0, 1), (k, v), jnp.arange(length))
    return out.swapaxes(0, 1)


def _attend_rows(q, kv, row):
    """Some query rows q[T, B, N, H] at positions row[T] against all keys k[B, S, K, H]."""
    k, v = kv
    tokens, batch, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(tokens, batch, kv_heads, heads // kv_heads, head_dim)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("tbkgh,bskh->bkgts", q, k, preferred_element_type=wide) * head_dim**-0.5
    earlier = jnp.arange(k.shape[1])[None, :] <= row[:, None]
    weights = jax.nn.softmax(jnp.where(earlier[None, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->tbkgh", weights, v).reshape(tokens, batch, heads, head_dim)


def _cudnn(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_forward(q, k, v):
    o, pullback = jax.vjp(_cudnn, q, k, v)
    statistics = tuple(x for x in jax.tree.leaves(pullback) if not _is_one_of(x, (q, k, v, o)) and x.size)
    if len(statistics) != 1:
        raise RuntimeError(f"jax {jax.__version__} keeps {len(statistics)} arrays besides q, k, v and o for the backward "
                           "pass of cuDNN attention, not the log-sum-exp alone; use --attention xla or another jax")
    return o, statistics


def _cudnn_backward(q, k, v, o, statistics, do):
    # jax has no public call for the backward pass alone. The pullback is a tree of what the forward pass kept: trace that
    # once more, put in what was kept then, and the forward traced here is dead code.
    fresh, pullback = jax.vjp(_cudnn, q, k, v)
    leaves, treedef = jax.tree.flatten(pullback)
    kept = iter(statistics)
    swap = lambda x: o if x is fresh else x if _is_one_of(x, (q, k, v)) or not x.size else next(kept)
    return treedef.unflatten([swap(x) for x in leaves])(do)


def _tokamax_forward(q, k, v):
    o, largest, total = opaque(_tokamax_kernel)(q, k, v)
    return o, (largest + jnp.log(total),)


def _tokamax_kernel(q, k, v):
    """o[B, S, N, H] and, of each query's scores, the largest and the sum of exponentials relative to it [B, N, S]."""
    # The public tokamax.dot_product_attention has no way to ask for these.
    tokamax = importlib.import_module(TOKAMAX_KERNEL)
    kernel = tokamax.PallasMosaicGpuFlashAttention(config=tokamax.ConfigSM90(**TOKAMAX_TILES))
    o, (largest, total) = kernel(q, k, v, is_causal=True, return_residuals=True)
    return o, largest, total


def _is_one_of(x, others) -> bool:
    return any(x is other for other in others)


def _split_heads(q, k, v) -> list[tuple[Array, Array, Array]]:
    """q, k, v in as few groups of heads as cuDNN's index range allows."""
    # Unrolled on purpose: a scan's residuals could not be offloaded to host memory inside the scan over layers.
    groups, kv_heads = head_groups(q.shape, k.shape[2]), k.shape[2]
    if groups == 1:
        return [(q, k, v)]
    width = max(1, kv_heads // groups)  # several groups may share a kv head
    starts = [i * kv_heads // groups for i in range(groups)]
    return [(qi, k[:, :, at : at + width], v[:, :, at : at + width])
            for qi, at in zip(jnp.split(q, groups, axis=2), starts)]


def head_groups(q_shape: tuple[int, int, int, int], kv_heads: int) -> int:
    """Calls over which the heads of q[B, S, N, H] are split so that none has more than CUDNN_MAX_ELEMENTS elements.

    UserError if one head alone has more.
    """
    batch, length, heads, head_dim = q_shape
    for groups in range(1, heads + 1):
        whole_kv = kv_heads % groups == 0 or groups % kv_heads == 0
        if heads % groups == 0 and whole_kv and batch * length * heads // groups * head_dim <= CUDNN_MAX_ELEMENTS:
            return groups
    raise UserError(
        f"{batch} x {length} tokens of head dim {head_dim} in one attention call: cuDNN's gradients are right up to "
        f"{CUDNN_MAX_ELEMENTS // head_dim} tokens a head only. Use a shorter --seq-len or --batch-size 1.")
