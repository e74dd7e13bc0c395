"""The terms of which a plan's bytes and seconds are the sums, as text (--plan-only --explain)."""

from alst_jax.hardware.machines import GIB, Cluster
from alst_jax.planning.footprint import peak, states
from alst_jax.planning.job import Job, Term, total
from alst_jax.planning.plan import Plan
from alst_jax.planning.process import saving_bytes
from alst_jax.planning.seconds import ledger
from alst_jax.profile import DEVICE, HOST


def bytes_of(job: Job) -> dict[str, list[Term]]:
    """The cost model's ledgers of device and host memory."""
    profile, parts = job.profile, states(job)
    places = {DEVICE: [], HOST: []}
    for part, offloaded in (("weights", profile.offload_weights), ("gradients", profile.offload_weights),
                            ("optimizer", profile.offload_optimizer)):
        places[HOST if offloaded else DEVICE] += parts[part]
    moment, terms = peak(job)
    places[DEVICE] += [term._replace(where=f"{term.where}, at {moment}") for term in terms]
    places[DEVICE].append(Term("batch", 3 * 4 * job.tokens, "stack/batch"))
    kept = Term("kept activations", job.kept[HOST], "stack/stack")
    free = kept.value + total(parts["gradients"]) * profile.offload_weights
    places[HOST] += [kept, Term("saving", saving_bytes(job, free), "storage/saving")]
    return places


def explain(job: Job, cluster: Cluster | None, plan: Plan) -> str:
    """The ledgers of a plan. A compiled plan's bytes that the cost model does not know are a term of their own."""
    ledgers, lines = bytes_of(job), []
    for place, planned in ((DEVICE, plan.device_bytes), (HOST, plan.host_bytes)):
        terms = ledgers[place]
        rest = Term("not in the cost model", planned - total(terms), plan.source)
        lines += ["", f"GiB of {'one device' if place == DEVICE else 'host memory for it'}", *_rows([*terms, rest], GIB)]
    if cluster is not None:
        lines += ["", "seconds of a step", *_rows(ledger(job, cluster), 1)]
    return "\n".join(lines)


def _rows(terms: list[Term], unit: int | float) -> list[str]:
    row = lambda value, name, where="": f"{value / unit:12.3f}  {name:42}{where}".rstrip()
    return [*(row(*(term.value, term.name, term.where)) for term in terms if term.value), row(total(terms), "sum")]
