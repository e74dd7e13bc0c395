"""The arrays of a checkpoint on disk."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts

from alst_jax.xla.arrays import Bounds, transpose


class Stored:
    """A saved array on disk. An index reads that part of it, with the bytes in the order that they have on disk."""

    def __init__(
        self,
        array: ts.TensorStore,
        reading: Callable[[], contextlib.AbstractContextManager],
        buffers: "Buffers | None" = None,
    ):
        self._array, self._reading, self._buffers = array, reading, buffers or Buffers(0)
        self._order = "F" if is_reversed(array) else "C"
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
        self.nbytes = array.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        with self._reading():
            part = self._array[index]
            out = self._buffers.array(part.shape, self.dtype, self._order)
            ts.array(out).write(part).result()
            return out


class Buffers:
    """Memory of arrays. It is lent again when nobody refers to the last array in it: new memory has to be cleared."""

    def __init__(self, most: int = 2**29):
        """most: bytes of the largest array whose memory is kept."""
        self._most, self._free = most, []

    def array(self, shape: tuple[int, ...], dtype: np.dtype, order: str) -> np.ndarray:
        """An array without values."""
        size = math.prod(shape) * dtype.itemsize
        if not 0 < size <= self._most:
            return np.empty(shape, dtype, order)
        fits = (i for i, memory in enumerate(self._free) if memory.nbytes == size)
        found = next(fits, None)
        memory = np.empty(size, np.uint8) if found is None else self._free.pop(found)
        return np.asarray(_Lent(memory, self._free)).view(dtype).reshape(shape, order=order)


class _Lent:
    """The base of arrays in lent memory."""

    def __init__(self, memory: np.ndarray, free: list[np.ndarray]):
        self._memory, self._free, self.__array_interface__ = memory, free, memory.__array_interface__

    def __del__(self):
        self._free.append(self._memory)


def read_part(array: ts.TensorStore, bounds: Bounds) -> np.ndarray:
    """The part of a saved array within bounds, (start, stop) for each of its dims."""
    part = array[tuple(slice(*b) for b in bounds)]
    if not is_reversed(array):
        return part.read().result()
    out = np.empty(part.shape, part.dtype.numpy_dtype)  # tensorstore's own transposes take five times as long
    for layer, place in zip(range(*bounds[0]), out, strict=True):
        transpose(part[layer].read(order="F").result().T, place)
    return out


def is_reversed(array: ts.TensorStore) -> bool:
    """Whether the bytes of a chunk are in the order of its transpose, as WriteInParts stores matrices."""
    return array.rank == 3 and array.spec().to_json()["metadata"].get("order") == "F"
