"""flash-attn-4's Hopper kernels, forward and backward, for any length, windows, soft caps and packed documents.

KERNEL adds gradients in no fixed order: two runs differ by rounding. DETERMINISTIC adds them in a fixed order.

The kernels are CuTe DSL classes, called through `cutlass.jax.cutlass_call` (flash_kernels.py). flash_attn, cutlass and
torch, which flash_attn imports, are imported when the kernel is used, never with this file.
"""

import dataclasses
import importlib
import importlib.metadata
import re
from typing import Any

import jax.numpy as jnp
from jax import Array

from alst_jax.config import UserError
from alst_jax.ops.attention.devices import installed
from alst_jax.ops.attention.flash_tiles import HEAD_DIMS, Call
from alst_jax.ops.attention.spec import AttentionSpec, Kernel
from alst_jax.xla.opaque import opaque

LAUNCHERS = "alst_jax.ops.attention.flash_kernels"
INSTALL = "pip install 'flash-attn-4==4.0.0b36' 'nvidia-cutlass-dsl[cu13]==4.8.1', or the extra `flash`"
OLDEST_TORCH = (2, 7)  # float8_e8m0fnu, which quack-kernels names
OTHER = "or use --attention cudnn"


def prepare() -> None:
    """Import flash-attn-4 before anything is traced. UserError names the package that is missing, too old or
    incomplete."""
    check_packages()
    launchers()


def check_packages() -> None:
    """UserError names the package that is missing, too old or incomplete."""
    for module, package in (("flash_attn.cute", "flash-attn-4"), ("torch", "torch"), ("cutlass", "nvidia-cutlass-dsl")):
        if not installed(module):
            raise UserError(f"--attention flash: {package} is not installed; {INSTALL}; {OTHER}")
    if installed("jax_plugins.xla_cuda12") and not installed("jax_plugins.xla_cuda13"):
        raise UserError(
            f"--attention flash: it was tested with jax on CUDA 13, and this is jax on CUDA 12; install "
            f"the extra cuda13 instead of cuda12; {OTHER}"
        )
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise UserError(
            f"--attention flash: flash-attn-4 needs torch {needed} or newer, not {version}; "
            f"pip install -U torch; {OTHER}"
        )
    try:
        library = importlib.import_module("cutlass.jax").find_cute_dsl_runtime_library()
    except (ImportError, AttributeError) as error:
        library, reason = None, f" ({error})"
    else:
        reason = ""
    if library is None:
        raise UserError(
            "--attention flash: nvidia-cutlass-dsl lacks its CUDA part"
            f"{reason}; pip install 'nvidia-cutlass-dsl[cu13]' (CUDA 12: without [cu13]); {OTHER}"
        )


def launchers() -> Any:
    """The module that calls flash-attn-4. UserError where that is not installed."""
    try:
        return importlib.import_module(LAUNCHERS)
    except ImportError as error:
        raise UserError(f"--attention flash: {error}; {INSTALL}; {OTHER}") from error


def forward(q: Array, k: Array, v: Array, spec: AttentionSpec, documents: Array | None = None) -> tuple[Array, Array]:
    """The output[B, S, N, H] and the log-sum-exp float32[B, N, S]."""
    call, batch = Call.of(q, k, spec), q.shape[0]
    if documents is None:
        return opaque(forward_kernel)(q, k, v, call=call)
    o, lse = opaque(forward_kernel)(*map(_packed, (q, k, v)), documents.astype(jnp.int32), call=call)
    return o.reshape(q.shape), jnp.moveaxis(lse.reshape(lse.shape[0], batch, -1), 0, 1)


def backward(
    q: Array, k: Array, v: Array, o: Array, lse: Array, do: Array, spec: AttentionSpec, documents: Array | None = None
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv)."""
    return _backward((q, k, v, o, lse, do), documents, Call.of(q, k, spec))


def deterministic_backward(
    q: Array, k: Array, v: Array, o: Array, lse: Array, do: Array, spec: AttentionSpec, documents: Array | None = None
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), summed in a fixed order."""
    return _backward((q, k, v, o, lse, do), documents, Call.of(q, k, spec, deterministic=True))


def _backward(arrays, documents, call):
    q, k, v, o, lse, do = arrays
    if documents is None:
        return opaque(backward_kernel)(q, k, v, o, lse, do, call=call)
    lse = jnp.moveaxis(lse, 0, 1).reshape(lse.shape[1], -1)
    packed = (*map(_packed, (q, k, v, o)), lse, _packed(do), documents.astype(jnp.int32))
    grads = opaque(backward_kernel)(*packed, call=call)
    return tuple(dx.reshape(x.shape) for dx, x in zip(grads, (q, k, v)))


def forward_kernel(*arrays: Array, call: Call):
    """(o, lse) of q, k, v[B, S, N, H], or of q, k, v[T, N, H] and offsets[D + 1]."""
    return launchers().forward(*arrays, call=call)


def backward_kernel(*arrays: Array, call: Call):
    """(dq, dk, dv) of q, k, v, o, lse, do, or of the same packed and offsets."""
    return launchers().backward(*arrays, call=call)


def _packed(x: Array) -> Array:
    """x[B, S, N, H] -> x[B S, N, H]."""
    return x.reshape(-1, *x.shape[2:])


KERNEL = Kernel(
    "flash",
    forward,
    backward,
    serves=frozenset({"scale", "window", "soft cap", "full", "documents", "sinks"}),
    prepare=prepare,
    needs_gpu=True,
    dtypes=("bfloat16", "float16"),
    multiple=1,
    head_dims=(f"one of {', '.join(map(str, HEAD_DIMS))}", lambda head_dim: head_dim in HEAD_DIMS),
    capabilities=("9.0",),
    package="flash_attn.cute",
    install=INSTALL,
)
DETERMINISTIC = dataclasses.replace(KERNEL, name="flash-deterministic", backward=deterministic_backward)
