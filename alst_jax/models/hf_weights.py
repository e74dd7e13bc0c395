"""Hugging Face safetensors -> the parameter tree, with one key table. No function holds a whole model in memory.

`hf_saving` writes them, with the same names."""

import math
import pathlib
from typing import Any

import jax
import numpy as np

from alst_jax.config import UserError
from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.families import FAMILIES
from alst_jax.models.fused import split
from alst_jax.models.hf_config import model_config
from alst_jax.models.lora import is_adapter
from alst_jax.models.other_weights import text_tensors
from alst_jax.models.tree import is_stacked, names
from alst_jax.models.weight_files import AT_ONCE, EMBEDDING, HEAD, Tensor, extended, find_tensors, of_model, read_tensor
from alst_jax.models.weight_pages import map_rows
from alst_jax.xla.arrays import load_array, transpose

# Names outside of the blocks, the same in all families. Names of a block's parameters are in models/families.
KEY_TABLE = {
    ("embed_tokens", "embedding"): EMBEDDING,
    ("norm", "scale"): "model.norm.weight",
    ("lm_head", "embedding"): HEAD,
}


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
    count = head.shape[0] if head.shape else 0  # a single number: the embedding's shape is refused with the others
    rows = max(1, AT_ONCE // max(1, math.prod(head.shape[1:]) * head.dtype.itemsize))
    same = (head.shape, head.dtype) == (table.shape, table.dtype) and all(
        read_tensor(head, part).tobytes() == read_tensor(table, part).tobytes()
        for part in ((slice(start, min(start + rows, count)),) for start in range(0, count, rows))
    )
    if not same:
        raise UserError(
            f"{where}: tie_word_embeddings is true, yet lm_head.weight differs from "
            "model.embed_tokens.weight; set it to false if they are meant to differ"
        )


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


def file_part(
    path: tuple, bounds: tuple[tuple[int, int], ...], dtype: np.dtype, tensors: dict[str, Tensor], config: ModelConfig
) -> np.ndarray:
    """Whole rows or layers of the leaf at `path`, with the bytes in the files' order: a transposed leaf is a view of
    [..., out, in]. A single layer, or rows, are pages of the file."""
    stacked, transposed = is_stacked(path), is_transposed(path)
    first, last = bounds[0]
    if not transposed and not stacked or stacked and last - first == 1:
        name = leaf_names(path, config)[first if stacked else 0]
        pages = map_rows(tensors[name], slice(None) if stacked else slice(first, last))
        if pages is not None:
            return (pages.T if transposed else pages)[None] if stacked else pages
    shape = [stop - start for start, stop in bounds]
    if transposed:
        part = np.empty([*shape[:-2], shape[-1], shape[-2]], dtype).swapaxes(-1, -2)
    else:
        part = np.empty(shape, dtype)
    read_part(part, path, bounds, tensors, config)
    return part


def file_rows(
    path: tuple, bounds: tuple[tuple[int, int], ...], tensors: dict[str, Tensor], config: ModelConfig
) -> list[tuple[Tensor, slice]]:
    """The tensors of the files, and the rows of each, that `file_part` reads."""
    layers = leaf_names(path, config)
    if is_stacked(path):
        return [(tensors[name], slice(None)) for name in layers[slice(*bounds[0])]]
    return [(tensors[name], slice(*bounds[0])) for name in layers]


def read_part(
    out: np.ndarray, path: tuple, bounds: tuple[tuple[int, int], ...], tensors: dict[str, Tensor], config: ModelConfig
) -> None:
    """Fill `out` with the part of the leaf at `path` that lies within bounds, (start, stop) for each of its dims."""
    layers = slice(*bounds[0]) if is_stacked(path) else slice(None)
    inner = bounds[1:] if is_stacked(path) else bounds
    index = tuple(slice(*b) for b in (reversed(inner) if is_transposed(path) else inner))
    for row, name in enumerate(leaf_names(path, config)[layers]):
        value = read_tensor(tensors[name], index)
        place = out[row if is_stacked(path) else ...]
        if is_transposed(path):
            transpose(value, place)
        else:
            place[...] = value
