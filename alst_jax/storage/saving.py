"""What a save holds in host memory beside the state that is saved; checkpoint.py sets the limits that are counted here.

Arrays of the device are copied to the host, COPIES bytes at a time or the largest alone, of weights and of optimizer
states at once, and the last copies go when the next are there; arrays in pinned host memory are written from where they
are. The copies are in jax's pool, where between two steps the room of activations and gradients is free. Arrays go to
the writers in pieces of PIECE bytes or less, and until WRITTEN bytes of these are on the disk, no more of them; encoding
them takes a few chunks a core beside them (docs/log.md).
"""

import itertools
import math
import os
from collections.abc import Iterator

COPIES = 10**9  # bytes of a host
DATA_FILE = 2**26
PIECE = 2**26
EXPORT_FILE = 2**30  # bytes of a file of the export, which is held, and the tensor after it: 2.3 to 2.7 GiB of an 8B model
WRITTEN = 3 * 10**8  # bytes at once, of weights and of optimizer states; orbax refuses a piece that is not smaller
BUFFERS = 3 * 2**30  # bytes of a host, outside of jax's pool: the writers of both
CHUNKS = 2**27  # bytes of the chunks of all cores together


def chunk_bytes() -> int:
    """Of an array that are encoded at once, by each core; between 1 and 16 MiB.

    Cores are all of the machine, also where a process is bound to some: tensorstore makes a thread for each
    (`std::thread::hardware_concurrency`, which is what `os.cpu_count` is; orbax sets no other number).
    """
    return min(2**24, max(2**20, CHUNKS // (os.cpu_count() or 1)))


def pieces(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover an array of this shape in chunks of that one: PIECE bytes at most each, or one chunk.

    Each is of whole chunks: of a chunk that two touch, one has to read what the other wrote and write it once more.
    """
    box = list(shape)
    for axis in range(len(shape)):
        if math.prod(box) * itemsize <= PIECE:
            break
        row = math.prod(box) // box[axis] * chunk[axis] * itemsize
        box[axis] = max(1, PIECE // row) * chunk[axis]
    edges = ([slice(start, min(start + step, length)) for start in range(0, length, step or 1)]
             for length, step in zip(shape, box, strict=True))
    return itertools.product(*edges)
