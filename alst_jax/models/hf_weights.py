"""Hugging Face safetensors <-> the parameter tree, with one key table. No function holds a whole model in memory."""

import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from alst_jax.config import UserError
from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.families import FAMILIES
from alst_jax.models.fused import join, split
from alst_jax.models.hf_config import model_config
from alst_jax.models.lora import is_adapter
from alst_jax.models.other_weights import text_tensors, with_others
from alst_jax.models.tree import is_stacked, names
from alst_jax.models.weight_files import (
    AT_ONCE,
    EMBEDDING,
    HEAD,
    Tensor,
    Unwritten,
    extended,
    find_tensors,
    of_model,
    publish,
    read_tensor,
    transpose,
    write_file,
)
from alst_jax.processes.link import link
from alst_jax.xla.arrays import load_array

# Names outside of the blocks, the same in all families. Names of a block's parameters are in models/families.
KEY_TABLE = {
    ("embed_tokens", "embedding"): EMBEDDING,
    ("norm", "scale"): "model.norm.weight",
    ("lm_head", "embedding"): HEAD,
}


@runtime_checkable
class Stored(Protocol):
    """An array outside of the memory. An index reads a part of it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray: ...


def is_transposed(path: tuple) -> bool:
    """Whether Hugging Face stores the transpose of this leaf: a `kernel` is [in, out] here and [out, in] there. PEFT
    does the same with adapters."""
    return names(path)[-1] == "kernel" or is_adapter(path)


def leaf_names(path: tuple, config: ModelConfig) -> list[str]:
    """The Hugging Face names of the tensors of a leaf: one a layer for a stacked leaf, else one.

    path: a tree path, through dicts or modules, or the names along it. A part of an adapter has its name in the place
    of `weight`.
    """
    if not is_stacked(path):
        return [KEY_TABLE[names(path)]]
    *module, name = names(path)[1:]
    keys = FAMILIES[config.family].keys
    if is_adapter(path):
        pattern = keys[*module, "kernel"].replace(".weight", f".{name}.weight")
    else:
        pattern = keys[*module, name]
    return [pattern.format(layer) for layer in range(config.num_layers)]


# ------------------------------------------------------------------------------------------------------------- reading


def model_tensors(hf_dir: str | pathlib.Path, config: ModelConfig, resize: bool = False) -> dict[str, Tensor]:
    """Name -> place of exactly the tensors of the model that `config` describes. UserError if the files hold others.

    resize: the vocabulary of `config` may be larger than the files'; the missing rows are added.
    """
    tensors = of_model(text_tensors(find_tensors(hf_dir), hf_dir), config.tie_word_embeddings, str(hf_dir))
    if resize:
        tensors = extended(tensors, model_config(hf_dir).vocab_size, config.vocab_size)
    family = FAMILIES[config.family]
    tensors = split(tensors, family.fused, config.num_layers, expected_shapes(config), str(hf_dir))
    check_tensors(tensors, config, str(hf_dir))
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)  # a copy of the embedding
    return tensors


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a model in Hugging Face's format."""
    expected = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config, np.float32)):
        shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
        for name in leaf_names(path, config):
            expected[name] = tuple(shape[::-1] if is_transposed(path) else shape)
    return expected


def check_tensors(tensors: dict[str, Tensor], config: ModelConfig, where: str) -> None:
    """UserError that lists missing, extra and mis-shaped tensors, unless the files hold exactly this model."""
    expected = expected_shapes(config)
    extra = [name for name in tensors if name not in expected]
    if config.tie_word_embeddings and HEAD in extra:
        extra.remove(HEAD)
        _check_tied(tensors, where)
    missing = [name for name in expected if name not in tensors]
    wrong = [
        f"{name} {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{kind} ({len(found)}): {', '.join(found[:10])}{', ...' * (len(found) > 10)}"
        for kind, found in (("missing", missing), ("extra", extra), ("of another shape", wrong))
        if found
    ]
    if problems:
        hint = (
            ""
            if missing != [HEAD]
            else (
                "; a model saved without its head has none to train, and one whose head is its embedding says so in "
                'config.json ("tie_word_embeddings": true)'
            )
        )
        raise UserError(f"{where}: the weights are not those config.json describes. " + "; ".join(problems) + hint)


def _check_tied(tensors: dict[str, Tensor], where: str) -> None:
    if EMBEDDING not in tensors:
        return
    head, table = tensors[HEAD], tensors[EMBEDDING]
    count, rows = head.shape[0], max(1, AT_ONCE // max(1, math.prod(head.shape[1:]) * head.dtype.itemsize))
    same = (head.shape, head.dtype) == (table.shape, table.dtype) and all(
        _read(head, HEAD, part).tobytes() == _read(table, EMBEDDING, part).tobytes()
        for part in ((slice(start, min(start + rows, count)),) for start in range(0, count, rows))
    )
    if not same:
        raise UserError(
            f"{where}: tie_word_embeddings is true, yet lm_head.weight differs from "
            "model.embed_tokens.weight; set it to false if they are meant to differ"
        )


def _read(tensor: Tensor, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of the tensor that the model calls `name`."""
    return read_tensor(tensor, index)


def file_dtypes(hf_dir: str | pathlib.Path, config: ModelConfig) -> Any:
    """The dtype of each leaf as the files have it; UserError if the layers of one stacked leaf differ."""
    return leaf_dtypes(model_tensors(hf_dir, config), config, str(hf_dir))


def leaf_dtypes(tensors: dict[str, Tensor], config: ModelConfig, where: str) -> Any:
    """The dtype of each leaf, from the tensors of the model; UserError if the layers of one stacked leaf differ."""

    def dtype(path, _):
        of_layers = leaf_names(path, config)
        found = {tensors[name].dtype for name in of_layers}
        if len(found) > 1:
            raise UserError(
                f"{where}: {of_layers[0]} and its like in other layers have different dtypes "
                f"({', '.join(sorted(map(str, found)))}); save the model with one dtype first"
            )
        return found.pop()

    return jax.tree_util.tree_map_with_path(dtype, abstract_params(config, np.float32))


def load_params(hf_dir: str | pathlib.Path, config: ModelConfig, abstract: Any, resize: bool = False) -> Any:
    """The parameter tree, read from a Hugging Face directory and cast to the dtypes of `abstract`.

    abstract: jax.ShapeDtypeStructs with shardings, for load_array. UserError if the files do not hold exactly the model
    that `config` describes. resize: see model_tensors.
    """
    tensors = model_tensors(hf_dir, config, resize)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: load_leaf(path, leaf, tensors, config), abstract)


def load_leaf(path: tuple, leaf: jax.ShapeDtypeStruct, tensors: dict[str, Tensor], config: ModelConfig) -> jax.Array:
    """The leaf at `path`, from the tensors that hold it, as `leaf` says."""

    def read(bounds):
        part = np.empty([stop - start for start, stop in bounds], leaf.dtype)
        read_part(part, path, bounds, tensors, config)
        return part

    return load_array(leaf, read)


def read_part(
    out: np.ndarray, path: tuple, bounds: tuple[tuple[int, int], ...], tensors: dict[str, Tensor], config: ModelConfig
) -> None:
    """Fill `out` with the part of the leaf at `path` that lies within bounds, (start, stop) for each of its dims."""
    layers = slice(*bounds[0]) if is_stacked(path) else slice(None)
    inner = bounds[1:] if is_stacked(path) else bounds
    index = tuple(slice(*b) for b in (reversed(inner) if is_transposed(path) else inner))
    for row, name in enumerate(leaf_names(path, config)[layers]):
        value = _read(tensors[name], name, index)
        place = out[row if is_stacked(path) else ...]
        if is_transposed(path):
            transpose(value, place)
        else:
            place[...] = value


# ------------------------------------------------------------------------------------------------------------- writing


def save_params(
    leaves: Iterable[tuple[tuple, jax.Array | np.ndarray | Stored]],
    config: ModelConfig,
    out_dir: str | pathlib.Path,
    max_shard_bytes: int = 5 * 2**30,
    written: Callable[[int], object] = lambda _: None,
    model_dir: str | pathlib.Path | None = None,
) -> tuple[int, int]:
    """Write (path, leaf) pairs as safetensors with Hugging Face's names; returns the number of tensors and their bytes.

    One file if it fits into max_shard_bytes, else several and an index. One tensor, a layer of a stack, is copied to
    host memory at a time. Files get their final names once all are complete, and older weights are removed. written:
    called with the bytes of each tensor that is written. model_dir: the model/ of a run, which may keep weights beside
    the language model's; they are written too.

    The processes of a run write files in turn, each from the leaves that it can read; process 0 gives them their names.
    """
    tensors = join(tensors_of(leaves, config), FAMILIES[config.family].fused, config.num_layers)
    return write_tensors(with_others(tensors, model_dir), out_dir, max_shard_bytes, written)


def write_tensors(
    tensors: Iterator[Unwritten],
    out_dir: str | pathlib.Path,
    max_shard_bytes: int,
    written: Callable[[int], object] = lambda _: None,
) -> tuple[int, int]:
    """Write tensors as `save_params` says; returns their number and their bytes."""
    out = pathlib.Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    files, weight_map, total = [], {}, 0
    for group in _group(tensors, max_shard_bytes):
        file = out / f".part-{len(files)}.safetensors"
        if len(files) % link().count == link().rank:
            write_file(file, group, written)
        weight_map |= dict.fromkeys((tensor.name for tensor in group), len(files))
        total += sum(tensor.nbytes for tensor in group)
        files.append(file)
    link().wait("weights written")
    if link().first:
        publish(out, files, weight_map, total)
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
