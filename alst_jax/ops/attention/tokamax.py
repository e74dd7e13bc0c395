"""tokamax's forward kernel for Hopper with cuDNN's backward pass: each is the faster one at length."""

import importlib
import importlib.util

import jax.numpy as jnp

from alst_jax.ops.attention import cudnn
from alst_jax.ops.attention.spec import Kernel
from alst_jax.xla.opaque import opaque

MODULE = "tokamax._src.ops.attention.pallas_mosaic_gpu"
TILES = dict(block_q=64, block_kv=128, num_stages=2, persistent=False)  # the fastest tried, see docs/log.md


def prepare() -> None:
    """Import the package, if it is installed. Its import adds options to the key of jax's caches
    (`jax.make_user_context`): a program in whose trace it is imported is compiled twice."""
    if importlib.util.find_spec("tokamax") is not None:
        importlib.import_module(MODULE)


def forward(q, k, v, spec, documents=None):
    """The output[B, S, N, H] and the log-sum-exp[B, N, S]."""
    return cudnn.in_head_groups(_forward, q, k, v)


def _forward(q, k, v):
    o, largest, total = opaque(tokamax_kernel)(q, k, v)
    return o, largest + jnp.log(total)


def tokamax_kernel(q, k, v):
    """o[B, S, N, H] and, of each query's scores, the largest and the sum of exponentials relative to it [B, N, S]."""
    # The public tokamax.dot_product_attention has no way to ask for these.
    tokamax = importlib.import_module(MODULE)
    kernel = tokamax.PallasMosaicGpuFlashAttention(config=tokamax.ConfigSM90(**TILES))
    o, (largest, total) = kernel(q, k, v, is_causal=True, return_residuals=True)
    return o, largest, total


KERNEL = Kernel("tokamax", forward, cudnn.backward, prepare=prepare, needs_gpu=True, dtypes=("bfloat16", "float16"),
                multiple=128, head_dims=cudnn.HEAD_DIMS, capabilities=("9.0",), package="tokamax",
                install="pip install tokamax, or the extra of that name")
