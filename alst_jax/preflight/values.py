"""Inputs of the checks: a number is a function of its indices, so that any part of an array is made anywhere.

No array has to be stored, sent or sliced for the independent computation. Values are odd multiples of 1/128 in (-2, 2):
exact in bfloat16, mean 0, standard deviation 1.15.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STD = 1.1547  # of the values


def bits(seed: int | jax.Array, *axes, xp: Any = jnp) -> Any:
    """uint32[len(axis), ...]: the murmur3 finaliser over the indices. An axis is a 1-D array of indices, or a tuple of
    arrays of one length, whose indices belong together. xp: jnp, or np for arrays that no trace may hold."""
    x = xp.asarray(seed, xp.uint32)
    for axis in axes:
        x = x[..., None]
        for part in axis if isinstance(axis, tuple) else (axis,):
            part = xp.asarray(part).astype(xp.uint32).reshape((1,) * (x.ndim - 1) + (-1,))
            x = _mix(x * xp.uint32(31) + part + xp.uint32(1), xp)
    return x


def _mix(x, xp):
    x = (x ^ (x >> 16)) * xp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * xp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def values(seed: int | jax.Array, *axes) -> jax.Array:
    """float32 values at these indices, see `bits`."""
    return ((bits(seed, *axes) >> 24).astype(jnp.int32) * 2 - 255).astype(jnp.float32) / 128


def numbers(seed: int, below: int, *axes) -> np.ndarray:
    """int32 in [0, below) at these indices."""
    return (bits(seed, *axes, xp=np) % np.uint32(below)).astype(np.int32)
