"""Plans by the compiler, before anything is allocated: its bytes for the working set, shapes for the rest."""

import dataclasses
import re

import jax

from alst_jax.hardware.devices import is_absent, this_cluster
from alst_jax.hardware.machines import Cluster
from alst_jax.lowered import abstract_sums, compile_programs
from alst_jax.planning.estimate import estimate
from alst_jax.planning.footprint import update_work, working_set
from alst_jax.planning.job import Job
from alst_jax.planning.plan import ABSENT, COMPILED, Plan
from alst_jax.planning.process import saving_bytes
from alst_jax.step import TrainStep
from alst_jax.xla import host
from alst_jax.xla.arrays import shard_bytes


def plan_step(
    step: TrainStep, job: Job, cluster: Cluster | None = None, at_once: bool = False, asked: Job | None = None
) -> Plan:
    """The plan of a job by the compiler. step: the job's. Compiles; allocates nothing.

    The step's mesh may be of `absent_devices`. cluster: limits and speeds; None: of this process's devices.
    at_once: compile the programs at the same time, which is faster and leaves more of the compiler's memory behind. A
    CPU has one memory: activations that a GPU would keep in host memory count as kept there, and the working set counts
    copies that a GPU would not make. asked: the job that this one stands for, whose kernel has another workspace.
    """
    asked = asked or job
    cluster = this_cluster() if cluster is None else cluster
    first, plan = step.mesh.devices.flat[0], estimate(job, cluster)
    absent, on_cpu = is_absent(step.mesh), first.platform == "cpu"
    device, on_host = _state_bytes(step, job)
    compiled, update = compile_programs(
        step, job.rows, job.length, job.grad_accum, absent, on_cpu, at_once, job.documents
    )
    memory = compiled.memory_analysis()
    need = memory.temp_size_in_bytes
    if absent:  # the compiler does not know the kernel's workspace, and cannot compile an update that streams
        need += working_set(asked) - working_set(dataclasses.replace(asked, count_workspace=False))
        need = max(need, update_work(job))
    elif update is not None:
        need = max(need, update.memory_analysis().temp_size_in_bytes)
    kept_here = min(need, sum(job.kept.values()) if on_cpu else job.kept[host.DEVICE])
    device |= {"kept activations": kept_here, "working set": need - kept_here, "batch": plan.device["batch"]}
    # Where devices are absent, layers and their gradients in host memory are temporary arrays.
    stacks = abstract_sums(step) if job.sums_in_place else step.trained["layers"]
    layers = (step.params["layers"], stacks) if absent and step.profile.offload_weights else ()
    on_host["kept activations"] = max(
        0, memory.host_temp_size_in_bytes - sum(map(shard_bytes, jax.tree.leaves(layers)))
    )
    on_host["saving"] = saving_bytes(job, on_host["kept activations"] + on_host.get("gradients", 0))
    text = compiled.as_text()
    calls = {
        name: numbers | {"instructions": len(re.findall(rf"= [^=]*\b{name}(?:-start)?\(", text))}
        for name, numbers in plan.collectives.items()
    }
    source, kind = ABSENT if absent else COMPILED, first.device_kind
    return dataclasses.replace(plan, source=source, device_kind=kind, device=device, host=on_host, collectives=calls)


def _state_bytes(step: TrainStep, job: Job) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a device's shards of weights, gradients and optimizer state: on the device, and in host memory."""
    device, on_host = {}, {}
    stored = () if job.profile.update_in_backward or job.sums_in_place else step.trained
    gradients = (stored, abstract_sums(step) if job.grad_accum > 1 else ())
    for part, tree in (("weights", step.params), ("gradients", gradients), ("optimizer", step.optimizer_state)):
        for leaf in jax.tree.leaves(tree):
            offloaded = job.profile.on_host(part) and (leaf.ndim or part != "optimizer")  # the count stays
            place = on_host if offloaded else device
            place[part] = place.get(part, 0) + shard_bytes(leaf)
    return device, on_host
