"""The checkpoints of a run directory, on orbax. A leaf is stored under its names, whatever tree it comes from."""

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
from alst_jax.storage import about, checksums, disk, orbax_limits
from alst_jax.storage.commit import committing
from alst_jax.storage.run_directory import CHECKPOINTS
from alst_jax.xla.arrays import Bounds, load_array

Names = tuple[str, ...]
RUN = {"step": int, "data": dict, "geometry": dict}  # in `loop` of a training run
CHECKED = {"checksums": True}  # in `loop`: without its checksums the checkpoint is not whole


class Checkpoints:
    """The checkpoints of one run directory. A save that was cut off is never found."""

    def __init__(self, run_dir: str | pathlib.Path, keep: int | None = None, clean: bool = False):
        """keep: number of checkpoints that stay, None for all; clean: remove the remains of a save that was killed."""
        orbax_limits.install()
        self.run_dir = pathlib.Path(run_dir).absolute()
        self.directory = self.run_dir / CHECKPOINTS
        self.about: dict[str, Any] | None = None  # what is written beside each checkpoint (about.py)
        self._keep = keep
        self._verified: set[tuple[int, str]] = set()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True, cleanup_tmp_directories=clean,
            temporary_path_class=committing(self._seal))
        # orbax copies arrays while it writes: nothing may change them before a save returns.
        handlers = {"params": orbax_limits.tree_handler(), "optimizer": orbax_limits.tree_handler(),
                    "loop": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)

    def save(self, step: int, params: Any, optimizer: Any | None, loop: dict[str, Any]) -> None:
        """Write the state; `loop` is JSON. Returns when all is on disk. Host memory: see saving.py."""
        items = {"params": orbax_limits.tree_save(as_dict(params)), "loop": ocp.args.JsonSave(loop | CHECKED)}
        if optimizer is not None:
            items["optimizer"] = orbax_limits.tree_save(as_dict(optimizer))
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
        checksums.seal(folder, step, self.run_dir)

    def _unsaved(self, step: int, error: OSError) -> UserError:
        """The error of a save that the disk refused. What was written of it is removed: it takes room."""
        for part in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(part, ignore_errors=True)
        if (self.directory / str(step)).is_dir():  # orbax deletes the oldest one in the same call
            return UserError(f"the checkpoint of step {step} is saved, and an older one cannot be deleted: "
                             f"{disk.describe(error)}. {disk.what_is_safe(self.run_dir)}")
        return UserError(f"the checkpoint of step {step} cannot be written: {disk.describe(error)}. Nothing of it is "
                         f"kept. {disk.what_is_safe(self.run_dir)}")

    def remove_remains(self) -> None:
        """Remove what is left of checkpoints that a killed rotation has half deleted: those beyond the newest `keep`."""
        steps = sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())
        for step in steps[: -self._keep] if self._keep else []:
            shutil.rmtree(self.directory / str(step))
        self._manager.reload()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore_loop(self, step: int) -> dict[str, Any]:
        """The JSON part alone, which is checked before large arrays are read."""
        with self._reading(step, "loop"):
            loop = self._manager.restore(step, args=ocp.args.Composite(loop=ocp.args.JsonRestore()))["loop"]
            return {name: value for name, value in loop.items() if name not in CHECKED}

    def restore_run(self, step: int) -> dict[str, Any]:
        """The JSON part of a training run's checkpoint: its step, its position in the data, its geometry."""
        loop = self.restore_loop(step)
        lacking = [name for name, kind in RUN.items() if not isinstance(loop.get(name), kind)]
        if lacking:
            raise self._unreadable(step, ValueError(f"its loop does not say {', '.join(lacking)}"))
        return loop

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The weights as a tree like `abstract` (ShapeDtypeStructs), with its shardings and dtypes, from any mesh."""
        return self._restore_tree(step, "params", abstract)

    def restore_optimizer(self, step: int, abstract: Any) -> Any:
        """The optimizer state as a tree like `abstract`."""
        return self._restore_tree(step, "optimizer", abstract)

    def params_dtype(self, step: int) -> str:
        """The dtype of a training run's weights, which all have the same."""
        return str(jax.tree.leaves(dict(self._manager.item_metadata(step)["params"].tree))[0].dtype)

    def read_params(self, step: int) -> Iterator[tuple[Names, np.ndarray]]:
        """(names, array) of each saved weight, read one by one."""
        with self._reading(step, "params"):
            for name, array in self._open(step, "params").items():
                yield name, array.read().result()

    def open_params(self, step: int) -> Iterator[tuple[Names, "Stored"]]:
        """(names, array) of each saved weight. An index of the array reads that part."""
        with self._reading(step, "params"):
            arrays = self._open(step, "params")
        for name, array in arrays.items():
            yield name, Stored(array, functools.partial(self._reading, step))

    def _restore_tree(self, step: int, item: str, abstract: Any) -> Any:
        wanted = {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        with self._reading(step, item):
            saved = self._open(step, item)
        kind = lambda arrays, name: _kind(arrays[name]) if name in arrays else "none"
        other = [f"{'.'.join(name)} is {kind(saved, name)} there and {kind(wanted, name)} here"
                 for name in {**saved, **wanted} if kind(saved, name) != kind(wanted, name)]
        if other:  # nothing is wrong with the checkpoint
            raise UserError(f"checkpoint {self.directory / str(step)} has the {item} of another model or optimizer: "
                            f"{'; '.join(other[:5])}{', ...' * (len(other) > 5)}. Use the model and the flags "
                            "it was made with")

        def read(array, bounds):
            with self._reading(step):
                return _read(array, bounds)

        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: load_array(leaf, functools.partial(read, saved[names(path)])), abstract)

    def _open(self, step: int, item: str) -> dict[Names, ts.TensorStore]:
        """The arrays of an item by their names: zarr arrays in an OCDBT database.

        They are read from here because orbax reads each array as a whole (docs/log.md).
        """
        place = self.directory / str(step) / item
        if not place.is_dir():
            raise FileNotFoundError(f"{item} not found")
        metadata = ocp.PyTreeCheckpointHandler().metadata(place)
        kvstore = {"driver": "ocdbt", "base": place.as_uri()}
        driver = "zarr3" if metadata.use_zarr3 else "zarr"
        spec = lambda name: {"driver": driver, "kvstore": kvstore | {"path": f"{name}/"},
                             "fill_missing_data_reads": False}  # a missing chunk is an error, not zeros
        context = ts.Context()
        return {names(path): ts.open(spec(leaf.name), read=True, context=context).result()
                for path, leaf in jax.tree_util.tree_leaves_with_path(dict(metadata.tree))}

    @contextlib.contextmanager
    def _reading(self, step: int, item: str | None = None) -> Iterator[None]:
        """Errors inside are those of the checkpoint. item: compare its files with their checksums first, once."""
        try:
            if item is not None:
                self._verify(step, item)
            yield
        except MemoryError:  # no fault of the checkpoint
            raise
        except Exception as error:  # orbax, tensorstore and json each raise their own
            raise self._unreadable(step, error) from error

    def check_run_files(self, step: int) -> None:
        """UserError unless run.json and model/ are those that the checkpoint was saved with."""
        checksums.verify_run_files(self.directory / str(step), self.run_dir)

    def _verify(self, step: int, item: str) -> None:
        if (step, item) in self._verified:
            return
        if not checksums.verify_step(self.directory / str(step), item, together=True) and item == "params":
            print(f"warning: {self.directory / str(step)} was saved without checksums: it is not verified",
                  file=sys.stderr, flush=True)
        self._verified.add((step, item))

    def _unreadable(self, step: int, error: Exception) -> UserError:
        bad = self.directory / str(step)
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        return UserError(f"checkpoint {bad} cannot be read: {reason}; {advice(bad)}")

    def close(self) -> None:
        self._manager.close()


class Stored:
    """A saved array on disk. An index reads that part of it."""

    def __init__(self, array: ts.TensorStore, reading: Callable[[], contextlib.AbstractContextManager]):
        self._array, self._reading = array, reading
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
        self.nbytes = array.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        with self._reading():
            return self._array[index].read().result()


def _kind(array: ts.TensorStore | jax.ShapeDtypeStruct) -> str:
    """Shape and type of the elements. Floats may be read as floats of another width; other types must be equal."""
    dtype = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
    return f"{tuple(array.shape)} {'floats' if jax.numpy.issubdtype(dtype, jax.numpy.floating) else dtype.name}"


def _read(array: ts.TensorStore, bounds: Bounds) -> np.ndarray:
    return array[tuple(slice(*b) for b in bounds)].read().result()


def advice(bad: pathlib.Path) -> str:
    """What to do without the checkpoint in `bad`: the newest of the others whose checksums are right, and the command
    that makes a run go on from it."""
    steps = sorted(int(p.name) for p in bad.parent.iterdir() if p.name.isdigit() and p != bad)
    found = None
    for step in reversed(steps):
        try:
            verified = checksums.verify_step(bad.parent / str(step))
        except UserError:
            continue
        if verified or found is None and all((bad.parent / str(step) / item).is_dir() for item in ("loop", "params")):
            found = step, "was verified" if verified else "has no checksums and was not verified"
        if verified:
            break
    if found is None:
        return f"no other step in {bad.parent} is whole" if steps else "there is no other step in this directory"
    run_dir = bad.parent.parent
    return (f"step {found[0]} {found[1]}. To go on from it: mv {bad} {run_dir}/damaged-{bad.name} && "
            f"python train.py --resume --out {run_dir}")
