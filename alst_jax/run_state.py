"""The state of a run: begun, restored, exported."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from alst_jax import run_lora
from alst_jax.config import TrainConfig, UserError
from alst_jax.hardware.environment import HOST_LIMIT, pinned_limit
from alst_jax.hardware.machines import GIB
from alst_jax.models.hf_config import record_dtype
from alst_jax.models.hf_saving import save_params
from alst_jax.models.other_weights import auto_class
from alst_jax.models.tree import as_tree
from alst_jax.planning.job import Job
from alst_jax.planning.plan import Plan
from alst_jax.planning.process import POOL_MATTERS, POOL_SLACK, pinned_gibibytes
from alst_jax.processes.files import check_seen
from alst_jax.processes.link import link
from alst_jax.step import TrainStep
from alst_jax.storage import checksums, run_directory, saving
from alst_jax.storage.checkpoint import Checkpoints
from alst_jax.storage.source import ModelSource, identity
from alst_jax.trainer import Data, TrainState
from alst_jax.xla import host


def geometry(config: TrainConfig, job: Job, dtype: jnp.dtype, data: str) -> dict[str, Any]:
    """The settings that a resumed run must share with its checkpoint. data: hash of the sequences."""
    return {
        "data": data,
        "seed": config.seed,
        "samples_per_step": job.rows * job.grad_accum,
        "seq_len": config.seq_len,
        "dtype": str(dtype),
        "optimizer_states": job.states,
        "master_weights": job.master,
        "freeze": config.freeze,
        "rope_scaling": config.rope_scaling,
        "rope_factor": config.rope_factor,
        "rope_theta": config.rope_theta,
        **run_lora.settings(job.model.lora),
    }


KNOWN_BEFORE_DATA = ("seed", "samples_per_step", "seq_len", "dtype", "freeze")


def check_before_data(config: TrainConfig, job: Job, dtype: jnp.dtype) -> None:
    """UserError for a resumed run with other settings than its checkpoint, as far as they are known before the data are
    read. Data that are cut to another length would otherwise be refused as data that have changed."""
    if not config.resume:
        return
    out = pathlib.Path(config.out)
    step = link().told("newest checkpoint", lambda: run_directory.find_checkpoint(out)[1])
    checkpoints = Checkpoints(out)
    saved = checkpoints.restore_run(step)["geometry"]
    checkpoints.close()
    now = geometry(config, job, dtype, data="")
    run_directory.check_geometry(saved, {name: now[name] for name in KNOWN_BEFORE_DATA})


def begin(
    config: TrainConfig, source: ModelSource, step: TrainStep, data: Data, settings: dict[str, Any]
) -> tuple[Checkpoints, TrainState]:
    """Resume the newest checkpoint of --out, or load or draw weights and start the run directory.

    settings: the `geometry`.
    """
    out = pathlib.Path(config.out)
    if not config.resume:
        # Weights first: a run that is refused has written no file.
        params = run_lora.begin(config, source, step, jnp.dtype(settings["dtype"]))
        base = None if step.model.lora is None else identity(source, config.seed)
        if link().first:
            run_directory.start_run_directory(out, config, source.config, source.tokenizer, source.files, base)
        check_seen(out / run_directory.RUN_FILE)
        return Checkpoints(out, config.keep_checkpoints, clean=True), TrainState.begin(step, params)
    at = link().told("checkpoint", lambda: run_directory.find_checkpoint(out)[1])
    check_seen(out / run_directory.CHECKPOINTS / str(at) / checksums.FILE)
    checkpoints = Checkpoints(out, config.keep_checkpoints, clean=True)
    loop = checkpoints.restore_run(at)
    checkpoints.check_run_files(at)
    run_directory.check_same_model(run_directory.saved_model(out), source.config)
    run_directory.check_geometry(loop["geometry"], settings)
    if config.add_data and config.steps is not None and config.steps <= loop["step"]:
        raise UserError(
            f"--add-data: the {config.steps} steps of the run are done, so that it would learn nothing of "
            "them; name more with --steps"
        )
    frozen = None if step.model.lora is None else run_lora.resume_base(config, step, jnp.dtype(settings["dtype"]))
    state = restore(step, data, checkpoints, at, frozen)
    link().wait("restored")
    if link().first:
        checkpoints.remove_remains()  # after the newest one was found to be whole
        run_directory.record_added(out, data.added)
    return checkpoints, state


def size_of(step: TrainStep) -> int:
    """Bytes of a checkpoint, or more: of all parameters and optimizer states."""
    leaves = jax.tree.leaves((step.params, step.optimizer_state))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def saved_params(step: TrainStep, state: TrainState) -> Any:
    """The parameters that checkpoints hold: all of them, or the trained ones beside a base model."""
    return step.join(state.trained, state.frozen) if step.model.lora is None else state.trained


def restore(step: TrainStep, data: Data, checkpoints: Checkpoints, at: int, frozen: Any | None = None) -> TrainState:
    """The state of a checkpoint; the data go back to their position. frozen: base weights of a run with adapters."""
    loop = checkpoints.restore_run(at)
    if frozen is None:
        trained, frozen = step.split(checkpoints.restore_params(at, step.params))
    else:
        trained = checkpoints.restore_params(at, step.trained)
    optimizer = checkpoints.restore_optimizer(at, step.optimizer_state)
    data.training.set_state(loop["data"])
    return TrainState(trained, frozen, optimizer, loop["step"])


def go_back(step: TrainStep, data: Data, checkpoints: Checkpoints, state: TrainState) -> TrainState | None:
    """The state of the last checkpoint, or None. Frees the arrays of `state`: both would not fit."""
    steps = checkpoints.steps()
    if not steps:
        return None
    frozen = None if step.model.lora is None else state.frozen
    for leaf in jax.tree.leaves((state.trained, state.optimizer, state.frozen if frozen is None else None)):
        leaf.delete()  # buffers that an update reused are deleted already
    return restore(step, data, checkpoints, steps[-1], frozen)


def export_all(config: TrainConfig, source: ModelSource, step: TrainStep, state: TrainState, dtype: jnp.dtype) -> None:
    """Write OUT/hf, of a run with adapters OUT/adapter and, if it merges them, OUT/hf."""
    params = step.join(state.trained, state.frozen)
    if step.model.lora is not None:
        export_adapter(config, step, state)
        params = run_lora.merged_params(step, params)
    if step.model.lora is None or config.merge_adapter:
        export(pathlib.Path(config.out), source, params, dtype, state.step)


def export_adapter(config: TrainConfig, step: TrainStep, state: TrainState) -> None:
    """Write OUT/adapter. In several processes process 0 reads the adapters from the last checkpoint."""
    if not link().several:
        run_lora.export(config, step, state.trained)
        return
    checkpoints = Checkpoints(pathlib.Path(config.out))
    adapters = as_tree(checkpoints.open_params(state.step))  # all verify the checkpoint together
    if link().first:
        run_lora.export(config, step, adapters)
    checkpoints.close()


def export(out: pathlib.Path, source: ModelSource, params: Any, dtype: jnp.dtype, step: int) -> None:
    """Write OUT/hf, a Hugging Face directory with these weights. step: the last one, whose checkpoint is complete.

    Several processes read the checkpoint, since each has a part of the weights only.
    """
    target = out / run_directory.EXPORT
    model_dir = out / run_directory.MODEL
    if link().first:
        run_directory.copy_model_files(model_dir, target)
    link().wait("files of the model")
    checkpoints = Checkpoints(out) if link().several else None
    leaves = checkpoints.open_params(step) if checkpoints else jax.tree_util.tree_leaves_with_path(params)
    save_params(leaves, source.config, target, saving.EXPORT_FILE, model_dir=model_dir)
    if checkpoints:
        checkpoints.close()
    if link().first:
        record_dtype(target, str(dtype))
        checksums.seal_weights(target)
    print(f"wrote {target}: transformers.{auto_class(target)}.from_pretrained({str(target)!r}) loads it")


def make_host_pool(plan: Plan) -> None:
    """Pin the host memory of a plan in one piece a device (see `host.reserve`), if it is large enough to matter.

    Adds slack, but never exceeds the limit that jax may pin. UserError if the host refuses.
    """
    devices = jax.local_devices()[: plan.devices]
    need = pinned_gibibytes(plan)
    if need < POOL_MATTERS:
        return
    most = pinned_limit()
    gibibytes = need + POOL_SLACK if most is None else max(need, min(need + POOL_SLACK, most // GIB))
    times = f"{len(devices)} times " if len(devices) > 1 else ""
    print(f"pinning {times}{gibibytes} GiB of host memory, about a second each", flush=True)
    try:
        host.reserve(gibibytes, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{times}{gibibytes} GiB of host memory could not be pinned: {reason}. Free some, raise "
            f"{HOST_LIMIT} where it is set, or keep less there "
            "(--keep-attention-on-host, --optimizer-states int8, a shorter --seq-len)"
        ) from error
