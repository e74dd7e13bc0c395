"""The cost model: a plan from arithmetic alone, in microseconds. Nothing is traced or compiled."""

from alst_jax.hardware.machines import Cluster
from alst_jax.planning.footprint import KEPT, peak, states
from alst_jax.planning.job import Job, Term, total
from alst_jax.planning.plan import ESTIMATED, Plan
from alst_jax.planning.process import saving_bytes
from alst_jax.planning.seconds import collectives, seconds
from alst_jax.profile import DEVICE, HOST


def estimate(job: Job, cluster: Cluster | None = None, correction: int = 0) -> Plan:
    """The plan of a job by the cost model. cluster: the devices' limits and speeds; None: a CPU, without either.

    correction: bytes that the compiler needed beyond the cost model, added to the working set.
    """
    places = {place: {part: total(terms) for part, terms in parts.items()}
              for place, parts in ledger_of_bytes(job).items()}
    places[DEVICE]["working set"] = max(0, places[DEVICE]["working set"] + correction)
    return Plan(
        ESTIMATED, cluster.machine.kind if cluster else "cpu", places[DEVICE], places[HOST],
        cluster and cluster.machine.usable, cluster and cluster.host_share, job.flops, collectives(job),
        seconds(job, cluster) if cluster else {}, job.grad_accum * job.rows * job.length, job.devices)


def ledger_of_bytes(job: Job) -> dict[str, dict[str, list[Term]]]:
    """The terms of each part of a plan, of device and host memory."""
    kept, profile, of_states, alive = job.kept, job.profile, states(job), peak(job)[1]
    places = {place: {"kept activations": [Term(KEPT, kept[place], "stack/stack")]} for place in (DEVICE, HOST)}
    for part, terms in of_states.items():
        offloaded = profile.offload_optimizer if part == "optimizer" else profile.offload_weights
        places[HOST if offloaded else DEVICE][part] = terms
    freed = total([term for term in alive if term.name == KEPT]) - kept[DEVICE]
    others = [term for term in alive if term.name != KEPT]
    places[DEVICE]["working set"] = [*others, Term("kept activations that are freed before", freed, "stack/stack")]
    places[DEVICE]["batch"] = [Term("batch", 3 * 4 * job.tokens, "stack/batch")]
    in_step = kept[HOST] + total(of_states["gradients"]) * profile.offload_weights
    places[HOST]["saving"] = [Term("saving", saving_bytes(job, in_step), "storage/saving")]
    return places
