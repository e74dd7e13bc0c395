"""The checkpoints of a run directory, on orbax. A leaf is stored under its names, whatever tree it comes from.

Not on orbax's v1 interface: in 0.12.8 it has no hook before a checkpoint gets its final name, where checksums are
written (commit.py), and no code reads its option for arrays that are copied when they are written
(`is_prioritized_key_fn`).
"""

import concurrent.futures
import contextlib
import functools
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from alst_jax.config import UserError
from alst_jax.models.tree import as_dict, names
from alst_jax.storage import about, checksums, disk, meanwhile, orbax_limits, parts
from alst_jax.storage.commit import committing
from alst_jax.storage.run_directory import CHECKPOINTS
from alst_jax.storage.stored import Buffers, Stored, read_part
from alst_jax.xla.arrays import load_array

Names = tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run directory. A save that was cut off is never found."""

    def __init__(
        self,
        run_dir: str | pathlib.Path,
        keep: int | None = None,
        clean: bool = False,
        hashed: Callable[[pathlib.Path, list[str]], dict[str, Any]] = checksums.hash_files,
    ):
        """keep: number of checkpoints that stay, None for all; clean: remove the remains of a save that was killed;
        hashed: hashes the files of a checkpoint."""
        orbax_limits.install()
        self.run_dir = pathlib.Path(run_dir).absolute()
        self.directory = self.run_dir / CHECKPOINTS
        self.about: dict[str, Any] | None = None  # the record beside each checkpoint (about.py)
        self._keep, self._hashed = keep, hashed
        self._verified: set[tuple[int, str]] = set()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            create=True,
            cleanup_tmp_directories=clean,
            temporary_path_class=committing(self._seal),
        )
        # orbax copies arrays while it writes: nothing may change them before a save returns.
        makes = {"arrays": orbax_limits.tree_handler, "json": ocp.JsonCheckpointHandler}
        handlers = {part.name: makes[part.kind]() for part in parts.PARTS if part.kind in makes}
        self._manager = ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)

    def save(self, step: int, params: Any, optimizer: Any | None, loop: dict[str, Any]) -> None:
        """Write the state; `loop` is JSON. Returns when all is on disk. Host memory: see saving.py."""
        trees = {parts.PARAMS: params} | ({} if optimizer is None else {parts.OPTIMIZER: optimizer})
        items = {part.name: orbax_limits.tree_save(as_dict(tree)) for part, tree in trees.items()}
        items[parts.LOOP.name] = ocp.args.JsonSave(loop | parts.CHECKED)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # orbax and tensorstore each have their own for a full disk
            reason = disk.disk_error(error)
            if reason is None:
                raise
            raise self._unsaved(step, reason) from error

    def _seal(self, folder: pathlib.Path, step: int) -> None:
        if self.about is not None:
            about.write(folder, self.about)
        checksums.seal(folder, step, self.run_dir, self._hashed)

    def _unsaved(self, step: int, error: OSError) -> UserError:
        """The error of a save that the disk refused. Its files are removed: they take room."""
        for part in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(part, ignore_errors=True)
        if (self.directory / str(step)).is_dir():  # orbax deletes the oldest one in the same call
            return UserError(
                f"the checkpoint of step {step} is saved, and an older one cannot be deleted: "
                f"{disk.describe(error)}. {disk.what_is_safe(self.run_dir)}"
            )
        return UserError(
            f"the checkpoint of step {step} cannot be written: {disk.describe(error)}. Nothing of it is "
            f"kept. {disk.what_is_safe(self.run_dir)}"
        )

    def remove_remains(self) -> None:
        """Remove the remains of checkpoints that a killed rotation has half deleted: those beyond the newest `keep`.
        A warning where that fails: the run needs none of them."""
        steps = sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())
        for step in steps[: -self._keep] if self._keep else []:
            try:
                shutil.rmtree(self.directory / str(step))
            except OSError as error:
                print(
                    f"warning: {self.directory / str(step)}, older than --keep-checkpoints {self._keep}, cannot be "
                    f"deleted: {disk.describe(error)}",
                    file=sys.stderr,
                    flush=True,
                )
        self._manager.reload()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore_loop(self, step: int) -> dict[str, Any]:
        """The JSON part alone, which is checked before large arrays are read."""
        name = parts.LOOP.name
        with self._reading(step, name):
            loop = self._manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore()}))[name]
            return {name: value for name, value in loop.items() if name not in parts.CHECKED}

    def restore_run(self, step: int) -> dict[str, Any]:
        """The JSON part of a training run's checkpoint: its step, its position in the data, its geometry."""
        loop = self.restore_loop(step)
        if lacking := parts.lacking(loop):
            raise self._unreadable(step, ValueError(f"its loop does not say {', '.join(lacking)}"))
        return loop

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The weights as a tree like `abstract` (ShapeDtypeStructs), with its shardings and dtypes, from any mesh."""
        return self._restore_tree(step, parts.PARAMS.name, abstract)

    def restore_optimizer(self, step: int, abstract: Any) -> Any:
        """The optimizer state as a tree like `abstract`."""
        return self._restore_tree(step, parts.OPTIMIZER.name, abstract)

    def params_dtype(self, step: int) -> str:
        """The dtype of a training run's weights, which all have the same."""
        metadata = self._manager.item_metadata(step)[parts.PARAMS.name]
        return str(jax.tree.leaves(dict(metadata.tree))[0].dtype)

    def read_params(self, step: int) -> Iterator[tuple[Names, np.ndarray]]:
        """(names, array) of each saved weight, read one by one."""
        return self.read_item(step, parts.PARAMS.name)

    def read_item(self, step: int, item: str) -> Iterator[tuple[Names, np.ndarray]]:
        """(names, array) of each saved array of an item, "params" or "optimizer", read one by one."""
        with self._reading(step, item):
            for name, array in self.arrays(step, item).items():
                yield name, array.read().result()

    def open_params(self, step: int, buffers: Buffers | None = None) -> Iterator[tuple[Names, Stored]]:
        """(names, array) of each saved weight. An index of the array reads that part, into `buffers` if given."""
        with self._reading(step, parts.PARAMS.name):
            arrays = self.arrays(step, parts.PARAMS.name)
        for name, array in arrays.items():
            yield name, Stored(array, functools.partial(self._reading, step), buffers)

    def _restore_tree(self, step: int, item: str, abstract: Any) -> Any:
        wanted = {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        with self._reading(step, item):
            saved = self.arrays(step, item)
        kind = lambda arrays, name: _kind(arrays[name]) if name in arrays else "none"
        other = [
            f"{'.'.join(name)} is {kind(saved, name)} there and {kind(wanted, name)} here"
            for name in {**saved, **wanted}
            if kind(saved, name) != kind(wanted, name)
        ]
        if other:  # nothing is wrong with the checkpoint
            raise UserError(
                f"checkpoint {self.directory / str(step)} has the {item} of another model or optimizer: "
                f"{'; '.join(other[:5])}{', ...' * (len(other) > 5)}. Use the model and the flags "
                "it was made with"
            )

        def read(array, bounds):
            with self._reading(step):
                return read_part(array, bounds)

        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: load_array(leaf, functools.partial(read, saved[names(path)])), abstract
        )

    def arrays(self, step: int, item: str) -> dict[Names, ts.TensorStore]:
        """The arrays of an item by their names: zarr arrays in an OCDBT database.

        They are read from here because orbax reads each array as a whole (docs/log.md).
        """
        place = self.directory / str(step) / item
        if not place.is_dir():
            raise FileNotFoundError(f"{item} not found")
        metadata = ocp.PyTreeCheckpointHandler().metadata(place)
        kvstore = {"driver": "ocdbt", "base": place.as_uri()}
        driver = "zarr3" if metadata.use_zarr3 else "zarr"
        spec = lambda name: {
            "driver": driver,
            "kvstore": kvstore | {"path": f"{name}/"},
            "fill_missing_data_reads": False,
        }  # a missing chunk is an error, not zeros
        context = ts.Context()
        return {
            names(path): ts.open(spec(leaf.name), read=True, context=context).result()
            for path, leaf in jax.tree_util.tree_leaves_with_path(dict(metadata.tree))
        }

    @contextlib.contextmanager
    def _reading(self, step: int, item: str | None = None) -> Iterator[None]:
        """Errors inside are the checkpoint's. item: compare its files with their checksums first, once."""
        try:
            if item is not None:
                self._verify(step, item)
            yield
        except (MemoryError, concurrent.futures.CancelledError):  # no fault of the checkpoint
            raise
        except Exception as error:  # orbax, tensorstore and json each raise their own
            raise self._unreadable(step, error) from error

    def check_run_files(self, step: int) -> None:
        """UserError unless run.json and model/ are the files that the checkpoint was saved with."""
        checksums.verify_run_files(self.directory / str(step), self.run_dir)

    @contextlib.contextmanager
    def verifying(self, step: int, done: Callable[[], int]) -> Iterator[None]:
        """Compares the weights with their checksums while they are opened and read inside, not before. UserError at the
        end, or when the reading fails, if they are damaged. done: the bytes that were read so far."""

        def verify(beside):
            with self._reading(step):
                self._verify(step, parts.PARAMS.name, beside)

        self._verified.add((step, parts.PARAMS.name))
        with meanwhile.Checking(verify, done):
            yield

    def _verify(self, step: int, item: str, beside: checksums.Beside | None = None) -> None:
        if beside is None and (step, item) in self._verified:
            return
        verified = checksums.verify_step(self.directory / str(step), item, together=beside is None, beside=beside)
        if not verified and item == parts.PARAMS.name:
            print(
                f"warning: {self.directory / str(step)} was saved without checksums: it is not verified",
                file=sys.stderr,
                flush=True,
            )
        self._verified.add((step, item))

    def _unreadable(self, step: int, error: Exception) -> UserError:
        bad = self.directory / str(step)
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        return UserError(f"checkpoint {bad} cannot be read: {reason}; {advice(bad)}")

    def close(self) -> None:
        self._manager.close()


def _kind(array: ts.TensorStore | jax.ShapeDtypeStruct) -> str:
    """Shape and type of the elements. Floats may be read as floats of another width; other types must be equal."""
    dtype = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
    return f"{tuple(array.shape)} {'floats' if jax.numpy.issubdtype(dtype, jax.numpy.floating) else dtype.name}"


def advice(bad: pathlib.Path) -> str:
    """Advice without the checkpoint in `bad`: the newest other one whose checksums are right, and the command
    that makes a run go on from it."""
    steps = sorted(int(p.name) for p in bad.parent.iterdir() if p.name.isdigit() and p != bad)
    found = None
    for step in reversed(steps):
        try:
            verified = checksums.verify_step(bad.parent / str(step))
        except UserError:
            continue
        if verified or found is None and not parts.missing(bad.parent / str(step)):
            found = step, "was verified" if verified else "has no checksums and was not verified"
        if verified:
            break
    if found is None:
        return f"no other step in {bad.parent} is whole" if steps else "there is no other step in this directory"
    run_dir = bad.parent.parent
    return (
        f"step {found[0]} {found[1]}. To go on from it: mv {bad} {run_dir}/damaged-{bad.name} && "
        f"python train.py --resume --out {run_dir}"
    )
