"""The programs of a step, compiled from abstract arrays as a run calls them: that run compiles nothing again."""

import concurrent.futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alst_jax.parallel.mesh import AXES
from alst_jax.stack.batch import Batch
from alst_jax.step import TrainStep
from alst_jax.xla import host
from alst_jax.xla.dtypes import accumulation_dtype


def compile_programs(
    step: TrainStep,
    rows: int,
    length: int,
    grad_accum: int,
    absent: bool,
    on_cpu: bool,
    at_once: bool,
    documents: int = 0,
) -> tuple[Any, Any]:
    """The compiled gradient, or whole step where the backward pass updates; on GPUs that are here also the update.

    absent: the mesh has devices that are not here. at_once: compile both at the same time.
    """
    batch = Batch.abstract(rows, length, step.mesh, documents, step.model.dropout > 0)
    scalar, params = jax.ShapeDtypeStruct((), jnp.float32), (step.trained, step.frozen)
    if step.profile.update_in_backward and not absent:
        return step.update_in_backward.lower(*params, step.optimizer_state, batch, scalar, scalar).compile(), None
    function, sums = step.loss_and_grad, ()
    if grad_accum > 1 and step.profile.sums_in_place:
        function, sums = step.loss_and_sums, (abstract_sums(step),)
    if absent and step.profile.offload_weights:
        function = jax.jit(functools.partial(_with_weights_on_host, step))
    lowered = [function.lower(*sums, *params, batch, scalar)]
    if not (absent or on_cpu):
        lowered.append(lower_update(step, grad_accum))
    with concurrent.futures.ThreadPoolExecutor(len(lowered) if at_once else 1) as threads:
        compiled, *update = threads.map(lambda program: program.compile(), lowered)
    return compiled, update[0] if update else None


def abstract_sums(step: TrainStep) -> Any:
    """The float32 sums of gradients over batches, abstract."""
    wide = lambda p: jax.ShapeDtypeStruct(p.shape, accumulation_dtype(p.dtype), sharding=p.sharding)
    return jax.tree.map(wide, step.trained)


def _with_weights_on_host(step: TrainStep, *arguments: Any) -> Any:
    """Loss and one element of each gradient, with weights and gradients on the host, for absent devices.

    Absent devices have no memories, so arguments and results cannot be declared to live on the host. Weights are copied
    there first, and gradients stay there: as results on the device, their buffers would hold temporary arrays, and the
    plan would lack up to their size. Profiles that update in the backward pass use this too: it compiles ten times
    faster, and one layer's update needs less than its backward pass.
    """
    *trees, batch, scale = arguments  # the sums over batches if there are any, trained and frozen parameters
    function = step.loss_and_sums if len(trees) == 3 else step.loss_and_grad
    loss, gradients = function(*map(host.to_host, trees), batch, scale)
    at = (scale * 0).astype(jnp.int32)

    def elements(gradients, at):
        element = lambda x: host.to_device(lax.dynamic_slice(x, (at,) * x.ndim, (1,) * x.ndim)).reshape(1)
        return jax.tree.map(element, gradients)

    elements = jax.shard_map(elements, mesh=step.mesh, in_specs=(step.split(step.specs)[0], P()), out_specs=P(AXES))
    return loss, elements(host.to_host(gradients), at)


def lower_update(step: TrainStep, grad_accum: int) -> Any:
    """`TrainStep.update`, lowered as a run calls it: the norm comes from the mesh, the rate from the host."""
    norm = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(step.mesh, P()))
    gradients = abstract_sums(step) if grad_accum > 1 else step.trained
    return step.update.lower(step.trained, gradients, step.optimizer_state, norm, jax.ShapeDtypeStruct((), jnp.float32))
