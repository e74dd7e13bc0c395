"""python -m convert.merge ADAPTER BASE HF_DIR: an adapter in PEFT's format and its base model -> one merged model."""

import functools
import pathlib
import sys

import jax
import numpy as np
import tyro

from alst_jax.config import TrainConfig, UserError
from alst_jax.models.extend import record_extension
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_saving import write_tensors
from alst_jax.models.lora import DOWN, UP
from alst_jax.models.merging import merge
from alst_jax.models.peft_files import adapter_tensors, read_base, read_lora
from alst_jax.models.weight_files import Tensor, Unwritten, find_tensors, read_stored
from alst_jax.storage.checksums import seal_weights, verify_weights
from alst_jax.storage.run_directory import copy_model_files
from convert.cli import Progress, Unfinished, run
from convert.to_hf import parse_size


def merge_adapter(
    adapter: tyro.conf.Positional[pathlib.Path],
    base: tyro.conf.Positional[pathlib.Path],
    hf_dir: tyro.conf.Positional[pathlib.Path],
    shard_size: str = "5GB",
) -> tuple[int, int]:
    """Write the base model with the adapter added to its weights, as a Hugging Face directory.

    Sums are made in float32 and rounded once, to the dtype of the base model's weight. Where the run stretched the
    positions of the base model, the config.json says so. shard_size: as in convert.to_hf.
    Returns the number of tensors and their bytes.
    """
    most = parse_size(shard_size)
    lora, parts = read_lora(adapter).lora, adapter_tensors(adapter)
    model_config(base)  # refuses a directory without a model
    tensors, saved = find_tensors(base), read_base(adapter)
    kernels = {name.replace(f".{DOWN}.", "."): name for name in parts if f".{DOWN}." in name}
    whole = {name for name in parts if ".lora_" not in name}
    for name in parts:
        if f".{UP}." in name and name.replace(f".{UP}.", f".{DOWN}.") not in parts:
            raise UserError(f"{adapter} has {name} and no {DOWN} of it: the adapter is not whole")
    for name in sorted({*kernels, *whole}):
        expected = _shape(name, kernels, parts, lora.rank)
        if name not in tensors or tensors[name].shape != expected:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise UserError(
                f"{adapter} is not an adapter of {base}: {name} is {found} there, and the adapter's is {list(expected)}"
            )
    results = [
        Unwritten(
            name,
            tensor.shape,
            tensor.dtype,
            functools.partial(_read, name, tensor, parts, kernels.get(name), lora.scale),
        )
        for name, tensor in tensors.items()
    ]
    with Unfinished(hf_dir) as out:
        verify_weights(base)
        copy_model_files(base, out)
        if saved is not None and saved.rope is not None:
            record_extension(out, TrainConfig(**saved.rope))
        with Progress("merging", sum(tensor.nbytes for tensor in results)) as progress:
            result = write_tensors(iter(results), out, most, progress.advance)
        seal_weights(out)
    return result


def _shape(name: str, kernels: dict[str, str], parts: dict[str, Tensor], rank: int) -> tuple[int, ...]:
    """The shape that the base model's tensor must have."""
    if name not in kernels:
        return parts[name].shape
    down = kernels[name]
    up = down.replace(f".{DOWN}.", f".{UP}.")
    if up not in parts:
        raise UserError(f"the adapter has {down} and no {up}: it is not whole")
    ranks = parts[down].shape[0], parts[up].shape[1]
    if ranks != (rank, rank):
        raise UserError(
            f"adapter_config.json says r={rank}, and {down} and {up} have the ranks {ranks[0]} and "
            f"{ranks[1]}; the scale of the adapter would be wrong"
        )
    return parts[up].shape[0], parts[down].shape[1]


def _read(name: str, tensor: Tensor, parts: dict[str, Tensor], down: str | None, scale: float) -> np.ndarray:
    if down is None:
        return read_stored(parts[name]).astype(tensor.dtype) if name in parts else read_stored(tensor)
    up = parts[down.replace(f".{DOWN}.", f".{UP}.")]
    return merge(read_stored(tensor).T, read_stored(parts[down]).T, read_stored(up).T, scale).T


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(run(merge_adapter))
