"""Order without a barrier: values that the compiler cannot know before an array is computed.

An optimization barrier orders nothing on GPUs: it is removed before instructions are scheduled. Zeros that several
loops start from become one operation, which makes all of them at once, long before they are needed. (Measured at
524,288 tokens: 242 GiB of temporary memory instead of 66.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from alst_jax.xla import host
from alst_jax.xla.varying import vary_like, varying_axes


def after(arrays: Any, x: jax.Array) -> jax.Array:
    """x, available only after all of `arrays` (a tree) exist. Adds zero to one element of x, in place where x has no
    other use."""
    leaves = jax.tree.leaves(arrays)
    if not leaves:
        return x
    zero = sum(map(_zero_after, leaves))
    return x.at[(slice(0, 1),) * x.ndim].add(zero.astype(x.dtype))


def index_after(array: jax.Array, index: ArrayLike) -> jax.Array:
    """int32 index or indices, for an access that must not happen before `array` exists."""
    return _zero_after(array) + index


def read_after(array: jax.Array, read: Callable, index: ArrayLike) -> Any:
    """read(index), a tree of arrays, after `array` exists. Arrays that are equal on all devices are read at once: for
    jax, an index that waits may differ between devices."""
    soon, late = read(index), read(index_after(array, index))
    return jax.tree.map(lambda s, l: l if varying_axes(s) == varying_axes(l) else s, soon, late)


def read_back(array: jax.Array, row: jax.Array, on_host: bool) -> jax.Array:
    """The first element of a row, on the device: operations `after` it wait until the row was written."""
    element = lax.dynamic_slice(array, (row, *[0] * (array.ndim - 1)), (1,) * array.ndim)
    return host.to_device(element) if on_host else element


@jax.custom_vjp
def gradient_first(h: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """h and weight, unchanged; in the backward pass the weight's gradient is computed before h's."""
    return h, weight


def _gradient_first_bwd(_, gradients):
    dh, dweight = gradients
    return after(dweight, dh), dweight


gradient_first.defvjp(lambda h, weight: ((h, weight), None), _gradient_first_bwd)


def zeros_after(array: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, *others: jax.Array) -> jax.Array:
    """Zeros that are made after `array`, and vary over devices as it and the others do."""
    zeros = jnp.broadcast_to(_zero_after(array).astype(dtype), shape)
    return vary_like(zeros, *others)


def _zero_after(array: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(array[(0,) * array.ndim].astype(jnp.bfloat16), jnp.uint16)
    return jnp.minimum(bits.astype(jnp.int32), 0)  # bits are not negative
