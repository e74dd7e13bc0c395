"""Hugging Face safetensors <-> the parameter tree, with one key table. No function holds a whole model in memory."""

import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from alst_jax.config import UserError
from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.families import FAMILIES
from alst_jax.models.tree import is_stacked, names
from alst_jax.xla.arrays import load_array

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype("bfloat16")}
DERIVED = re.compile(r".*rotary_emb\.inv_freq")  # old checkpoints hold it; it follows from the config
# Names outside of the blocks, the same in all families. Those of a block's parameters are in models/families.
KEY_TABLE = {
    ("embed_tokens", "embedding"): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("lm_head", "embedding"): "lm_head.weight",
}


class Tensor(NamedTuple):
    """Where a tensor is in the files."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype


def is_transposed(path: tuple) -> bool:
    """Whether Hugging Face stores the transpose of this leaf: a `kernel` is [in, out] here and [out, in] there."""
    return names(path)[-1] == "kernel"


def leaf_names(path: tuple, config: ModelConfig) -> list[str]:
    """The Hugging Face names of the tensors of a leaf: one a layer for a stacked leaf, else one.

    path: a tree path, through dicts or modules, or the names along it.
    """
    if not is_stacked(path):
        return [KEY_TABLE[names(path)]]
    pattern = FAMILIES[config.family].keys[names(path)[1:]]
    return [pattern.format(layer) for layer in range(config.num_layers)]


# ------------------------------------------------------------------------------------------------------------- reading


def find_tensors(hf_dir: str | pathlib.Path) -> dict[str, Tensor]:
    """Name -> place of every tensor in a directory's safetensors files. UserError for what is missing or broken."""
    path = pathlib.Path(hf_dir)
    if (path / SINGLE).is_file():  # before an index, as transformers does when both are there
        files = [path / SINGLE]
    elif (path / INDEX).is_file():
        try:
            files = [path / name for name in sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path / INDEX} is not a safetensors index: {error!r}") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{path}: {INDEX} names files that are not there: {', '.join(missing[:10])}")
    elif list(path.glob("pytorch_model*.bin")):
        raise UserError(f"{path} holds its weights as pytorch_model.bin only; save them as safetensors first "
                        "(transformers: model.save_pretrained(DIR, safe_serialization=True))")
    else:
        raise UserError(f"{path} holds no weights: neither {SINGLE} nor {INDEX}")
    return {name: tensor for file in files for name, tensor in _header(file).items()}


def _header(file: pathlib.Path) -> dict[str, Tensor]:
    tensors = {}
    try:
        with safe_open(file, "numpy") as handle:
            for name in handle.keys():
                entry = handle.get_slice(name)
                if entry.get_dtype() not in DTYPES:
                    raise UserError(f"{file}: {name} is {entry.get_dtype()}; weights must be one of "
                                    f"{', '.join(DTYPES)}")
                tensors[name] = Tensor(file, tuple(entry.get_shape()), DTYPES[entry.get_dtype()])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is corrupt or cut short: {error}") from error
    return tensors


def check_tensors(tensors: dict[str, Tensor], config: ModelConfig, where: str) -> None:
    """UserError that lists missing, extra and mis-shaped tensors, unless the files hold exactly this model."""
    expected = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config, np.float32)):
        shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
        for name in leaf_names(path, config):
            expected[name] = shape[::-1] if is_transposed(path) else shape
    extra = [name for name in tensors if name not in expected and not DERIVED.fullmatch(name)]
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        _check_tied(tensors, where)
    missing = [name for name in expected if name not in tensors]
    wrong = [f"{name} {list(tensors[name].shape)}, not {list(shape)}"
             for name, shape in expected.items() if name in tensors and tensors[name].shape != tuple(shape)]
    problems = [f"{kind} ({len(found)}): {', '.join(found[:10])}{', ...' * (len(found) > 10)}"
                for kind, found in (("missing", missing), ("extra", extra), ("of another shape", wrong)) if found]
    if problems:
        raise UserError(f"{where}: the weights are not those config.json describes. " + "; ".join(problems))


def _check_tied(tensors: dict[str, Tensor], where: str) -> None:
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    if "model.embed_tokens.weight" in tensors:
        head, table = (_read(tensors[name], name, (slice(None), slice(None))) for name in tied)
        if head.shape != table.shape or head.tobytes() != table.tobytes():
            raise UserError(f"{where}: tie_word_embeddings is true, yet lm_head.weight differs from "
                            "model.embed_tokens.weight; set it to false if they are meant to differ")


def _read(tensor: Tensor, name: str, index: tuple[slice, ...]) -> np.ndarray:
    try:
        with safe_open(tensor.file, "numpy") as handle:
            return handle.get_slice(name)[index]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{tensor.file}: cannot read {name}: {error}") from error


def file_dtypes(hf_dir: str | pathlib.Path, config: ModelConfig) -> Any:
    """The dtype of each leaf as the files have it; UserError if the layers of one stacked leaf differ."""
    tensors = find_tensors(hf_dir)
    check_tensors(tensors, config, str(hf_dir))

    def dtype(path, _):
        of_layers = leaf_names(path, config)
        found = {tensors[name].dtype for name in of_layers}
        if len(found) > 1:
            raise UserError(f"{hf_dir}: {of_layers[0]} and its like in other layers have different dtypes "
                            f"({', '.join(sorted(map(str, found)))}); save the model with one dtype first")
        return found.pop()

    return jax.tree_util.tree_map_with_path(dtype, abstract_params(config, np.float32))


def load_params(hf_dir: str | pathlib.Path, config: ModelConfig, abstract: Any) -> Any:
    """The parameter tree, read from a Hugging Face directory and cast to what `abstract` says.

    abstract: jax.ShapeDtypeStructs with shardings, for load_array. UserError if the files do not hold exactly the model
    that `config` describes.
    """
    tensors = find_tensors(hf_dir)
    check_tensors(tensors, config, str(hf_dir))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _load_leaf(path, leaf, tensors, config), abstract)


def _load_leaf(path: tuple, leaf: jax.ShapeDtypeStruct, tensors: dict[str, Tensor], config: ModelConfig) -> jax.Array:
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
        out[row if is_stacked(path) else ...] = value.T if is_transposed(path) else value


# ------------------------------------------------------------------------------------------------------------- writing


def save_params(
    leaves: Iterable[tuple[tuple, jax.Array | np.ndarray]], config: ModelConfig, out_dir: str | pathlib.Path,
    max_shard_bytes: int = 5 * 2**30,
) -> tuple[int, int]:
    """Write (path, leaf) pairs as safetensors with Hugging Face's names; returns the number of tensors and their bytes.

    One file if it fits into max_shard_bytes, else several and an index. At most one file's tensors are in host memory,
    and one leaf if the pairs are made one by one. Files get their final names once all are complete, and older weights
    are removed.
    """
    out = pathlib.Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    files, weight_map, total = [], {}, 0
    for tensors in _group(_tensors_of(leaves, config), max_shard_bytes):
        file = out / f".part-{len(files)}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, len(files))
        total += sum(tensor.nbytes for tensor in tensors.values())
        files.append(file)
    final = [SINGLE] if len(files) == 1 else [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    # Readers would take old files for the new ones.
    for old in (out / SINGLE, out / INDEX, *out.glob("model-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    for file, name in zip(files, final):
        file.replace(out / name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {k: final[i] for k, i in sorted(weight_map.items())}}
        partial = out / f".{INDEX}"
        partial.write_text(json.dumps(index, indent=2))
        partial.replace(out / INDEX)  # last: without it the shards are no model
    return len(weight_map), total


def _tensors_of(leaves, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in leaves:
        for row, name in enumerate(leaf_names(path, config)):
            value = _fetch(leaf, row) if is_stacked(path) else _fetch(leaf, None)
            yield name, np.ascontiguousarray(value.T if is_transposed(path) else value)


def _fetch(leaf: jax.Array | np.ndarray, row: int | None) -> np.ndarray:
    """One layer of a stacked leaf, or a whole leaf, put together from its shards on the host."""
    if isinstance(leaf, np.ndarray):
        return leaf if row is None else leaf[row]
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


def _group(tensors: Iterator[tuple[str, np.ndarray]], max_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    group, size = {}, 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > max_bytes:
            yield group
            group, size = {}, 0
        group[name], size = tensor, size + tensor.nbytes
    yield group

