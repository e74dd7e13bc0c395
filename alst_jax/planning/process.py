"""Host memory: of one device in a plan, of jax's pinned pools, and of the whole process."""

import dataclasses
import math

from alst_jax.hardware import environment
from alst_jax.hardware.machines import GIB, LARGEST_HOST, Cluster
from alst_jax.optim.formats import WIDTHS
from alst_jax.planning.job import Job
from alst_jax.planning.plan import Choice, Plan
from alst_jax.storage import saving

POOL_SLACK, POOL_MATTERS = 2, 16  # GiB
# Memory of a process beside pinned memory and a save's writers: Python, CUDA's libraries, the compiler; and more for
# each device after the first. Fitted to seven measured processes (benchmarks/results/2026-11-27-h100.md).
PROCESS, PROCESS_DEVICE = 4 * GIB, 3 * GIB


def saving_bytes(job: Job, free: int) -> int:
    """Bytes of host memory, one device's part, that a save needs beside a step's. free: see `saving.host_bytes`."""
    masters = job.width == 2 and job.master != "none"
    widest = max(WIDTHS[job.states], WIDTHS[job.master] * masters)
    weights = job.parameters if job.model.lora is None else job.trained  # checkpoints of adapters hold no base model
    shard = lambda elements, width: elements * width // job.devices
    largest = lambda part, sizes, width: shard(sizes.largest, width) * (not job.profile.on_host(part))
    trees = [
        (shard(weights.total, job.width), largest("weights", weights, job.width)),
        ((2 + masters) * shard(job.trained.total, widest), largest("optimizer", job.trained, widest)),
    ]
    return saving.host_bytes(trees, min(job.devices, LARGEST_HOST), free)


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


def beside_pools(job: Job, per_host: int, processes: int = 1) -> int:
    """Host memory beside the pools of so many processes, on a host of `per_host` devices."""
    return beside(job.parameters.largest * job.width, job.devices, min(job.devices, per_host), processes)


def beside(largest: int, devices: int, here: int, processes: int = 1) -> int:
    """Host memory beside the pools of so many processes. largest: bytes of the largest array of weights, which is
    divided over `devices`, of which the host has `here`."""
    # Arrays seem to be copied through pinned memory that all devices share: a device's part of the largest array,
    # rounded up to a power of two (4.0 GiB came within two seconds when an 8B model was loaded; docs/log.md).
    staging = 2 ** math.ceil(math.log2(largest // devices))
    return processes * (staging + saving.BUFFERS + PROCESS) + (here - processes) * PROCESS_DEVICE


def process_bytes(choice: Choice, per_host: int, processes: int = 1) -> int:
    """Host memory of a whole process, or of so many that share a host of `per_host` devices."""
    return min(choice.plan.devices, per_host) * pool_bytes(choice.plan) + beside_pools(choice.job, per_host, processes)


def with_room(cluster: Cluster | None, job: Job) -> Cluster | None:
    """The cluster with a limit on pinned memory that leaves room for the process; a limit set before stays."""
    if cluster is None or cluster.pinned is not None:
        return cluster
    return dataclasses.replace(cluster, pinned=min(cluster.host_share, most_pinned(cluster, job)))


def most_pinned(cluster: Cluster, job: Job) -> int:
    """Bytes of a device's pool at most, so that the process fits its host."""
    beside = beside_pools(job, cluster.per_host, cluster.processes)
    return max(0, cluster.host_memory - beside) // min(job.devices, cluster.per_host)


def describe_process(choice: Choice, cluster: Cluster) -> str:
    """The bytes of the process, of its host and of its pools, in one line."""
    here = min(choice.plan.devices, cluster.per_host)
    process, pools = process_bytes(choice, here, cluster.processes), here * pool_bytes(choice.plan)
    whole = "the whole process" if cluster.processes == 1 else f"the {cluster.processes} processes of a host"
    return (
        f"{whole}: about {process / GIB:.0f} of {cluster.host_memory / GIB:.0f} GiB of host memory: "
        f"{pools / GIB:.0f} in jax's pools, the rest Python, CUDA's libraries, the compiler, loading and saving"
    )


def host_outgrown(choice: Choice, cluster: Cluster) -> str:
    """Why the process does not fit its host, and a limit that would help; empty if it fits."""
    if process_bytes(choice, cluster.per_host, cluster.processes) <= cluster.host_memory:
        return ""
    pinned = most_pinned(cluster, choice.job) // GIB
    help = f". {environment.HOST_LIMIT}={pinned} in the environment leaves it room" if pinned else ""
    return f"the host has less memory than the run needs: {describe_process(choice, cluster)}{help}"
