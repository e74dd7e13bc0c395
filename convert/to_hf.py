"""python -m convert.to_hf CHECKPOINT HF_DIR: a checkpoint of ours -> a directory that transformers loads."""

import pathlib
import re
import sys

import jax
import tyro

from alst_jax.config import UserError
from alst_jax.models.hf_config import model_config, record_dtype
from alst_jax.models.hf_saving import check_leaves, save_params
from alst_jax.models.other_weights import other_sizes
from alst_jax.storage.checkpoint import Checkpoints
from alst_jax.storage.checksums import seal_weights
from alst_jax.storage.run_directory import MODEL, copy_model_files, find_checkpoint, read_run_file, refuse_adapters
from alst_jax.storage.stored import Buffers
from convert import logits
from convert.cli import Progress, Unfinished, run

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def to_hf(
    checkpoint: tyro.conf.Positional[pathlib.Path],
    hf_dir: tyro.conf.Positional[pathlib.Path],
    shard_size: str = "5GB",
    verify: bool = False,
) -> tuple[int, int]:
    """Write a converted or trained checkpoint (a run's newest step, or the one given) as a Hugging Face directory.

    Weights keep the dtype of the checkpoint. Returns the number of tensors and their bytes. shard_size: most bytes of
    a file of weights, as in 500MB, 5GB or 2GiB. A larger tensor has a file of its own. verify: compare the logits of a
    short input with transformers', which holds the model in float32.
    """
    if verify:
        logits.check_possible()
    most = parse_size(shard_size)
    run_dir, step = find_checkpoint(checkpoint)
    refuse_adapters(run_dir)
    config = model_config(run_dir / MODEL)
    with Unfinished(hf_dir) as out:
        copy_model_files(run_dir / MODEL, out)
        checkpoints = Checkpoints(run_dir)
        checkpoints.check_run_files(step)
        hashes, progress = {}, None
        with checkpoints.verifying(step, lambda: progress.done if progress else 0):
            leaves = list(checkpoints.open_params(step, Buffers()))
            check_leaves(leaves, config, str(checkpoint))
            total = sum(leaf.nbytes for _, leaf in leaves) + other_sizes(run_dir / MODEL)[1]
            with Progress("reading and writing", total) as progress:
                result = save_params(leaves, config, out, most, progress.advance, run_dir / MODEL, hashes)
        if read_run_file(run_dir)["kind"] == "training":  # a conversion gives back the files it was given
            record_dtype(out, checkpoints.params_dtype(step))
        checkpoints.close()
        seal_weights(out, hashes)
        if verify:
            logits.verify(run_dir, step, config, out)
    return result


def parse_size(text: str) -> int:
    """Bytes of a size like 5GB (10**9) or 2GiB (2**30)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    size = round(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise UserError(f"--shard-size {text}: write a size above zero as 500MB, 5GB or 2GiB")
    return size


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(run(to_hf))
