"""The cost model: a plan from arithmetic alone, in microseconds. Nothing is traced or compiled."""

from alst_jax.hardware.machines import Cluster
from alst_jax.planning.footprint import KEPT, STACK, peak, states
from alst_jax.planning.job import Job, Term, total
from alst_jax.planning.plan import ESTIMATED, Plan
from alst_jax.planning.process import saving_bytes
from alst_jax.planning.seconds import collectives, seconds
from alst_jax.profile import DEVICE, HOST


def estimate(job: Job, cluster: Cluster | None = None, correction: int = 0) -> Plan:
    """The plan of a job by the cost model. cluster: the devices' limits and speeds; None: a CPU, without either.
    correction: bytes that the compiler needed beyond the cost model, added to the working set."""
    places = {
        place: {part: total(terms) for part, terms in parts.items()} for place, parts in ledger_of_bytes(job).items()
    }
    places[DEVICE]["working set"] = max(0, places[DEVICE]["working set"] + correction)
    kind, limits, times = "cpu", (None, None), {}
    if cluster is not None:
        kind, limits = cluster.machine.kind, (cluster.machine.usable, cluster.host_share)
        times = seconds(job, cluster)
    memory = (places[DEVICE], places[HOST], *limits)
    return Plan(ESTIMATED, kind, *memory, job.flops, collectives(job), times, job.step_tokens, job.devices)


def ledger_of_bytes(job: Job) -> dict[str, dict[str, list[Term]]]:
    """The terms of each part of a plan, of device and host memory."""
    kept, alive = job.kept[DEVICE], peak(job)[1]
    freed = total([term for term in alive if term.name == KEPT]) - kept
    device = {"kept activations": [Term(KEPT, kept, STACK)]}
    device |= {part: terms for part, terms in states(job).items() if not job.profile.on_host(part)}
    device["working set"] = [
        *(term for term in alive if term.name != KEPT),
        Term("kept activations that are freed before", freed, STACK),
    ]
    device["batch"] = [Term("batch", 3 * 4 * job.tokens, "stack/batch")]
    return {DEVICE: device, HOST: host_ledger(job)}


def host_ledger(job: Job) -> dict[str, list[Term]]:
    """The terms of each part of a plan in host memory."""
    host = {"kept activations": [Term(KEPT, job.kept[HOST], STACK)]}
    host |= {part: terms for part, terms in states(job).items() if job.profile.on_host(part)}
    of_steps = job.kept[HOST] + total(host.get("gradients", []))  # not in use during a save
    return host | {"saving": [Term("saving", saving_bytes(job, of_steps), "storage/saving")]}
