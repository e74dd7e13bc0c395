"""Causal attention over whole sequences, for the heads of this device: one file a kernel, one table that chooses.

A kernel gives the output and the log-sum-exp, from which its backward pass starts: no forward pass is computed twice
where these two are kept. A kernel that does not implement a part of a spec refuses it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from alst_jax.config import UserError
from alst_jax.ops.attention import cudnn, flash, xla
from alst_jax.ops.attention.cudnn import head_groups
from alst_jax.ops.attention.sinks import add_sinks, gradient_of_sinks
from alst_jax.ops.attention.spec import AttentionSpec, Kernel
from alst_jax.xla import scopes
from alst_jax.xla.varying import vary_like

__all__ = [
    "KERNELS",
    "AttentionSpec",
    "Kernel",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_from",
    "find_kernel",
    "head_groups",
    "refusal",
    "runs_where",
]

KERNELS = {kernel.name: kernel for kernel in (xla.KERNEL, cudnn.KERNEL, flash.KERNEL, flash.DETERMINISTIC)}
CAUSAL = AttentionSpec()


def find_kernel(kernel: str | Kernel) -> Kernel:
    """The kernel of this name; a `Kernel` is returned unchanged. ValueError for an unknown name."""
    if isinstance(kernel, Kernel):
        return kernel
    if kernel not in KERNELS:
        raise ValueError(f"attention kernel {kernel!r}: one of {', '.join(KERNELS)}")
    return KERNELS[kernel]


def refusal(kernel: Kernel, spec: AttentionSpec, documents: bool = False) -> str | None:
    """Why a kernel cannot serve a spec, and which kernels can; None if it does."""
    missing = spec.features(documents) - kernel.serves
    if not missing:
        return None
    able = [
        name
        for name, other in KERNELS.items()
        if spec.features(documents) <= other.serves and name != flash.DETERMINISTIC.name
    ]
    return (
        f"--attention {kernel.name} does not implement {' and '.join(sorted(missing))}, which this run needs; use "
        f"--attention {' or '.join(able)}"
    )


@jax.named_scope(scopes.KERNEL)
def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    spec: AttentionSpec = CAUSAL,
    documents: Array | None = None,
    sinks: Array | None = None,
    *,
    kernel: str | Kernel,
) -> tuple[Array, Array]:
    """(o[B, S, N, H], log-sum-exp float32[B, N, S]) of q[B, S, N, H], k and v[B, S, K, H] and, if the spec says so,
    sinks[N]. UserError if the kernel does not implement the spec."""
    kernel = find_kernel(kernel)
    if reason := refusal(kernel, spec, documents is not None):
        raise UserError(reason)
    if spec.sinks != (sinks is not None):
        given = "no" if sinks is None else "an"
        raise ValueError(f"sinks={spec.sinks} in the AttentionSpec, but {given} array of sinks")
    results = kernel.forward(q, k, v, spec, documents)
    return add_sinks(*results, sinks) if spec.sinks else results


@jax.named_scope(scopes.KERNEL)
def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    results: tuple[Array, Array],
    do: Array,
    spec: AttentionSpec = CAUSAL,
    documents: Array | None = None,
    *,
    kernel: str | Kernel,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of `attention_forward`, from its results (o, lse) and the gradient of o. The gradient of sinks:
    `sinks.gradient_of_sinks`."""
    kernel = find_kernel(kernel)
    if reason := refusal(kernel, spec, documents is not None):
        raise UserError(reason)
    return kernel.backward(q, k, v, *results, do, spec, documents)


def runs_where(runs: Array | bool, kernel: Kernel) -> Kernel:
    """The kernel where `runs` is true, zeros instead of its results elsewhere (--debug-attention-layers): the same
    buffers. Not to be differentiated."""

    def forward(q, k, v, spec, documents=None):
        batch, length, heads, _ = q.shape
        nothing = lambda q, k, v: (_zeros(q.shape, q.dtype, q), _zeros((batch, heads, length), jnp.float32, q))
        return lax.cond(runs, lambda *qkv: kernel.forward(*qkv, spec, documents), nothing, q, k, v)

    def backward(q, k, v, o, lse, do, spec, documents=None):
        nothing = lambda *arrays: tuple(_zeros(x.shape, x.dtype, do) for x in arrays[:3])
        return lax.cond(runs, lambda *arrays: kernel.backward(*arrays, spec, documents), nothing, q, k, v, o, lse, do)

    return dataclasses.replace(kernel, forward=forward, backward=backward)


def _zeros(shape, dtype, like):
    return vary_like(jnp.zeros(shape, dtype), like)


def attention(
    q: Array,
    k: Array,
    v: Array,
    spec: AttentionSpec = CAUSAL,
    documents: Array | None = None,
    sinks: Array | None = None,
    *,
    kernel: str | Kernel,
) -> Array:
    """o[B, S, N, H] of q[B, S, N, H], k and v[B, S, K, H], differentiable.

    kernel: "xla" (any device and dtype), "cudnn" (GPU, bfloat16 or float16, S a multiple of 128), "flash" (Hopper,
    bfloat16 or float16, any S), "flash-deterministic" (the same, gradients summed in a fixed order), or a `Kernel` of
    one's own. documents: see `Kernel`. sinks[N]: with spec.sinks, a score of each head beside the scores of its keys.
    """
    q_, k_, v_, sinks_ = jax.lax.stop_gradient((q, k, v, sinks))
    results = attention_forward(q_, k_, v_, spec, documents, sinks_, kernel=kernel)
    return attention_from(q, k, v, results, spec, documents, sinks, kernel=kernel)


def attention_from(
    q: Array,
    k: Array,
    v: Array,
    results: tuple[Array, Array],
    spec: AttentionSpec = CAUSAL,
    documents: Array | None = None,
    sinks: Array | None = None,
    *,
    kernel: str | Kernel,
) -> Array:
    """o, where (o, lse) = results come from `attention_forward` with the same inputs: only the gradient is
    computed."""
    return _attention_from(spec, find_kernel(kernel), q, k, v, results, documents, sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention_from(spec, kernel, q, k, v, results, documents, sinks):
    return results[0]


def _attention_from_fwd(spec, kernel, q, k, v, results, documents, sinks):
    return results[0], (q, k, v, *results, documents, sinks)


def _attention_from_bwd(spec, kernel, residuals, do):
    q, k, v, o, lse, documents, sinks = residuals
    grads = attention_backward(q, k, v, (o, lse), do, spec, documents, kernel=kernel)
    return *grads, None, None, None if sinks is None else gradient_of_sinks(sinks, o, lse, do)


_attention_from.defvjp(_attention_from_fwd, _attention_from_bwd)
