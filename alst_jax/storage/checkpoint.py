"""Run directories and checkpoints, on orbax. Training runs and converted models share one layout:

    DIR/run.json              what wrote it: kind, versions, flags
    DIR/model/                config.json, tokenizer, chat template: the Hugging Face directory without its weights
    DIR/checkpoints/STEP/     orbax items: params, optimizer (not in a conversion), loop (JSON: data position, geometry)
    DIR/hf/                   the export at the end of a training run
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint._src.arrays.fragments import ConcreteFragment, ConcreteFragments
from orbax.checkpoint._src.metadata.array_metadata_store import Store
from orbax.checkpoint._src.serialization import serialization
from orbax.checkpoint._src.serialization.replica_slices import ReplicaSlices
from orbax.checkpoint._src.serialization.types import SerializationStatusCallback, TransferPriority

from alst_jax.config import UserError
from alst_jax.models.config import ModelConfig
from alst_jax.storage import saving
from alst_jax.xla.arrays import Bounds, load_array

CHECKPOINTS, MODEL, RUN_FILE, EXPORT = "checkpoints", "model", "run.json", "hf"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf",
                "*.msgpack", "*.h5", "*.onnx", "*.ot")


class _CopiedAsWritten(SerializationStatusCallback):
    """Arrays are copied to the host when it is their turn to be written. By default orbax 0.12 copies all of them first,
    whatever its limits say (docs/log.md); it has no public name for this, and warns of it at every save."""

    def key_priority(self, keypath: Any) -> TransferPriority:
        return TransferPriority.ASYNCHRONOUS_DEPRIORITIZED


@dataclasses.dataclass(frozen=True)
class _InPieces(ReplicaSlices):
    """What this process writes of an array whose chunks on disk have this shape: each device's part in `saving.pieces`."""
    chunk: tuple[int, ...]

    def to_fragments(self) -> ConcreteFragments:
        whole = super().to_fragments()
        return dataclasses.replace(whole, fragments=[piece for part in whole.fragments for piece in self._cut(part)])

    def _cut(self, part: ConcreteFragment) -> Iterator[ConcreteFragment]:
        for box in saving.pieces(part.value.shape, self.chunk, part.value.itemsize):
            index = tuple(slice(first + cut.start, first + cut.stop, 1) for first, cut in zip(part.start, box, strict=True))
            yield ConcreteFragment(index=index, value=part.value[(*box, ...)])  # a view, of a scalar too


def _in_pieces(serialize: Callable) -> Callable:
    """orbax writes an array in one piece, and encodes all of it while the disk is busy with its beginning: as much memory
    again as the array has. In pieces, its limit on what is written at once holds for each; it has no public name for
    this either. Chunks are those of the file's own metadata, whoever chose them."""
    @functools.wraps(serialize)
    async def in_pieces(array: ReplicaSlices, spec: dict[str, Any], **options: Any) -> None:
        chunk = spec.get("metadata", {}).get("chunks")  # of zarr 2; whoever writes another format writes it whole
        await serialize(array if chunk is None else _InPieces(**vars(array), chunk=tuple(chunk)), spec, **options)

    return in_pieces


serialization.async_serialize_from_host = _in_pieces(serialization.async_serialize_from_host)


def _chunks(array: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> ocp.SaveArgs:
    """A chunk of a stack lies in one layer, so that layers can be read one by one."""
    return ocp.SaveArgs(chunk_byte_size=saving.chunk_bytes(), shard_axes=(0,) if array.ndim > 2 else ())


def _tree_handler() -> ocp.PyTreeCheckpointHandler:
    arrays = ocp.type_handlers.ArrayHandler(array_metadata_store=Store(), callback=_CopiedAsWritten())
    return ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=saving.WRITTEN / 10**9, save_device_host_concurrent_gb=saving.COPIES / 10**9,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())))


logging.getLogger("absl").addFilter(lambda record: "No prioritized params found" not in str(record.msg))


class Checkpoints:
    """The checkpoints of one run directory. A save that was cut off is never found."""

    def __init__(self, run_dir: str | pathlib.Path, keep: int | None = None, clean: bool = False):
        """keep: checkpoints kept, None for all; clean: remove what a save that was killed left behind."""
        self.directory = pathlib.Path(run_dir).absolute() / CHECKPOINTS
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True, cleanup_tmp_directories=clean)
        # Without limits on what is copied and written at once, orbax would hold a second copy of everything in memory;
        # with them it copies as it goes, so that nothing may change the arrays meanwhile.
        handlers = {"params": _tree_handler(), "optimizer": _tree_handler(), "loop": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)

    def save(self, step: int, params: Any, optimizer: Any | None, loop: dict[str, Any]) -> None:
        """Write the state; `loop` is JSON. Returns when all is on disk. Holds what storage/saving.py says."""
        tree = lambda arrays: ocp.args.PyTreeSave(
            arrays, jax.tree.map(_chunks, arrays), ocdbt_target_data_file_size=saving.DATA_FILE)
        items = {"params": tree(params), "loop": ocp.args.JsonSave(loop)}
        if optimizer is not None:
            items["optimizer"] = tree(optimizer)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore_loop(self, step: int) -> dict[str, Any]:
        """The JSON part alone, to check it before anything large is read."""
        return self._restore(step, loop=ocp.args.JsonRestore())["loop"]

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Weights onto the shardings and dtypes of `abstract` (ShapeDtypeStructs), whatever mesh they are from."""
        return self._restore_tree(step, "params", abstract)

    def restore_optimizer(self, step: int, abstract: Any) -> Any:
        """Optimizer state, likewise."""
        return self._restore_tree(step, "optimizer", abstract)

    def params_dtype(self, step: int) -> str:
        """The dtype of a training run's weights, which all have the same."""
        return str(jax.tree.leaves(dict(self._manager.item_metadata(step)["params"].tree))[0].dtype)

    def read_params(self, step: int) -> Iterator[tuple[tuple, np.ndarray]]:
        """(path, array) of each saved weight, read one by one."""
        with self._reading(step):
            for path, array in self._open(step, "params").items():
                yield path, array.read().result()

    def _restore_tree(self, step: int, item: str, abstract: Any) -> Any:
        wanted = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        with self._reading(step):
            saved = {_name(path): array for path, array in self._open(step, item).items()}
        kind = lambda arrays, name: _kind(arrays[name]) if name in arrays else "none"
        other = [f"{name} is {kind(saved, name)} there and {kind(wanted, name)} here" for name in {**saved, **wanted}
                 if kind(saved, name) != kind(wanted, name)]
        if other:  # nothing is wrong with the checkpoint
            raise UserError(f"checkpoint {self.directory / str(step)} has the {item} of another model or optimizer: "
                            f"{'; '.join(other[:5])}{', ...' * (len(other) > 5)}. Use the model and the flags it was made with")

        def read(array, bounds):
            with self._reading(step):
                return _read(array, bounds)

        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: load_array(leaf, functools.partial(read, saved[_name(path)])), abstract)

    def _open(self, step: int, item: str) -> dict[tuple, ts.TensorStore]:
        """The arrays of an item by their tree paths. They are read from here and not through orbax, which reads each
        whole (docs/log.md): they are zarr arrays in an OCDBT database."""
        place = self.directory / str(step) / item
        if not place.is_dir():
            raise FileNotFoundError(f"{item} not found")
        metadata = ocp.PyTreeCheckpointHandler().metadata(place)
        kvstore = {"driver": "ocdbt", "base": place.as_uri()}
        spec = lambda name: {"driver": "zarr3" if metadata.use_zarr3 else "zarr", "kvstore": kvstore | {"path": f"{name}/"},
                             "fill_missing_data_reads": False}  # a chunk that is not there is no zeros
        context = ts.Context()
        return {path: ts.open(spec(leaf.name), read=True, context=context).result()
                for path, leaf in jax.tree_util.tree_leaves_with_path(dict(metadata.tree))}

    def _restore(self, step: int, **items: Any) -> Any:
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except MemoryError:  # no fault of the checkpoint's
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


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _kind(array: ts.TensorStore | jax.ShapeDtypeStruct) -> str:
    """Shape and what the elements are: floats of one width may be read as those of another, nothing else as something else."""
    dtype = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
    return f"{tuple(array.shape)} {'floats' if jax.numpy.issubdtype(dtype, jax.numpy.floating) else dtype.name}"


def _read(array: ts.TensorStore, bounds: Bounds) -> np.ndarray:
    return array[tuple(slice(*b) for b in bounds)].read().result()


def find_checkpoint(path: str | pathlib.Path) -> tuple[pathlib.Path, int]:
    """(run directory, step) for a run directory, its checkpoints directory, or one step's directory."""
    given = pathlib.Path(path).absolute()
    located = _locate(given)
    if located is None:
        raise UserError(f"{path}: no checkpoint there; it is a directory with {RUN_FILE}, {MODEL}/ and {CHECKPOINTS}/, "
                        "as convert.from_hf or a training run makes")
    run_dir, step = located
    folder = run_dir / CHECKPOINTS
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if step is None and not steps:
        raise UserError(f"{path}: the run has saved no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"{path}: no such step; there are {', '.join(map(str, steps)) or 'none'}")
    return run_dir, steps[-1] if step is None else step


def _locate(path: pathlib.Path) -> tuple[pathlib.Path, int | None] | None:
    """The run directory a path means, and the step if it names one; None if it means no checkpoint of ours."""
    if is_run_directory(path):
        return path, None
    if path.name == CHECKPOINTS and is_run_directory(path.parent):
        return path.parent, None
    if path.name.isdigit() and path.parent.name == CHECKPOINTS and is_run_directory(path.parent.parent):
        return path.parent.parent, int(path.name)
    return None


def is_run_directory(path: str | pathlib.Path) -> bool:
    """Whether a training run or a conversion made this directory."""
    return (pathlib.Path(path) / RUN_FILE).is_file()


def has_results(run_dir: str | pathlib.Path) -> bool:
    """Whether a run directory holds a checkpoint or an export."""
    folder = pathlib.Path(run_dir)
    steps = folder / CHECKPOINTS
    return (folder / EXPORT).exists() or steps.is_dir() and any(p.name.isdigit() for p in steps.iterdir())


def is_checkpoint(path: str | pathlib.Path) -> bool:
    """Whether `find_checkpoint` would take this path for one of ours rather than a Hugging Face directory."""
    return _locate(pathlib.Path(path).absolute()) is not None


def write_run_file(run_dir: pathlib.Path, kind: str, extra: dict[str, Any]) -> None:
    """DIR/run.json; kind is "training" or "converted"."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"kind": kind, "versions": versions, **extra}, indent=2)
    partial = run_dir / f".{RUN_FILE}"
    partial.write_text(text)
    partial.replace(run_dir / RUN_FILE)


def read_run_file(run_dir: str | pathlib.Path) -> dict[str, Any]:
    """DIR/run.json. UserError if it is missing or not JSON."""
    file = pathlib.Path(run_dir) / RUN_FILE
    if not file.is_file():
        raise UserError(f"{run_dir}: no run to resume there: it has no {RUN_FILE}; leave out --resume to start one")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("flags", {}), dict):
        raise UserError(f"{file} is not what a run writes: an object with kind, versions and flags")
    return content


def check_same_model(saved: ModelConfig, now: ModelConfig) -> None:
    """UserError that names each field in which two models differ."""
    before, after = dataclasses.asdict(saved), dataclasses.asdict(now)
    changed = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    if changed:
        raise UserError(f"--resume: the model has changed since the checkpoint ({'; '.join(changed)}); start a new run "
                        "in another --out, or resume with the model it began with")


def copy_model_files(hf_dir: str | pathlib.Path, out: str | pathlib.Path) -> None:
    """All of a Hugging Face directory that is not weights: config, tokenizer, chat template, generation config."""
    source, target = pathlib.Path(hf_dir), pathlib.Path(out)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not any(file.match(p) for p in WEIGHT_FILES):
            shutil.copyfile(file, target / file.name)
