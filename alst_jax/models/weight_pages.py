"""Tensors as pages of their files, for conversions: neither copied nor kept in memory when they are done."""

import math
import mmap

import numpy as np

from alst_jax.config import UserError
from alst_jax.models.hashed_file import forget_pages
from alst_jax.models.weight_files import Tensor


def map_rows(tensor: Tensor, rows: slice = slice(None)) -> np.ndarray | None:
    """Rows of a tensor as pages of its file: no copy, and no memory of the process. The disk starts to read them.

    None where the tensor is no such piece of its file.
    """
    place = _place(tensor, rows)
    if place is None or place[0] % tensor.dtype.itemsize or tensor.added:
        return None
    start, size = place
    page = start - start % mmap.ALLOCATIONGRANULARITY
    try:
        with open(tensor.file, "rb") as stream:
            pages = mmap.mmap(stream.fileno(), start - page + size, access=mmap.ACCESS_READ, offset=page)
    except (OSError, ValueError) as error:
        raise UserError(f"{tensor.file}: cannot read {tensor.key}: {error}") from error
    if hasattr(mmap, "MADV_WILLNEED"):
        pages.madvise(mmap.MADV_WILLNEED)
    values = np.frombuffer(pages, tensor.dtype, size // tensor.dtype.itemsize, start - page)
    return values.reshape(-1, *tensor.shape[1:])


def forget_rows(tensor: Tensor, rows: slice) -> None:
    """Let the system forget the pages of these rows, which it then uses again (storage/meanwhile.py)."""
    if (place := _place(tensor, rows)) is not None:
        forget_pages(tensor.file, *place)


def _place(tensor: Tensor, rows: slice) -> tuple[int, int] | None:
    """The file's byte at which rows begin, and their bytes. None where that is not known, or no byte is there."""
    first, last, _ = rows.indices(tensor.shape[0] if tensor.shape else 0)
    row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    if tensor.start is None or first >= last or not row:
        return None
    return tensor.start + ((tensor.first or 0) + first) * row, (last - first) * row
