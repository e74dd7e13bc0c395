"""The host memory that a save and the export hold beside the saved state. orbax_limits.py sets these limits.

Copies: orbax copies arrays from the device to the host, COPIES bytes at a time or one larger array, for weights and for
optimizer states at once. The last copies are freed when the next are made. They lie in jax's pinned pool, which has the
room of activations and gradients between two steps. Arrays in pinned host memory are written without a copy.
Writers: arrays are written in pieces of at most PIECE bytes. At most WRITTEN bytes of pieces are in flight. Encoding
takes a few chunks for each core (docs/log.md).
"""

import itertools
import math
import os
from collections.abc import Iterator

COPIES = 10**9  # bytes of a host
DATA_FILE = 2**26  # bytes of a file of a checkpoint
PIECE = 2**26  # bytes
PARTS = 3  # parts of arrays that are read and written at the same time (orbax_limits.WriteInParts)
EXPORT_FILE = 2**30  # bytes of an exported file; of its tensors one is held at a time
WRITTEN = 3 * 10**8  # bytes in flight, of weights and of optimizer states. orbax refuses a larger piece
BUFFERS = 3 * 2**30  # bytes of a host, outside of jax's pool: the writers of weights and optimizer states
CHUNKS = 2**27  # bytes of the chunks of all cores together


def chunk_bytes() -> int:
    """Bytes of an array that one core encodes at once: 1 to 16 MiB.

    All cores of the machine count, also where the process is bound to some: tensorstore makes a thread for each
    (`std::thread::hardware_concurrency`, equal to `os.cpu_count`). orbax sets no other number.
    """
    return min(2**24, max(2**20, CHUNKS // (os.cpu_count() or 1)))


def host_bytes(trees: list[tuple[int, int]], devices: int, free: int) -> int:
    """Bytes of host memory, one device's part, that a save holds beside a step's.

    trees: for weights and for optimizer states, the bytes of all arrays, and of the largest that is on the device; 0 if
    they live in host memory. devices: of a host. free: bytes of a step that are not in use during a save.
    """
    held = sum(min(size, 2 * max(largest, COPIES // devices)) for size, largest in trees if largest)
    return max(0, held - free) + min(sum(size for size, _ in trees), BUFFERS // devices)


def pieces(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover an array of this shape: PIECE bytes at most each, or one chunk.

    Each box has whole chunks. If two boxes shared a chunk, the second would read it back and write it again.
    """
    box = list(shape)
    for axis in range(len(shape)):
        if math.prod(box) * itemsize <= PIECE:
            break
        row = math.prod(box) // box[axis] * chunk[axis] * itemsize
        box[axis] = max(1, PIECE // row) * chunk[axis]
    edges = (
        [slice(start, min(start + step, length)) for start in range(0, length, step or 1)]
        for length, step in zip(shape, box, strict=True)
    )
    return itertools.product(*edges)
