"""Plans by the compiler, before anything is allocated: its bytes for the working set, shapes for the rest."""

import concurrent.futures
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alst_jax.hardware.devices import is_absent, this_cluster
from alst_jax.hardware.machines import Cluster
from alst_jax.parallel.mesh import AXES, DATA, SEQ
from alst_jax.planning.estimate import estimate
from alst_jax.planning.footprint import update_work, working_set
from alst_jax.planning.job import Job
from alst_jax.planning.plan import ABSENT, COMPILED, Plan
from alst_jax.planning.process import saving_bytes
from alst_jax.stack.batch import BATCH_SPEC, Batch
from alst_jax.step import TrainStep
from alst_jax.xla import host
from alst_jax.xla.dtypes import accumulation_dtype


def plan_step(
    step: TrainStep, rows: int, length: int, grad_accum: int = 1, cluster: Cluster | None = None, at_once: bool = False,
    packing: tuple[int, float, float, float] = (0, 1.0, 0.0, 0.0),
) -> Plan:
    """The plan of a step over `rows` sequences of `length` tokens, `grad_accum` times. Compiles; allocates nothing.
    packing: `Job.packing`.

    The step's mesh may be of `absent_devices`. cluster: limits and speeds; None: of this process's devices.
    at_once: compile the programs at the same time, which is faster and leaves more of the compiler's memory behind. A
    CPU has one memory: activations that a GPU would keep in host memory count as kept there, and the working set counts
    copies that a GPU would not make.
    """
    cluster = this_cluster() if cluster is None else cluster
    job = job_of(step, rows, length, grad_accum, packing)
    first = step.mesh.devices.flat[0]
    absent, on_cpu = is_absent(step.mesh), first.platform == "cpu"
    device, on_host = _state_bytes(step, grad_accum)
    compiled, update = _compile(step, rows, length, grad_accum, absent, on_cpu, at_once, job.documents)
    memory = compiled.memory_analysis()
    need = memory.temp_size_in_bytes
    if absent:  # the compiler does not know the kernel's workspace, and cannot compile an update that streams
        need += working_set(job) - working_set(dataclasses.replace(job, count_workspace=False))
        need = max(need, update_work(job))
    elif update is not None:
        need = max(need, update.memory_analysis().temp_size_in_bytes)
    kept_here = min(need, sum(job.kept.values()) if on_cpu else job.kept[host.DEVICE])
    device |= {"kept activations": kept_here, "working set": need - kept_here}
    device["batch"] = 3 * math.prod(NamedSharding(step.mesh, BATCH_SPEC).shard_shape((rows, length))) * 4
    # Where devices are absent, layers and their gradients in host memory are temporary arrays.
    stacks = _sums(step) if job.sums_in_place else step.trained["layers"]
    layers = (step.params["layers"], stacks) if absent and step.profile.offload_weights else ()
    at_rest = sum(map(shard_bytes, jax.tree.leaves(layers)))
    on_host["kept activations"] = max(0, memory.host_temp_size_in_bytes - at_rest)
    on_host["saving"] = saving_bytes(job, on_host["kept activations"] + on_host.get("gradients", 0))
    text, plan = compiled.as_text(), estimate(job, cluster)
    calls = {name: numbers | {"instructions": len(re.findall(rf"= [^=]*\b{name}(?:-start)?\(", text))}
             for name, numbers in plan.collectives.items()}
    return dataclasses.replace(plan, source=ABSENT if absent else COMPILED, device_kind=first.device_kind,
                               device=device, host=on_host, collectives=calls)


def _state_bytes(step: TrainStep, grad_accum: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a device's shards of weights, gradients and optimizer state: on the device, and in host memory."""
    device, on_host = {}, {}
    gradients = {} if step.profile.update_in_backward else step.trained
    for part, tree in (("weights", step.params), ("gradients", gradients), ("optimizer", step.optimizer_state)):
        for leaf in jax.tree.leaves(tree):
            size = shard_bytes(leaf)
            if part == "gradients" and grad_accum > 1:  # the float32 sums, beside those of one batch or alone
                size = size * (not step.profile.sums_in_place) + math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
            offloaded = step.profile.on_host(part) and (leaf.ndim or part != "optimizer")  # the count stays
            place = on_host if offloaded else device
            place[part] = place.get(part, 0) + size
    return device, on_host


def job_of(
    step: TrainStep, rows: int, length: int, grad_accum: int = 1,
    packing: tuple[int, float, float, float] = (0, 1.0, 0.0, 0.0)
) -> Job:
    """The job of a step."""
    return Job(step.model, step.profile, rows, length, step.mesh.shape[DATA], step.mesh.shape[SEQ], grad_accum,
               step.optimizer.states, step.optimizer.master, True, step.freeze, *packing)


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's shard of an array or abstract array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize


def _compile(
    step: TrainStep, rows: int, length: int, grad_accum: int, absent: bool, on_cpu: bool, at_once: bool,
    documents: int = 0,
) -> tuple[Any, Any]:
    """The compiled gradient, or whole step where the backward pass updates; on GPUs that are here also the update."""
    batch = Batch.abstract(rows, length, step.mesh, documents)
    scalar, params = jax.ShapeDtypeStruct((), jnp.float32), (step.trained, step.frozen)
    if step.profile.update_in_backward and not absent:
        return step.update_in_backward.lower(*params, step.optimizer_state, batch, scalar, scalar).compile(), None
    function, sums = step.loss_and_grad, ()
    if grad_accum > 1 and step.profile.sums_in_place:
        function, sums = step.loss_and_sums, (_sums(step),)
    if absent and step.profile.offload_weights:
        function = jax.jit(functools.partial(_with_weights_on_host, step))
    lowered = [function.lower(*sums, *params, batch, scalar)]
    if not (absent or on_cpu):
        lowered.append(_lower_update(step, grad_accum))
    with concurrent.futures.ThreadPoolExecutor(len(lowered) if at_once else 1) as threads:
        compiled, *update = threads.map(lambda program: program.compile(), lowered)
    return compiled, update[0] if update else None


def _sums(step: TrainStep) -> Any:
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


def _lower_update(step: TrainStep, grad_accum: int) -> Any:
    # As a run calls it, which then compiles nothing again: the norm comes from the mesh, the rate from the host.
    norm = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(step.mesh, P()))
    gradients = _sums(step) if grad_accum > 1 else step.trained
    return step.update.lower(step.trained, gradients, step.optimizer_state, norm, jax.ShapeDtypeStruct((), jnp.float32))
