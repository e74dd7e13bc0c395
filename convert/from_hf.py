"""python -m convert.from_hf HF_DIR CHECKPOINT: a Hugging Face directory -> a checkpoint of ours, bit for bit."""

import pathlib
import sys
import tempfile

import jax
import numpy as np
import tyro

from alst_jax.models.block import abstract_params
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import leaf_dtypes, model_tensors, read_part
from alst_jax.models.tree import dotted
from alst_jax.storage.checkpoint import Checkpoints
from alst_jax.storage.run_directory import MODEL, copy_model_files, write_run_file
from convert.cli import Unfinished, run


def from_hf(
    hf_dir: tyro.conf.Positional[pathlib.Path], checkpoint: tyro.conf.Positional[pathlib.Path]
) -> tuple[int, int]:
    """Convert a Hugging Face directory into a checkpoint that train.py and convert.to_hf read.

    Weights keep their dtype, config and tokenizer are copied. Returns the number of tensors and their bytes.
    """
    config = model_config(hf_dir)
    tensors = model_tensors(hf_dir, config)
    dtypes = leaf_dtypes(tensors, config, str(hf_dir))
    with Unfinished(checkpoint) as out, tempfile.TemporaryDirectory(dir=out) as scratch:

        def leaf(path, shape, dtype):
            # A file mapped into memory: the system writes parts of it out if the model is larger than memory.
            file = pathlib.Path(scratch, dotted(path))
            array = np.memmap(file, dtype, mode="w+", shape=shape.shape)
            read_part(array, path, tuple((0, size) for size in shape.shape), tensors, config)
            return jax.device_put(np.asarray(array))

        params = jax.tree_util.tree_map_with_path(leaf, abstract_params(config, np.float32), dtypes)
        leaves = jax.tree.leaves(params)
        copy_model_files(hf_dir, out / MODEL)
        checkpoints = Checkpoints(out)
        checkpoints.save(0, params, None, {"step": 0})
        checkpoints.close()
        del params
        write_run_file(out, "converted", {"from": str(hf_dir)})
    return len(tensors), sum(x.nbytes for x in leaves)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(run(from_hf))
