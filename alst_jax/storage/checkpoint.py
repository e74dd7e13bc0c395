"""The checkpoints of a run directory, on orbax. A leaf is stored under its names, whatever tree it comes from."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from alst_jax.config import UserError
from alst_jax.models.tree import as_dict, names
from alst_jax.storage import orbax_limits
from alst_jax.storage.run_directory import CHECKPOINTS
from alst_jax.xla.arrays import Bounds, load_array

Names = tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run directory. A save that was cut off is never found."""

    def __init__(self, run_dir: str | pathlib.Path, keep: int | None = None, clean: bool = False):
        """keep: number of checkpoints that stay, None for all; clean: remove the remains of a save that was killed."""
        orbax_limits.install()
        self.directory = pathlib.Path(run_dir).absolute() / CHECKPOINTS
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True, cleanup_tmp_directories=clean)
        # orbax copies arrays while it writes: nothing may change them before a save returns.
        handlers = {"params": orbax_limits.tree_handler(), "optimizer": orbax_limits.tree_handler(),
                    "loop": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)

    def save(self, step: int, params: Any, optimizer: Any | None, loop: dict[str, Any]) -> None:
        """Write the state; `loop` is JSON. Returns when all is on disk. Host memory: see saving.py."""
        items = {"params": orbax_limits.tree_save(as_dict(params)), "loop": ocp.args.JsonSave(loop)}
        if optimizer is not None:
            items["optimizer"] = orbax_limits.tree_save(as_dict(optimizer))
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore_loop(self, step: int) -> dict[str, Any]:
        """The JSON part alone, which is checked before large arrays are read."""
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(loop=ocp.args.JsonRestore()))["loop"]

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
        with self._reading(step):
            for name, array in self._open(step, "params").items():
                yield name, array.read().result()

    def open_params(self, step: int) -> Iterator[tuple[Names, "Stored"]]:
        """(names, array) of each saved weight. An index of the array reads that part."""
        with self._reading(step):
            arrays = self._open(step, "params")
        for name, array in arrays.items():
            yield name, Stored(array, functools.partial(self._reading, step))

    def _restore_tree(self, step: int, item: str, abstract: Any) -> Any:
        wanted = {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        with self._reading(step):
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
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except MemoryError:  # no fault of the checkpoint
            raise
        except Exception as error:  # orbax, tensorstore and json each raise their own
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> UserError:
        others = [s for s in self.steps() if s != step]
        advice = (f"delete {self.directory / str(step)} to use step {others[-1]}" if others
                  else "there is no other step in this directory")
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        return UserError(f"checkpoint {self.directory / str(step)} cannot be read: {reason}; {advice}")

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
