"""cuDNN's attention, through jax.nn: bfloat16 or float16 on NVIDIA GPUs, causal, S a multiple of 128.

No call is made past the length where its gradients are right. Packed documents are a loop of dense calls on slices
(buckets.py): cuDNN's own packed layout returns a wrong dq with many documents, and needs a quadratic workspace.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from alst_jax.config import UserError
from alst_jax.ops.attention import buckets
from alst_jax.ops.attention.spec import AttentionSpec, Kernel

# cuDNN's backward indexes q with 32-bit integers: above 2^31 elements its dQ is wrong without an error (measured, jax
# 0.11.2, cuDNN 9.19: the rows past element 2^31 are off by 100%).
CUDNN_MAX_ELEMENTS = 2**31
CUDNN_MAX_HEAD_DIM = 128  # of the backward pass on every generation


def forward(q: Array, k: Array, v: Array, spec: AttentionSpec, documents: Array | None = None) -> tuple[Array, Array]:
    """The output[B, S, N, H] and the log-sum-exp[B, N, S]."""
    dense = functools.partial(in_head_groups, functools.partial(_forward, spec=spec))
    return dense(q, k, v) if documents is None else buckets.forward(dense, q, k, v, documents)


def in_head_groups(call, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """call(q, k, v) -> (o, lse) over as few groups of heads as cuDNN's index range allows."""
    outputs, statistics = zip(*(call(*piece) for piece in _split_heads(q, k, v)))
    return _concatenate(outputs, axis=2), _concatenate(statistics, axis=1)


def backward(
    q: Array, k: Array, v: Array, o: Array, lse: Array, do: Array, spec: AttentionSpec, documents: Array | None = None
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv); the forward pass is not computed again."""
    if documents is not None:
        return buckets.backward(functools.partial(backward, spec=spec), q, k, v, o, lse, do, documents)
    pieces = _split_heads(q, k, v)
    split = lambda x, axis: jnp.split(x, len(pieces), axis=axis)
    grads = [
        _backward(*piece, o_i, lse_i, do_i, spec)
        for piece, o_i, lse_i, do_i in zip(pieces, split(o, 2), split(lse, 1), split(do, 2))
    ]
    dq, dk, dv = zip(*grads)
    shared = len(pieces) // k.shape[2]  # groups that read the same kv head
    return _concatenate(dq, axis=2), *(_concatenate(_sum_runs(d, shared), axis=2) for d in (dk, dv))


def _concatenate(parts, axis):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def _sum_runs(parts, run):
    """Sums of each `run` neighbours, in float32."""
    if run <= 1:
        return parts
    in_float32 = lambda some: sum(x.astype(jnp.float32) for x in some).astype(parts[0].dtype)
    return [in_float32(parts[i : i + run]) for i in range(0, len(parts), run)]


def _cudnn(q, k, v, spec):
    return jax.nn.dot_product_attention(q, k, v, scale=spec.scale, is_causal=True, implementation="cudnn")


def _forward(q, k, v, spec):
    o, pullback = jax.vjp(lambda q, k, v: _cudnn(q, k, v, spec), q, k, v)
    statistics = [x for x in jax.tree.leaves(pullback) if not _is_one_of(x, (q, k, v, o)) and x.size]
    if len(statistics) != 1:
        raise RuntimeError(
            f"jax {jax.__version__} keeps {len(statistics)} arrays besides q, k, v and o for the "
            "backward pass of cuDNN attention, not the log-sum-exp alone; use --attention xla or "
            "another jax"
        )
    return o, statistics[0]


def _backward(q, k, v, o, lse, do, spec):
    # jax has no public call for the backward pass alone. The pullback is a tree of the forward pass's
    # residuals: trace the forward pass again and put in the kept residuals. The forward traced here is dead code.
    fresh, pullback = jax.vjp(lambda q, k, v: _cudnn(q, k, v, spec), q, k, v)
    leaves, treedef = jax.tree.flatten(pullback)
    kept = iter((lse,))
    swap = lambda x: o if x is fresh else x if _is_one_of(x, (q, k, v)) or not x.size else next(kept)
    return treedef.unflatten([swap(x) for x in leaves])(do)


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
    return [
        (qi, k[:, :, at : at + width], v[:, :, at : at + width]) for qi, at in zip(jnp.split(q, groups, axis=2), starts)
    ]


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
        f"{CUDNN_MAX_ELEMENTS // head_dim} tokens a head only. Use a shorter --seq-len or --batch-size 1."
    )


HEAD_DIMS = (f"a multiple of 8 up to {CUDNN_MAX_HEAD_DIM}", lambda h: h % 8 == 0 and h <= CUDNN_MAX_HEAD_DIM)
KERNEL = Kernel(
    "cudnn",
    forward,
    backward,
    serves=frozenset({"scale", "documents", "sinks"}),
    needs_gpu=True,
    dtypes=("bfloat16", "float16"),
    multiple=128,
    head_dims=HEAD_DIMS,
)
