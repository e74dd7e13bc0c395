"""python -m convert.to_hf CHECKPOINT HF_DIR: a checkpoint of ours -> a directory that transformers loads."""

import pathlib
import sys

import jax
import tyro

from alst_jax.models.hf_config import model_config, record_dtype
from alst_jax.models.hf_weights import save_params
from alst_jax.storage.checkpoint import Checkpoints
from alst_jax.storage.run_directory import MODEL, copy_model_files, find_checkpoint, read_run_file
from convert.cli import Unfinished, run


def to_hf(
    checkpoint: tyro.conf.Positional[pathlib.Path], hf_dir: tyro.conf.Positional[pathlib.Path]
) -> tuple[int, int]:
    """Write a converted or trained checkpoint (a run's newest step, or the one given) as a Hugging Face directory.

    Weights keep the dtype of the checkpoint. Returns the number of tensors and their bytes.
    """
    run_dir, step = find_checkpoint(checkpoint)
    config = model_config(run_dir / MODEL)
    with Unfinished(hf_dir) as out:
        copy_model_files(run_dir / MODEL, out)
        checkpoints = Checkpoints(run_dir)
        result = save_params(checkpoints.read_params(step), config, out)
        if read_run_file(run_dir)["kind"] == "training":  # a conversion gives back the files it was given
            record_dtype(out, checkpoints.params_dtype(step))
        checkpoints.close()
    return result


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(run(to_hf))
