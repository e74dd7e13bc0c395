"""Arrays that live in pinned host memory, and work on them a slice at a time."""

import concurrent.futures
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alst_jax.profile import DEVICE, HOST
from alst_jax.xla import scopes

CHUNK_BYTES = 2**28  # of each array at a time, without a layer dim to walk along


def memory_kind(on_host: bool) -> str:
    """The memory kind of an array's sharding."""
    return HOST if on_host else DEVICE


@jax.named_scope(scopes.TO_DEVICE)
def to_device(tree: Any) -> Any:
    """Inside jit: bring host arrays to the device. The gradient of this copy lands in host memory."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


@jax.named_scope(scopes.TO_HOST)
def to_host(tree: Any) -> Any:
    """Inside jit: put arrays into pinned host memory."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def row(tree: Any, index: jax.Array | int, on_host: bool) -> Any:
    """Inside jit: row `index` of dim 0 of each array, on the device."""
    rows = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)
    return to_device(rows) if on_host else rows


def put_row(tree: Any, rows: Any, index: jax.Array | int, on_host: bool) -> Any:
    """Inside jit: the arrays with row `index` of dim 0 replaced, in place where they are a loop's carry."""
    rows = to_host(rows) if on_host else rows
    return jax.tree.map(lambda x, new: lax.dynamic_update_index_in_dim(x, new, index, 0), tree, rows)


def chunk_rows(shape: tuple[int, ...], stacked: bool) -> int:
    """Rows of dim 0 to work on at a time: one layer of a stacked array, otherwise about CHUNK_BYTES of float32."""
    if stacked or not shape:
        return 1
    return min(shape[0], max(1, CHUNK_BYTES // (4 * math.prod(shape[1:]))))


def reserve(gibibytes: int, devices: list[jax.Device]) -> None:
    """Make jax's pools of pinned host memory, one for each device, of one piece of this size each, before anything else
    is put there.

    A pool grows by pieces of twice the last one's size and never gives one back. A step needs tens of GiB in one
    piece; asked for beside pieces that hold weights, it would be refused although it fits. Takes about a second a
    GiB. Raises jax.errors.JaxRuntimeError (RESOURCE_EXHAUSTED) where the machine or the pools' limit,
    XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB, has less.
    """

    def use(device: jax.Device) -> jax.Array:
        place = jax.sharding.SingleDeviceSharding(device)
        program = reservation(gibibytes).lower(jax.ShapeDtypeStruct((), jnp.int32, sharding=place)).compile()
        return jax.block_until_ready(program(jax.device_put(jnp.int32(1), place)))

    with concurrent.futures.ThreadPoolExecutor(len(devices)) as threads:
        used = list(threads.map(use, devices))
    # Read when the pieces are free again: the few bytes of pinned memory that this takes would be a new piece beside
    # them.
    for number in used:
        float(number)


def reservation(gibibytes: int) -> Any:
    """A jitted program that has all of this pinned memory in one piece while it runs."""

    def use(rows):
        pool = to_host(jnp.zeros((gibibytes, 2**28), jnp.float32))
        pool = lax.fori_loop(0, rows, lambda i, pool: put_row(pool, jnp.full(2**28, 1.0), i, True), pool)
        return row(pool, rows - 1, True)[0]

    return jax.jit(use)
