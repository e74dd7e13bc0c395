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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alst_jax.config import UserError
from alst_jax.hardware.environment import HOST_LIMIT, pinned_limit
from alst_jax.hardware.host_limits import host_memory
from alst_jax.hardware.machines import GIB, Cluster, machine_of_kind
from alst_jax.parallel.mesh import AXES, DATA, SEQ
from alst_jax.planning.footprint import update_work, working_set
from alst_jax.planning.job import Job
from alst_jax.planning.plan import ABSENT, COMPILED, Plan
from alst_jax.planning.process import saving_bytes
from alst_jax.planning.seconds import collectives, seconds
from alst_jax.processes.link import link
from alst_jax.stack.batch import BATCH_SPEC, Batch
from alst_jax.step import TrainStep
from alst_jax.xla import host
from alst_jax.xla.dtypes import accumulation_dtype


def plan_step(
    step: TrainStep, rows: int, length: int, grad_accum: int = 1, cluster: Cluster | None = None, at_once: bool = False,
    packing: tuple[int, float] = (0, 1.0),
) -> Plan:
    """The plan of a step over `rows` sequences of `length` tokens, `grad_accum` times. Compiles; allocates nothing.
    packing: `documents` and `attention_share` of a Job.

    The step's mesh may be of `absent_devices`. cluster: limits and speeds; None: those of this process's devices.
    at_once: compile the programs at the same time, which is faster and leaves more of the compiler's memory behind. A
    CPU has one memory: activations that a GPU would keep in host memory count as kept there, and the working set counts
    copies that a GPU would not make.
    """
    cluster = this_cluster() if cluster is None else cluster
    documents, share = packing
    job = dataclasses.replace(job_of(step, rows, length, grad_accum), documents=documents, attention_share=share)
    device, on_host = {}, {}
    gradients = {} if step.profile.update_in_backward else step.trained
    for part, tree in (("weights", step.params), ("gradients", gradients), ("optimizer", step.optimizer_state)):
        offloaded = step.profile.offload_optimizer if part == "optimizer" else step.profile.offload_weights
        for leaf in jax.tree.leaves(tree):
            size = shard_bytes(leaf)
            if part == "gradients" and grad_accum > 1:  # and the float32 sums beside those of one batch
                size += math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
            place = on_host if offloaded and (leaf.ndim or part != "optimizer") else device  # the count stays
            place[part] = place.get(part, 0) + size
    kept = job.kept
    absent, on_cpu = is_absent(step.mesh), step.mesh.devices.flat[0].platform == "cpu"
    compiled, update = _compile(step, rows, length, grad_accum, absent, on_cpu, at_once, documents)
    memory = compiled.memory_analysis()
    need = memory.temp_size_in_bytes
    if absent:  # the compiler does not know the workspace that the attention kernel allocates
        need += working_set(job) - working_set(dataclasses.replace(job, count_workspace=False))
    if absent or on_cpu:  # where the update streams, it cannot be compiled without the memories it streams through
        need = max(need, update_work(job) if absent else 0)
    elif update is not None:
        need = max(need, update.memory_analysis().temp_size_in_bytes)
    kept_here = min(need, sum(kept.values()) if on_cpu else kept[host.DEVICE])
    device |= {"kept activations": kept_here, "working set": need - kept_here}
    device["batch"] = 3 * math.prod(NamedSharding(step.mesh, BATCH_SPEC).shard_shape((rows, length))) * 4
    on_host["kept activations"] = memory.host_temp_size_in_bytes
    if absent and step.profile.offload_weights:  # there, layers and their gradients are temporary arrays
        layers = sum(map(shard_bytes, jax.tree.leaves((step.params["layers"], step.trained["layers"]))))
        on_host["kept activations"] = max(0, memory.host_temp_size_in_bytes - layers)
    on_host["saving"] = saving_bytes(job, on_host["kept activations"] + on_host.get("gradients", 0))
    text = compiled.as_text()
    calls = {name: numbers | {"instructions": len(re.findall(rf"= [^=]*\b{name}(?:-start)?\(", text))}
             for name, numbers in collectives(job).items()}
    return Plan(
        ABSENT if absent else COMPILED, step.mesh.devices.flat[0].device_kind, device, on_host,
        cluster and cluster.machine.usable, cluster and cluster.host_share,
        job.flops, calls,
        seconds(job, cluster) if cluster else {}, grad_accum * rows * length, step.mesh.size)


def job_of(step: TrainStep, rows: int, length: int, grad_accum: int = 1) -> Job:
    """The job of a step."""
    return Job(step.model, step.profile, rows, length, step.mesh.shape[DATA], step.mesh.shape[SEQ], grad_accum,
               step.optimizer.states, step.optimizer.master, freeze=step.freeze)


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's shard of an array or abstract array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize


# -------------------------------------------------------------------------------------------------- devices, absent too


def absent_devices(cluster: Cluster) -> list[jax.Device]:
    """Devices of a cluster that this process does not have, to compile for."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        "", "cuda", target_config=cluster.machine.target_config, topology=cluster.topology)
    return list(topology.devices)


def is_absent(mesh: Mesh) -> bool:
    """Whether the mesh consists of absent devices."""
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return not mine[0].addressable_memories()


def this_cluster(host_memory_gib: float | int | None = None, devices: int | None = None) -> Cluster | None:
    """The devices and the host of this process; None on a CPU.

    host_memory_gib: use no more host memory. devices: the number of devices that share it; None: all. A device that is
    not in the list counts as an H100 in speed, with its own memory. The environment's limit on pinned memory counts up
    to the host's memory. UserError if several devices together could pin more than that.
    """
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return None
    limit = device.memory_stats()["bytes_limit"]
    known = machine_of_kind(device.device_kind) or machine_of_kind("H100")
    machine = dataclasses.replace(known, name=device.device_kind, kind=device.device_kind, memory=limit, fraction=1.0)
    pinned = pinned_limit()
    hosts = len(set(link().hosts))
    per_host = jax.device_count() // hosts
    cluster = Cluster(machine, hosts, per_host, host_memory(host_memory_gib), used=devices)
    if pinned is None:
        return cluster
    if cluster.sharing > 1 and pinned * cluster.sharing > host_memory():
        raise UserError(f"{HOST_LIMIT}={pinned // GIB}: jax may pin that for each of {cluster.sharing} devices, and "
                        f"the host has {host_memory() / GIB:.0f} GiB; set it to {cluster.host_share // GIB} or less "
                        "(unset, it is what is left to each GPU that nvidia-smi lists)")
    return dataclasses.replace(cluster, pinned=min(pinned, host_memory()))


# ------------------------------------------------------------------------------------------------------------ compiling


def _compile(
    step: TrainStep, rows: int, length: int, grad_accum: int, absent: bool, on_cpu: bool, at_once: bool, documents: int = 0
) -> tuple[Any, Any]:
    """The compiled gradient, or the whole step if the profile updates in the backward pass; and the separate update, on
    GPUs of this process."""
    batch = Batch.abstract(rows, length, step.mesh, documents)
    scalar, params = jax.ShapeDtypeStruct((), jnp.float32), (step.trained, step.frozen)
    if step.profile.update_in_backward and not absent:
        return step.update_in_backward.lower(*params, step.optimizer_state, batch, scalar, scalar).compile(), None
    function = step.loss_and_grad
    if absent and step.profile.offload_weights:
        function = jax.jit(functools.partial(_with_weights_on_host, step))
    lowered = [function.lower(*params, batch, scalar)]
    if not (absent or on_cpu):
        lowered.append(_lower_update(step, grad_accum))
    with concurrent.futures.ThreadPoolExecutor(len(lowered) if at_once else 1) as threads:
        compiled, *update = threads.map(lambda program: program.compile(), lowered)
    return compiled, update[0] if update else None


def _with_weights_on_host(step: TrainStep, trained: Any, frozen: Any, batch: Batch, scale: jax.Array) -> Any:
    """Loss and one element of each gradient, with weights and gradients on the host, for absent devices.

    Absent devices have no memories, so arguments and results cannot be declared to live on the host. Weights are copied
    there first, and gradients stay there: as results on the device, their buffers would hold temporary arrays, and the
    plan would lack up to their size. Profiles that update in the backward pass use this too: it compiles ten times
    faster, and one layer's update needs less than its backward pass.
    """
    loss, gradients = step.loss_and_grad(host.to_host(trained), host.to_host(frozen), batch, scale)
    at = (scale * 0).astype(jnp.int32)

    def elements(gradients, at):
        element = lambda x: host.to_device(lax.dynamic_slice(x, (at,) * x.ndim, (1,) * x.ndim)).reshape(1)
        return jax.tree.map(element, gradients)

    elements = jax.shard_map(elements, mesh=step.mesh, in_specs=(step.split(step.specs)[0], P()), out_specs=P(AXES))
    return loss, elements(host.to_host(gradients), at)


def _lower_update(step: TrainStep, grad_accum: int) -> Any:
    # As a run calls it, which then compiles nothing again: the norm comes from the mesh, the rate from the host.
    norm = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(step.mesh, P()))
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    widen = accumulation_dtype if grad_accum > 1 else lambda dtype: dtype
    gradients = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, widen(p.dtype), sharding=p.sharding), step.trained)
    return step.update.lower(step.trained, gradients, step.optimizer_state, norm, rate)
