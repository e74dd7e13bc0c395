"""The cost model: a plan from arithmetic alone, in microseconds. Nothing is traced or compiled."""

from alst_jax.hardware.machines import Cluster
from alst_jax.planning.footprint import state_bytes, working_set
from alst_jax.planning.job import Job
from alst_jax.planning.plan import ESTIMATED, Plan
from alst_jax.planning.process import saving_bytes
from alst_jax.planning.seconds import collectives, seconds
from alst_jax.profile import DEVICE, HOST


def estimate(job: Job, cluster: Cluster | None = None, correction: int = 0) -> Plan:
    """The plan of a job by the cost model. cluster: the devices' limits and speeds; None: a CPU, without either.

    correction: bytes that the compiler needed beyond the cost model, added to the working set.
    """
    weights, gradients, optimizer = state_bytes(job)
    kept, profile = job.kept, job.profile
    places = {DEVICE: {}, HOST: {}}
    on = lambda offloaded: places[HOST if offloaded else DEVICE]
    on(profile.offload_weights)["weights"] = weights
    on(profile.offload_weights)["gradients"] = gradients
    on(profile.offload_optimizer)["optimizer"] = optimizer
    places[DEVICE]["kept activations"] = kept[DEVICE]
    places[HOST]["kept activations"] = kept[HOST]
    places[HOST]["saving"] = saving_bytes(job, kept[HOST] + places[HOST].get("gradients", 0))
    places[DEVICE]["working set"] = max(0, working_set(job) + correction - kept[DEVICE])
    places[DEVICE]["batch"] = 3 * 4 * job.tokens
    return Plan(
        ESTIMATED, cluster.machine.kind if cluster else "cpu", places[DEVICE], places[HOST],
        cluster and cluster.machine.usable, cluster and cluster.host_share, job.flops, collectives(job),
        seconds(job, cluster) if cluster else {}, job.grad_accum * job.rows * job.length, job.devices)
