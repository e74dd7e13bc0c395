"""orbax within the limits of saving.py. The only file that uses orbax's private names; `install` makes the one patch.

By default orbax 0.12 copies all arrays to the host before it writes the first, and encodes each array as a whole
(docs/log.md). Here arrays are copied when they are written, and written in pieces.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import queue
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint._src.arrays.fragments import ConcreteFragment, ConcreteFragments
from orbax.checkpoint._src.metadata.array_metadata_store import Store
from orbax.checkpoint._src.serialization import serialization
from orbax.checkpoint._src.serialization.replica_slices import ReplicaSlices
from orbax.checkpoint._src.serialization.types import SerializationStatusCallback, TransferPriority

from alst_jax.storage import saving
from alst_jax.xla.arrays import AT_ONCE, Bounds


def install() -> None:
    """Patch orbax for this process: arrays are written in pieces, and two messages are not logged. Idempotent."""
    if not isinstance(serialization.async_serialize_from_host, _InPieces):
        serialization.async_serialize_from_host = _InPieces(serialization.async_serialize_from_host)
    logging.getLogger("absl").addFilter(_keep_record)


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes a tree of arrays within the limits on bytes copied and bytes written at once."""
    arrays = ocp.type_handlers.ArrayHandler(array_metadata_store=Store(), callback=CopyWhenWritten())
    return ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=saving.WRITTEN / 10**9,
        save_device_host_concurrent_gb=saving.COPIES / 10**9,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler()), (Unread, WriteInParts())
        ),
    )


def tree_save(tree: Any) -> ocp.args.PyTreeSave:
    """The arguments of a save of `tree`, with the sizes of chunks and files."""
    return ocp.args.PyTreeSave(tree, jax.tree.map(save_args, tree), ocdbt_target_data_file_size=saving.DATA_FILE)


@dataclasses.dataclass(frozen=True)
class Unread:
    """An array outside of the memory, which is read a part at a time while it is saved.

    read: a part, by its bounds. writing: held while the array's file is made, and while a part is read and written.
    place: sorts the parts of all arrays, by the first row of each: they are written in this order. reversed: store the
    bytes of each layer in the order of its transpose, which `read` then returns (as a view). written: called with the
    bounds of a part that is on the disk.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Bounds], np.ndarray]
    writing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    place: Callable[[int], tuple] = lambda start: ()
    reversed: bool = False
    written: Callable[[Bounds], object] = lambda _: None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class WriteInParts(ocp.type_handlers.NumpyHandler):
    """Saves `Unread` arrays: PARTS parts of AT_ONCE bytes, or of one row if that is larger, are held at a time.

    They are not compressed: zstd makes bfloat16 weights a fifth smaller, for a third of the conversion's time
    on a core (docs/log.md).
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._pool = InOrder(saving.PARTS)

    async def _open_and_write(self, value: Unread, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        order = "F" if value.reversed else "C"
        tspec = tspec | {"metadata": tspec["metadata"] | {"compressor": None, "order": order}}

        def create() -> ts.TensorStore:
            with value.writing():
                return ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result()

        array = await asyncio.wrap_future(self._pool.submit((), create))  # all of them before the first part
        chunk = array.chunk_layout.write_chunk.shape
        row = math.prod(value.shape[1:]) * value.dtype.itemsize
        # Whole chunks: two parts that shared a chunk would write it twice.
        step = max(1, AT_ONCE // max(1, row * chunk[0])) * chunk[0]

        def write(start: int) -> None:
            stop = min(start + step, value.shape[0])
            with value.writing():
                bounds = ((start, stop), *((0, size) for size in value.shape[1:]))
                array[start:stop].write(value.read(bounds), can_reference_source_data_indefinitely=True).result()
                value.written(bounds)

        starts = range(0, value.shape[0], step)
        parts = [self._pool.submit((0, *value.place(start)), functools.partial(write, start)) for start in starts]
        await asyncio.gather(*map(asyncio.wrap_future, parts))


class InOrder:
    """Threads that call functions, those with the smallest key first."""

    def __init__(self, threads: int):
        self._pool, self._waiting = concurrent.futures.ThreadPoolExecutor(threads), queue.PriorityQueue()
        self._numbers = itertools.count()

    def submit(self, key: tuple, function: Callable[[], Any]) -> concurrent.futures.Future:
        result = concurrent.futures.Future()
        self._waiting.put((key, next(self._numbers), function, result))
        self._pool.submit(self._call)
        return result

    def _call(self) -> None:
        *_, function, result = self._waiting.get()
        if not result.set_running_or_notify_cancel():
            return
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)


def save_args(array: jax.Array | np.ndarray | Unread | jax.ShapeDtypeStruct) -> ocp.SaveArgs:
    """Chunks of one array. A chunk of a stack lies in one layer, so that layers can be read one by one."""
    return ocp.SaveArgs(chunk_byte_size=saving.chunk_bytes(), shard_axes=(0,) if array.ndim > 2 else ())


class CopyWhenWritten(SerializationStatusCallback):
    """Copies an array to the host when it is written. orbax warns of this priority at every save."""

    def key_priority(self, keypath: Any) -> TransferPriority:
        return TransferPriority.ASYNCHRONOUS_DEPRIORITIZED


def _keep_record(record: logging.LogRecord) -> bool:
    """A log filter without orbax's warning of arrays that are copied when they are written, and without the tracebacks
    of its threads, whose error the save raises too."""
    return not any(
        text in str(record.msg)
        for text in ("No prioritized params found", "_SignalingThread.run() raised an exception")
    )


class _InPieces:
    """orbax's function that writes the shards of an array, called with the shards cut into pieces.

    orbax's limit on bytes written at once then holds for each piece. Without pieces it encodes a whole array, which
    takes as much memory again as the array. Chunks are read from the file's own metadata.
    """

    def __init__(self, serialize: Callable):
        self.serialize = serialize
        functools.update_wrapper(self, serialize)

    async def __call__(self, array: ReplicaSlices, spec: dict[str, Any], **options: Any) -> None:
        chunk = spec.get("metadata", {}).get("chunks")  # of zarr 2; other formats are written whole
        await self.serialize(array if chunk is None else Pieces(**vars(array), chunk=tuple(chunk)), spec, **options)


@dataclasses.dataclass(frozen=True)
class Pieces(ReplicaSlices):
    """The shards that this process writes, cut into `saving.pieces`. chunk: shape of a chunk on disk."""

    chunk: tuple[int, ...]

    def to_fragments(self) -> ConcreteFragments:
        whole = super().to_fragments()
        return dataclasses.replace(whole, fragments=[piece for part in whole.fragments for piece in self._cut(part)])

    def _cut(self, part: ConcreteFragment) -> Iterator[ConcreteFragment]:
        for box in saving.pieces(part.value.shape, self.chunk, part.value.itemsize):
            cuts = zip(part.start, box, strict=True)
            index = tuple(slice(first + cut.start, first + cut.stop, 1) for first, cut in cuts)
            yield ConcreteFragment(index=index, value=part.value[(*box, ...)])  # a view, of a scalar too
