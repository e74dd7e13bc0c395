"""The arrays of a checkpoint on disk."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts

from alst_jax.xla.arrays import Bounds, transpose


class Stored:
    """A saved array on disk. An index reads that part of it, with the bytes in the order that they have on disk."""

    def __init__(self, array: ts.TensorStore, reading: Callable[[], contextlib.AbstractContextManager]):
        self._array, self._reading = array, reading
        self._order = "F" if is_reversed(array) else "C"
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
        self.nbytes = array.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        with self._reading():
            part = self._array[index]
            out = np.empty(part.shape, self.dtype, order=self._order)  # in large pages, other than tensorstore's own
            ts.array(out).write(part).result()
            return out


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
