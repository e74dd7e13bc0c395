"""Causal attention over whole sequences, for the heads that are here. No kernel is used past the length where it is right."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alst_jax.config import UserError
from alst_jax.ops.tiling import tiled

SCORES_BYTES = 2**20  # float32 scores the XLA implementation works on at once: they stay in a CPU's cache
MIN_ROWS = 16  # queries in a tile at least
# cuDNN's backward indexes q with 32-bit integers: above 2^31 elements its dQ is wrong without an error (measured, jax
# 0.11.2, cuDNN 9.19: the rows past element 2^31 are off by 100%).
CUDNN_MAX_ELEMENTS = 2**31


def attention(
    q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], implementation: str
) -> Float[Array, "B S N H"]:
    """softmax(q k^T / sqrt(H)) v over earlier and equal positions; query head n reads kv head n // (N / K).

    implementation: "cudnn" (GPU, bfloat16 or float16, S a multiple of 128) or "xla" (any device and dtype; quadratic
    time, memory linear in S because queries are tiled).
    """
    if implementation == "cudnn":
        return _cudnn_attention(q, k, v)
    if implementation == "xla":
        return _xla_attention(q, k, v)
    raise ValueError(f"attention implementation {implementation!r}: cudnn or xla")


def _xla_attention(q, k, v):
    batch, length, heads, head_dim = q.shape
    tile = max(MIN_ROWS, SCORES_BYTES // (4 * batch * heads * length))
    rows = (q.swapaxes(0, 1), jnp.arange(length))
    out = tiled(_attend_rows, tile, rows, (k, v))
    return out.swapaxes(0, 1)


def _attend_rows(rows, kv):
    """Some query rows q[T, B, N, H] at positions [T] against all keys k[B, S, K, H]."""
    (q, row), (k, v) = rows, kv
    tokens, batch, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(tokens, batch, kv_heads, heads // kv_heads, head_dim)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("tbkgh,bskh->bkgts", q, k, preferred_element_type=wide) * head_dim**-0.5
    earlier = jnp.arange(k.shape[1])[None, :] <= row[:, None]
    weights = jax.nn.softmax(jnp.where(earlier[None, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->tbkgh", weights, v).reshape(tokens, batch, heads, head_dim)


def _cudnn_attention(q, k, v):
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    groups = head_groups(q.shape, k.shape[2])
    if groups == 1:
        return attend(q, k, v)
    # Unrolled on purpose: a scan's residuals could not be offloaded to host memory inside the scan over layers.
    queries = jnp.split(q, groups, axis=2)
    kv_heads, repeats = k.shape[2], max(1, groups // k.shape[2])
    if repeats > 1:  # several groups share a kv head
        pick = lambda x, i: x[:, :, i // repeats : i // repeats + 1]
    else:
        width = kv_heads // groups
        pick = lambda x, i: x[:, :, i * width : (i + 1) * width]
    return jnp.concatenate([attend(qi, pick(k, i), pick(v, i)) for i, qi in enumerate(queries)], axis=2)


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
