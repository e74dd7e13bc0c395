"""python -m convert.from_hf HF_DIR CHECKPOINT: a Hugging Face directory -> a checkpoint of ours, bit for bit."""

import pathlib
import sys

import jax
import numpy as np
import tyro

from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import leaf_dtypes, model_tensors, read_part
from alst_jax.models.weight_files import Tensor
from alst_jax.storage.checkpoint import Checkpoints
from alst_jax.storage.orbax_limits import Unread
from alst_jax.storage.run_directory import MODEL, copy_model_files, write_run_file
from convert import verify as verification
from convert.cli import Progress, Unfinished, run


def from_hf(
    hf_dir: tyro.conf.Positional[pathlib.Path], checkpoint: tyro.conf.Positional[pathlib.Path], verify: bool = False
) -> tuple[int, int]:
    """Convert a Hugging Face directory into a checkpoint that train.py and convert.to_hf read.

    Weights keep their dtype, config and tokenizer are copied. Returns the number of tensors and their bytes. verify:
    compare the logits of a short input with those of transformers, which holds the model in float32.
    """
    if verify:
        verification.check_possible()
    config = model_config(hf_dir)
    tensors = model_tensors(hf_dir, config)
    dtypes = leaf_dtypes(tensors, config, str(hf_dir))
    with Unfinished(checkpoint) as out:
        copy_model_files(hf_dir, out / MODEL)
        shapes = abstract_params(config, np.float32)
        total = sum(x.size * dtype.itemsize for x, dtype in zip(jax.tree.leaves(shapes), jax.tree.leaves(dtypes)))
        with Progress("reading and writing", total) as progress:
            params = jax.tree_util.tree_map_with_path(
                lambda path, x, dtype: _unread(path, x.shape, dtype, tensors, config, progress), shapes, dtypes)
            checkpoints = Checkpoints(out)
            checkpoints.save(0, params, None, {"step": 0})
            checkpoints.close()
        write_run_file(out, "converted", {"from": str(hf_dir)})
        if verify:
            verification.verify(out, 0, config, hf_dir)
    return len(tensors), total


def _unread(
    path: tuple, shape: tuple[int, ...], dtype: np.dtype, tensors: dict[str, Tensor], config: ModelConfig,
    progress: Progress,
) -> Unread:
    """A leaf that is read from the files when it is saved."""

    def read(bounds):
        part = np.empty([stop - start for start, stop in bounds], dtype)
        read_part(part, path, bounds, tensors, config)
        progress.advance(part.nbytes)
        return part

    return Unread(tuple(shape), dtype, read)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(run(from_hf))
