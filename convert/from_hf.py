"""python -m convert.from_hf HF_DIR CHECKPOINT: a Hugging Face directory -> a checkpoint of ours, bit for bit."""

import concurrent.futures
import contextlib
import pathlib
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np
import tyro

from alst_jax.models.block import abstract_params
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import file_part, file_rows, is_transposed, leaf_dtypes, leaf_names, model_tensors
from alst_jax.models.other_weights import keep_others
from alst_jax.models.tree import is_stacked
from alst_jax.models.weight_pages import forget_rows
from alst_jax.storage import meanwhile, saving
from alst_jax.storage.checkpoint import Checkpoints
from alst_jax.storage.checksums import verify_weights
from alst_jax.storage.orbax_limits import Unread
from alst_jax.storage.run_directory import MODEL, copy_model_files, write_run_file
from convert import logits
from convert.cli import Progress, Unfinished, run


def from_hf(
    hf_dir: tyro.conf.Positional[pathlib.Path], checkpoint: tyro.conf.Positional[pathlib.Path], verify: bool = False
) -> tuple[int, int]:
    """Convert a Hugging Face directory into a checkpoint that train.py and convert.to_hf read.

    Weights keep their dtype, config and tokenizer are copied. Returns the number of tensors and their bytes. verify:
    compare the logits of a short input with transformers', which holds the model in float32.
    """
    if verify:
        logits.check_possible()
    config = model_config(hf_dir)
    tensors = model_tensors(hf_dir, config)
    dtypes = leaf_dtypes(tensors, config, str(hf_dir))
    with Unfinished(checkpoint) as out:
        copy_model_files(hf_dir, out / MODEL)
        write_run_file(out, "converted", {"from": str(hf_dir)})
        others, other_bytes = keep_others(hf_dir, out / MODEL)
        shapes = abstract_params(config, np.float32)
        total = sum(x.size * dtype.itemsize for x, dtype in zip(jax.tree.leaves(shapes), jax.tree.leaves(dtypes)))
        done = lambda: progress.done
        with (
            Progress("reading and writing", total) as progress,
            meanwhile.Checking(lambda beside: verify_weights(hf_dir, beside=beside), done, threads=1) as checking,
            meanwhile.Ahead(out) as ahead,
            Writing() as writing,
        ):

            def unread(path, x, dtype):
                def read(bounds):
                    part = file_part(path, bounds, dtype, tensors, config)
                    progress.advance(part.nbytes)
                    return part

                def place(start):
                    first = tensors[leaf_names(path, config)[start if is_stacked(path) else 0]]
                    return str(first.file), first.start or 0, first.first or 0, start

                def written(bounds):
                    if not checking.active:
                        for tensor, rows in file_rows(path, bounds, tensors, config):
                            forget_rows(tensor, rows)

                return Unread(tuple(x.shape), dtype, read, writing.permit, place, is_transposed(path), written)

            params = jax.tree_util.tree_map_with_path(unread, shapes, dtypes)
            checkpoints = Checkpoints(out, hashed=ahead.hash_files)
            checkpoints.save(0, params, None, {"step": 0})
            checkpoints.close()
        if verify:
            logits.verify(out, 0, config, hf_dir)
    return len({(tensor.file, tensor.key) for tensor in tensors.values()}) + others, total + other_bytes


class Writing:
    """The writes in flight. When the conversion stops, it waits for them and starts no other.

    A write that ended after the directory is removed would make the directory again.
    """

    def __init__(self):
        self._permits, self._stopped = threading.Semaphore(saving.PARTS), False

    @contextlib.contextmanager
    def permit(self) -> Iterator[None]:
        """Held during a write. CancelledError when the conversion has stopped."""
        with self._permits:
            if self._stopped:
                raise concurrent.futures.CancelledError("the conversion has stopped")
            yield

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            self._stopped = True
            for _ in range(saving.PARTS):
                self._permits.acquire()
            self._permits.release(saving.PARTS)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(run(from_hf))
