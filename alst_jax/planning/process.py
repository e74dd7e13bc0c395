"""Host memory of the whole process: jax's pinned pools, a save, and the memory beside them."""

import dataclasses
import math

import jax

from alst_jax.config import UserError
from alst_jax.hardware import environment
from alst_jax.hardware.machines import GIB, LARGEST_HOST, Cluster
from alst_jax.planning.footprint import state_bytes
from alst_jax.planning.job import Job
from alst_jax.planning.plan import Choice, Plan
from alst_jax.profile import HOST
from alst_jax.storage import saving
from alst_jax.xla import host

POOL_SLACK, POOL_MATTERS = 2, 16  # GiB
# Memory of a process beside pinned memory and a save's writers: Python, CUDA's libraries, the compiler; and more for
# each device after the first. Fitted to seven measured processes (benchmarks/results/2026-11-27-h100.md).
PROCESS, PROCESS_DEVICE = 4 * GIB, 3 * GIB
WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1, "low-bits": 2, "none": 0}  # of a state's or a master's element

# --------------------------------------------------------------------------------------------------------------- a save


def saving_bytes(job: Job, free: int) -> int:
    """Bytes of host memory, one device's part, that a save needs beside a step's. The limits are storage/saving.py's.

    free: bytes of a step that are not in use during a save.
    """
    profile, on_host = job.profile, min(job.devices, LARGEST_HOST)
    state_width = max(WIDTHS[job.states], WIDTHS[job.master] if job.width == 2 else 0)
    has_master = job.width == 2 and job.master != "none"
    held, saved = 0, 0
    for offloaded, width, arrays, sizes in (
            (profile.offload_weights, job.width, 1, job.parameters),
            (profile.offload_optimizer, state_width, 2 + has_master, job.trained)):
        size = sizes.total * width // job.devices
        saved += arrays * size
        if not offloaded:
            largest = sizes.largest * width // job.devices
            held += min(arrays * size, 2 * max(largest, saving.COPIES // on_host))
    return max(0, held - free) + min(saved, saving.BUFFERS // on_host)


def host_bytes(job: Job) -> int:
    """Host memory in a job's plan, without the rest of the plan."""
    weights, gradients, optimizer = state_bytes(job)
    profile = job.profile
    step_only = job.kept[HOST] + gradients * profile.offload_weights
    states = weights * profile.offload_weights + optimizer * profile.offload_optimizer
    return states + step_only + saving_bytes(job, step_only)


def pinned_bytes(job: Job) -> int:
    """`Plan.pinned_bytes` of a job's plan, without the rest of the plan."""
    return host_bytes(job) - saving.BUFFERS // min(job.devices, LARGEST_HOST)


# --------------------------------------------------------------------------------------------------------- pinned pools


def pinned_gibibytes(plan: Plan) -> int:
    """GiB of pinned memory that a device needs: host memory without its part of a save's writers."""
    return -(-plan.pinned_bytes // GIB)


def pool_bytes(plan: Plan) -> int:
    """Bytes of jax's pool of pinned memory for one device.

    The next power of two, or the most that jax may pin if that is less. Without `make_host_pool` the pool grows in use:
    then at least the bytes that the plan needs.
    """
    need = pinned_gibibytes(plan)
    if need < POOL_MATTERS:
        return need * GIB
    pool = 2 ** math.ceil(math.log2(need + POOL_SLACK)) * GIB
    return pool if plan.host_limit is None else max(need * GIB, min(pool, plan.host_limit))


def make_host_pool(plan: Plan) -> None:
    """Pin the host memory of a plan in one piece a device (see `host.reserve`), if it is large enough to matter.

    Adds slack, but never exceeds the limit that jax may pin. UserError if the host refuses.
    """
    devices = jax.local_devices()[: plan.devices]
    need = pinned_gibibytes(plan)
    if need < POOL_MATTERS:
        return
    most = environment.pinned_limit()
    gibibytes = need + POOL_SLACK if most is None else max(need, min(need + POOL_SLACK, most // GIB))
    times = f"{len(devices)} times " if len(devices) > 1 else ""
    print(f"pinning {times}{gibibytes} GiB of host memory, about a second each", flush=True)
    try:
        host.reserve(gibibytes, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{times}{gibibytes} GiB of host memory could not be pinned: {reason}. Free some, raise "
                        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB where it is set, or keep less there "
                        "(--keep-attention-on-host, --optimizer-states int8, a shorter --seq-len)") from error


# ---------------------------------------------------------------------------------------------------------- the process


def staging_bytes(job: Job) -> int:
    """Pinned memory beside the pools, through which arrays seem to be copied; all devices share it.

    A device's part of the largest array, rounded up to a power of two (4.0 GiB came within two seconds when an 8B model
    was loaded; docs/log.md)."""
    return 2 ** math.ceil(math.log2(job.parameters.largest * job.width // job.devices))


def beside_pools(job: Job, per_host: int) -> int:
    """Host memory of a process beside its pools, on hosts of `per_host` devices."""
    return staging_bytes(job) + saving.BUFFERS + PROCESS + (min(job.devices, per_host) - 1) * PROCESS_DEVICE


def process_bytes(choice: Choice, per_host: int) -> int:
    """Host memory of a whole process, on hosts of `per_host` devices."""
    return min(choice.plan.devices, per_host) * pool_bytes(choice.plan) + beside_pools(choice.job, per_host)


def with_room(cluster: Cluster | None, job: Job) -> Cluster | None:
    """The cluster with a limit on pinned memory that leaves room for the process of this job; a limit set before
    stays."""
    if cluster is None or cluster.pinned is not None:
        return cluster
    return dataclasses.replace(cluster, pinned=min(cluster.host_share, most_pinned(cluster, job)))


def most_pinned(cluster: Cluster, job: Job) -> int:
    """Bytes of a device's pool at most, so that the process fits its host."""
    return max(0, cluster.host_memory - beside_pools(job, cluster.per_host)) // min(job.devices, cluster.per_host)


def describe_process(choice: Choice, cluster: Cluster) -> str:
    """The bytes of the process, of its host and of its pools, in one line."""
    here = min(choice.plan.devices, cluster.per_host)
    process, pools = process_bytes(choice, here), here * pool_bytes(choice.plan)
    return (f"the whole process: about {process / GIB:.0f} of {cluster.host_memory / GIB:.0f} GiB of host memory: "
            f"{pools / GIB:.0f} in jax's pools, the rest Python, CUDA's libraries, the compiler, loading and saving")


def host_outgrown(choice: Choice, cluster: Cluster) -> str:
    """Why the process does not fit its host, and a limit that would help; empty if it fits."""
    if process_bytes(choice, cluster.per_host) <= cluster.host_memory:
        return ""
    pinned = most_pinned(cluster, choice.job) // GIB
    help = f". {environment.HOST_LIMIT}={pinned} in the environment leaves it room" if pinned else ""
    return f"more than there is: {describe_process(choice, cluster)}{help}"
