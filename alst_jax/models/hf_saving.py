"""The parameter tree -> Hugging Face safetensors. No function holds a whole model in memory."""

import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from alst_jax.config import UserError
from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.families import FAMILIES
from alst_jax.models.fused import join
from alst_jax.models.hashed_file import Entry
from alst_jax.models.hf_weights import is_transposed, leaf_names
from alst_jax.models.other_weights import with_others
from alst_jax.models.tree import is_stacked, names
from alst_jax.models.weight_files import EMBEDDING, Unwritten, publish, write_file
from alst_jax.processes.link import link
from alst_jax.xla.arrays import transpose


@runtime_checkable
class Stored(Protocol):
    """An array outside of the memory. An index reads a part of it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray: ...


def save_params(
    leaves: Iterable[tuple[tuple, jax.Array | np.ndarray | Stored]],
    config: ModelConfig,
    out_dir: str | pathlib.Path,
    max_shard_bytes: int = 5 * 2**30,
    written: Callable[[int], object] = lambda _: None,
    model_dir: str | pathlib.Path | None = None,
    hashes: dict[str, Entry] | None = None,
) -> tuple[int, int]:
    """Write (path, leaf) pairs as safetensors with Hugging Face's names; returns the number of tensors and their bytes.

    Layer by layer. One file if it fits into max_shard_bytes, else several and an index. One tensor, a layer of a stack,
    is copied to host memory at a time. Files get their final names once all are complete, and older weights are
    removed. written: called with the bytes of each tensor that is written. model_dir: the model/ of a run, which may
    keep weights beside the language model's; they are written too. hashes: gets an entry for each file, hashed while it
    is written, with four tensors in memory.

    The processes of a run write files in turn, each from the leaves that it can read; process 0 gives them their names.
    """
    ordered = sorted(tensors_of(leaves, config), key=lambda tensor: layer_of(tensor.name, config))
    tensors = join(ordered, FAMILIES[config.family].fused, config.num_layers)
    return write_tensors(with_others(tensors, model_dir), out_dir, max_shard_bytes, written, hashes)


def write_tensors(
    tensors: Iterator[Unwritten],
    out_dir: str | pathlib.Path,
    max_shard_bytes: int,
    written: Callable[[int], object] = lambda _: None,
    hashes: dict[str, Entry] | None = None,
) -> tuple[int, int]:
    """Write tensors as `save_params` says; returns their number and their bytes."""
    out = pathlib.Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    files, weight_map, total, hashed = [], {}, 0, {}
    for group in _group(tensors, max_shard_bytes):
        file = out / f".part-{len(files)}.safetensors"
        if len(files) % link().count == link().rank:
            hashed[len(files)] = write_file(file, group, written, hashed=hashes is not None)
        weight_map |= dict.fromkeys((tensor.name for tensor in group), len(files))
        total += sum(tensor.nbytes for tensor in group)
        files.append(file)
    link().wait("weights written")
    if link().first:
        final = publish(out, files, weight_map, total)
        if hashes is not None:
            hashes |= {final[number]: entry for number, entry in hashed.items()}
    return len(weight_map), total


def check_leaves(leaves: Iterable[tuple[tuple, Stored]], config: ModelConfig, where: str) -> None:
    """UserError unless stored arrays have the names and shapes of the model: nothing is allocated before."""
    expected = {
        names(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config, np.float32))
    }
    found = {names(path): tuple(leaf.shape) for path, leaf in leaves}
    wrong = [
        f"{'.'.join(name)} is {found.get(name, 'missing')}, not {expected.get(name, 'there')}"
        for name in {**found, **expected}
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise UserError(
            f"{where}: the weights are not those of its model/config.json: {'; '.join(wrong[:5])}"
            f"{', ...' * (len(wrong) > 5)}"
        )


def layer_of(name: str, config: ModelConfig) -> int:
    """The place of a tensor in the order of a model: -1 for the embedding, then its layer, then the rest."""
    if name == EMBEDDING:
        return -1
    number = re.match(r"model\.layers\.(\d+)\.", name)
    return int(number[1]) if number else config.num_layers


def tensors_of(leaves, config: ModelConfig) -> Iterator[Unwritten]:
    """The tensors of (path, leaf) pairs under their Hugging Face names."""
    for path, leaf in leaves:
        for row, name in enumerate(leaf_names(path, config)):
            shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
            yield Unwritten(
                name,
                tuple(shape[::-1] if is_transposed(path) else shape),
                np.dtype(leaf.dtype),
                functools.partial(_tensor, path, leaf, row if is_stacked(path) else None),
            )


def _tensor(path: tuple, leaf: jax.Array | np.ndarray | Stored, row: int | None) -> np.ndarray:
    value = fetch(leaf, row)
    return transpose(value) if is_transposed(path) else value


def fetch(leaf: jax.Array | np.ndarray | Stored, row: int | None) -> np.ndarray:
    """One layer of a stacked leaf, or a whole leaf, put together from its shards on the host."""
    if not isinstance(leaf, jax.Array):
        return leaf[...] if row is None else leaf[row]
    if not leaf.is_fully_addressable:
        raise ValueError(f"{leaf.sharding}: parts of this array are in other processes, out of reach from here")
    shape = leaf.shape if row is None else leaf.shape[1:]
    out = np.empty(shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            index = shard.index if row is None else shard.index[1:]
            data = shard.data if row is None else shard.data[row]
            out[index] = np.asarray(data)
    return out


def _group(tensors: Iterator[Unwritten], max_bytes: int) -> Iterator[list[Unwritten]]:
    group, size = [], 0
    for tensor in tensors:
        if group and size + tensor.nbytes > max_bytes:
            yield group
            group, size = [], 0
        group, size = [*group, tensor], size + tensor.nbytes
    yield group
