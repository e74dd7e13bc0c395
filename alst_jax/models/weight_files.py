"""The weight files of a Hugging Face directory: which files, their headers, the tensors under the names of a model."""

import json
import math
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import SafetensorError, safe_open

from alst_jax.config import UserError
from alst_jax.models.hashed_file import Entry, HashedFile, read_ahead

AT_ONCE = 2**26  # bytes of a table that are read at a time
INDEX, SINGLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype("bfloat16")}
TYPES = {dtype: name for name, dtype in DTYPES.items()}
# Old checkpoints hold these buffers. They follow from the config.
DERIVED = re.compile(r".*rotary_emb\.(original_inv_freq|inv_freq|cos_cached|sin_cached)")
# Scales of an 8-bit KV cache, which only inference uses. transformers leaves them out too.
CACHE_SCALES = re.compile(r".*\.(k_scale|v_scale|kv_scale|(k|v)_proj\.output_scale)")
QUANTISED = re.compile(
    r".*\.(weight_(scale(_inv|_2)?|zero_point|packed|shape|format)|input_scale|qweight|qzeros|"
    r"scales|g_idx|SCB|(weight|bias)\.(absmax|quant_map|nested_.*|quant_state\..*))"
)
ADAPTED = re.compile(r".*\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\..*")
WRAPPERS = ("module.", "_orig_mod.")  # of torch's DistributedDataParallel and torch.compile


class Unwritten(NamedTuple):
    """A tensor that is read when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensor(NamedTuple):
    """Where a tensor is in the files."""

    file: pathlib.Path
    key: str  # its name in the file
    shape: tuple[int, ...]
    dtype: np.dtype
    first: int | None = None  # of a part of a fused tensor: the row at which the part begins
    added: int = 0  # rows at the end that are not in the file: each is the mean of the file's rows
    start: int | None = None  # the file's byte at which the whole tensor of `key` begins, where that is known


def find_tensors(hf_dir: str | pathlib.Path, files: list[pathlib.Path] | None = None) -> dict[str, Tensor]:
    """Name -> place of every tensor in a directory's safetensors files. UserError for missing or broken files."""
    tensors = {}
    for file in files or _files(pathlib.Path(hf_dir)):
        for name, tensor in _header(file).items():
            if name in tensors:
                raise UserError(
                    f"{name} is in {tensors[name].file} and in {file}: which one counts is not defined. "
                    "Remove the file that does not belong to the model"
                )
            tensors[name] = tensor
    return tensors


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    refuse_adapter(path)
    if (path / SINGLE).is_file():  # before an index, as transformers does with both
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        raise UserError(f"{path} holds no weights{_other_weights(path)}")
    try:
        listed = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in listed if pathlib.PurePath(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path / INDEX} is not a safetensors index: {error!r}") from error
    if outside:
        raise UserError(f"{path / INDEX} names files outside of its directory: {', '.join(outside[:10])}")
    missing = [name for name in listed if not (path / name).is_file()]
    if missing:
        raise UserError(f"{path}: {INDEX} names files that are not there: {', '.join(missing[:10])}")
    return [path / name for name in listed]


def refuse_adapter(path: pathlib.Path) -> None:
    """UserError for the directory of an adapter (LoRA and others, as peft saves them)."""
    if not (path / ADAPTER).is_file():
        return
    try:
        base = json.loads((path / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):  # the advice does without the name
        base = "its base model"
    raise UserError(
        f"{path} has {ADAPTER}: it is an adapter of {base}, not a whole model. To train it further, name "
        f"the base model with --model and this directory with --adapter. Merge the two first to use them "
        f"as a model (python -m convert.merge {path} BASE DIR). To use the base model alone, "
        f"move {ADAPTER} away"
    )


def _other_weights(path: pathlib.Path) -> str:
    """The files of other formats, and the command that converts them."""
    load = 'python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('
    command = lambda options: f"{load}{str(path)!r}, dtype='auto'{options}).save_pretrained('NEW_DIR')\""
    for pattern, what, advice in (
        ("pytorch_model*.bin", "pickled files, which can execute code", command("")),
        ("*.gguf", "GGUF files, mostly quantised", command(", gguf_file='{name}'")),
        (
            "consolidated*",
            "files of the model's authors, not in Hugging Face's format",
            "download the Hugging Face version of the model",
        ),
        ("*.bin", "pickled files, which can execute code", command("")),
        ("*.pt*", "pickled files, which can execute code", "save the model with transformers' save_pretrained"),
        ("*.safetensors", "files without an index", f"write {INDEX}, or give the only file the name {SINGLE}"),
    ):
        found = sorted(file.name for file in path.glob(pattern) if file.is_file())
        if found:
            return (
                f": neither {SINGLE} nor {INDEX}, but {', '.join(found[:3])}{', ...' * (len(found) > 3)} ({what}). "
                f"For safetensors: {advice.replace('{name}', found[0])}"
            )
    return f": neither {SINGLE} nor {INDEX}"


def _header(file: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file. The library refuses headers that lie: offsets, overlaps, holes, sizes."""
    tensors = {}
    try:
        with safe_open(file, "numpy") as handle, open(file, "rb") as raw:
            start = 8 + int.from_bytes(raw.read(8), "little")
            for name in handle.offset_keys():  # one after the other, without holes
                entry = handle.get_slice(name)
                dtype, shape = DTYPES.get(entry.get_dtype()), tuple(entry.get_shape())
                if dtype is not None:
                    tensors[name] = Tensor(file, name, shape, dtype, start=start)
                    start = None if start is None else start + math.prod(shape) * dtype.itemsize
                elif not DERIVED.fullmatch(name) and not CACHE_SCALES.fullmatch(name):
                    raise UserError(
                        f"{file}: {name} is {entry.get_dtype()}; weights must be one of "
                        f"{', '.join(DTYPES)}. Quantised models cannot be trained; use the original"
                    )
                else:
                    start = None
    except (SafetensorError, OSError) as error:
        with open(file, "rb") as raw:
            pointer = raw.read(24) == b"version https://git-lfs."
        raise UserError(
            f"{file} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`"
            if pointer
            else f"{file} is corrupt or cut short: {error}"
        ) from error
    return tensors


def read_tensor(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor, added rows included."""
    if tensor.first is not None:
        start, stop, _ = index[0].indices(tensor.shape[0])
        return read_stored(tensor, (slice(tensor.first + start, tensor.first + stop), *index[1:]))
    if not tensor.added:
        return read_stored(tensor, index)
    first, last, _ = index[0].indices(tensor.shape[0])
    there = tensor.shape[0] - tensor.added
    columns = tuple(slice(*each.indices(size)[:2]) for each, size in zip(index[1:], tensor.shape[1:]))
    old = [read_stored(tensor, (slice(first, min(last, there)), *columns))] if first < there else []
    if last > there:
        mean = _mean(tensor, there, columns).astype(tensor.dtype)
        old.append(np.broadcast_to(mean, (last - max(first, there), *mean.shape)))
    return np.concatenate(old)


def _mean(tensor: Tensor, rows: int, columns: tuple[slice, ...]) -> np.ndarray:
    """The mean of the first rows, in float64, read AT_ONCE bytes at a time."""
    step = max(1, AT_ONCE // max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
    parts = (read_stored(tensor, (slice(start, min(start + step, rows)), *columns)) for start in range(0, rows, step))
    return sum(part.astype(np.float64).sum(axis=0) for part in parts) / rows


def read_stored(tensor: Tensor, index: Any = ...) -> np.ndarray:
    """The tensor as it is in the file, or a part of it. UserError if it cannot be read."""
    try:
        with safe_open(tensor.file, "numpy") as handle:
            return handle.get_tensor(tensor.key) if index is ... else handle.get_slice(tensor.key)[index]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{tensor.file}: cannot read {tensor.key}: {error}") from error


# --------------------------------------------------------------------------------------------------------------- naming


def of_model(tensors: dict[str, Tensor], tied: bool, where: str) -> dict[str, Tensor]:
    """The tensors under transformers' names for a causal language model.

    - `model.` is put before the names of a model that was saved without its head.
    - The prefixes of torch's wrappers are removed.
    - `lm_head.weight` is the embedding of a tied model without another (safetensors' save_model).
    - Buffers that follow from the config, and the scales of a KV cache, are left out.
    UserError for adapters and quantised weights.
    """
    for wrapper in WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    if not any(name.startswith("model.") for name in tensors):
        bare = ("layers.", "embed_tokens.", "norm.", "rotary_emb.")
        tensors = {f"model.{name}" if name.startswith(bare) else name: tensor for name, tensor in tensors.items()}
    for pattern, what in (
        (QUANTISED, "of quantised weights; use the original model"),
        (ADAPTED, "of an adapter; merge it first (peft: merge_and_unload)"),
    ):
        found = [name for name in tensors if pattern.fullmatch(name)]
        if found:
            some = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
            raise UserError(f"{where}: {len(found)} tensors ({some}) are those {what}")
    scales = [name for name in tensors if CACHE_SCALES.fullmatch(name)]
    if scales:
        print(
            f"warning: {where}: {len(scales)} scales of a KV cache are left out ({scales[0]} ...): training does not "
            "use them, and trained weights need new ones",
            file=sys.stderr,
            flush=True,
        )
    kept = {name: tensor for name, tensor in tensors.items() if name not in scales and not DERIVED.fullmatch(name)}
    if tied and HEAD in kept and EMBEDDING not in kept:
        kept[EMBEDDING] = kept.pop(HEAD)
    return kept


def extended(tensors: dict[str, Tensor], before: int, rows: int) -> dict[str, Tensor]:
    """The tensors with an embedding and a head of `rows` rows instead of `before`; new rows are the mean of the
    others."""
    longer = {
        name: tensor._replace(shape=(rows, *tensor.shape[1:]), added=rows - tensor.shape[0])
        for name, tensor in tensors.items()
        if name in (EMBEDDING, HEAD) and len(tensor.shape) == 2 and tensor.shape[0] == before < rows
    }
    return tensors | longer


# -------------------------------------------------------------------------------------------------------------- writing


def write_file(
    file: pathlib.Path,
    tensors: list[Unwritten],
    written: Callable[[int], object] = lambda _: None,
    metadata: dict[str, str] | None = None,
    hashed: bool = False,
) -> Entry | None:
    """Write one safetensors file. One tensor is in memory at a time; the library's own writer needs all of them, twice.

    written: called with the bytes of each tensor. metadata: entries of the header's own. hashed: return the entry of
    the file (hashed_file.py), with four tensors in memory: the next is read while two are hashed and one is written.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # aligns each tensor
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    with HashedFile(file) if hashed else open(file, "wb") as out:
        out.write(text)
        values = read_ahead([tensor.read for tensor in tensors]) if hashed else (tensor.read() for tensor in tensors)
        for tensor, value in zip(tensors, values, strict=True):
            value = np.ascontiguousarray(value)
            if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{tensor.name}: {value.dtype}{value.shape}, not {tensor.dtype}{tensor.shape}")
            out.write(value.reshape(-1).view(np.uint8))
            written(tensor.nbytes)
    return out.entry if hashed else None


def publish(out: pathlib.Path, files: list[pathlib.Path], weight_map: dict[str, int], total: int) -> list[str]:
    """Give complete files of weights their names, and return these. weight_map: number of the file of each tensor.
    total: bytes."""
    final = (
        [SINGLE] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    )
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
    return final
