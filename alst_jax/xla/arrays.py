"""Arrays from files, put in their memory a part at a time. Pinned memory takes nearly all of a host, so that a second
copy of an array has no room (3.5 GiB of an 8B model's largest stack; docs/log.md)."""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AT_ONCE = 2**28  # bytes read at a time
BLOCK = 128  # rows and columns that are transposed at a time

Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each dim


def put(array: jax.typing.ArrayLike, place: jax.sharding.Sharding) -> jax.Array:
    """jax.device_put of an array that all processes have; each puts the parts of its own devices."""
    if place.is_fully_addressable:
        return jax.device_put(array, place)
    return jax.make_array_from_callback(np.shape(array), place, lambda index: np.asarray(array)[index])


def parts(arrays: list[jax.Array], most: int) -> Iterator[slice]:
    """Slices of consecutive arrays, of at most `most` bytes together or of one array."""
    first, size = 0, 0
    for n, array in enumerate(arrays):
        if n > first and size + array.nbytes > most:
            yield slice(first, n)
            first, size = n, 0
        size += array.nbytes
    yield slice(first, len(arrays))


def load_array(wanted: jax.ShapeDtypeStruct, read: Callable[[Bounds], np.ndarray]) -> jax.Array:
    """The array that `wanted` describes, dtype and sharding included; read(bounds) gives any part of it.

    Each device's part is read by itself, AT_ONCE bytes or one row of its first dim (a layer of a stack) at a time, and
    the next is read when it has been handed over: two pieces are held at most. Larger parts are put together on their
    device, even parts that will live in host memory, so a device needs room for one part.
    """
    devices_of = {}
    for device, index in wanted.sharding.addressable_devices_indices_map(wanted.shape).items():
        devices_of.setdefault(tuple(s.indices(size)[:2] for s, size in zip(index, wanted.shape)), []).append(device)
    made = []
    for bounds, devices in devices_of.items():
        kind = wanted.sharding.memory_kind
        places = [jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for device in devices]
        made += _load_part(read, bounds, wanted.dtype, places)
    return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, made)


def _load_part(
    read: Callable[[Bounds], np.ndarray],
    bounds: Bounds,
    dtype: np.dtype,
    places: list[jax.sharding.SingleDeviceSharding],
) -> list[jax.Array]:
    """The result of read(bounds) at each of the places. numpy holds only some rows of a large part at a time."""
    shape = [stop - start for start, stop in bounds]
    rows = max(1, AT_ONCE // max(1, math.prod(shape[1:]) * dtype.itemsize))
    if not shape or rows >= shape[0]:
        # The CPU backend may keep pointing at a numpy buffer instead of copying it: the buffer is not reused.
        part = read(bounds).astype(dtype, copy=False)
        return jax.block_until_ready([jax.device_put(part, place) for place in places])
    (first, last), *inner = bounds
    made = [jnp.zeros(shape, dtype, device=jax.sharding.SingleDeviceSharding(*place.device_set)) for place in places]
    for start in range(first, last, rows):
        piece = read(((start, min(start + rows, last)), *inner)).astype(dtype, copy=False)
        made = jax.block_until_ready([_put_rows(x, jax.device_put(piece, x.sharding), start - first) for x in made])
    return jax.block_until_ready([jax.device_put(x, place) for x, place in zip(made, places)])


@functools.partial(jax.jit, donate_argnums=0)
def _put_rows(x: jax.Array, rows: jax.Array, start: jax.Array | int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def shard_bytes(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's shard of an array or abstract array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize


def transpose(matrix: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The transpose, written into `out` or, if the bytes lie in that order already, a view.

    By blocks that lie in the cache: numpy's own copy takes 2.7 times as long.
    """
    if out is None and matrix.T.flags.c_contiguous:
        return matrix.T
    if out is not None and out.T.flags.c_contiguous:
        out.T[...] = matrix
        return out
    out = np.empty(matrix.shape[::-1], matrix.dtype) if out is None else out
    for i in range(0, matrix.shape[0], BLOCK):
        for j in range(0, matrix.shape[1], BLOCK):
            out[j : j + BLOCK, i : i + BLOCK] = np.ascontiguousarray(matrix[i : i + BLOCK, j : j + BLOCK]).T
    return out
