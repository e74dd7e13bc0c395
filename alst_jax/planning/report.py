"""Text about a plan: the report of --plan-only, the lines before a run and after it."""

import json
import statistics

import jax

from alst_jax.at_length.costs import documents
from alst_jax.config import TrainConfig, UserError
from alst_jax.hardware.machines import GIB, Cluster
from alst_jax.planning.estimate import ledger_of_bytes
from alst_jax.planning.footprint import peak
from alst_jax.planning.job import Job, Term, describe, describe_debug, total
from alst_jax.planning.plan import ESTIMATED, Choice, Plan
from alst_jax.planning.planner import Planner
from alst_jax.planning.process import describe_process, host_outgrown, process_bytes
from alst_jax.planning.seconds import collectives, forward_seconds, ledger, over_hosts
from alst_jax.profile import DEVICE
from alst_jax.xla.opaque import seconds_compiled

MEASURED_ERROR = (
    "estimated by arithmetic, without a compiler: its measured error is in "
    "benchmarks/results/2026-11-27-plan-accuracy.md; install the extra cuda12 or cuda13 to compile for "
    "these devices without having them"
)


def report(planner: Planner, job: Job) -> str:
    """The text that --plan-only and --find-max-seq-len print. Draws the picture if the flags ask for one."""
    config, cluster, longest = planner.config, planner.cluster, planner.config.find_max_seq_len
    quiet = (lambda text: None) if config.json else print
    if longest and cluster is None:
        raise UserError("--find-max-seq-len on a CPU: its memory limits are not known; name a machine with --plan-for")
    choice = planner.longest(job) if longest else planner.choose(job, quiet)
    job, plan, outgrown = choice.job, choice.plan, host_outgrown(choice, cluster) if cluster else ""
    if config.plan_picture:
        plan.picture(config.plan_picture)
    if config.json:
        found = json.loads(plan.to_json()) | {
            "flags": describe(job),
            "seq_len": job.length,
            "process_bytes": cluster and process_bytes(choice, cluster.per_host, cluster.processes),
            "host_memory": cluster and cluster.host_memory,
            "fits": not plan.lacks and not outgrown,
        }
        if longest:
            found["max_seq_len"] = job.length
        if config.eval_long is not None and cluster is not None:
            found["evaluation_seconds"] = forward_seconds(job, cluster, documents(config, job.length))
        return json.dumps(found)
    lines = []
    if longest:
        lines.append(f"longest sequence: {job.length:,} tokens, with {describe(job)}")
    if config.debug_attention_layers is not None:
        lines.append(describe_debug(job.model))
    lines.append(plan.table())
    if cluster is not None:
        lines.append(describe_process(choice, cluster))
        lines += [network(job, cluster)] if cluster.hosts > 1 else []
    if outgrown:
        lines.append(f"warning: {outgrown}")
    if config.eval_long is not None:
        lines.append(evaluation_line(config, job, cluster))
    if config.explain:
        lines.append(explain(job, cluster, plan))
    if plan.source == ESTIMATED:
        lines.append(MEASURED_ERROR)
    if cluster is not None and config.memory == "auto" and not longest:
        lines.append(choice.explain())
    return "\n".join(lines)


def network(job: Job, cluster: Cluster) -> str:
    """A line about the bytes that a device sends in a step: over hosts, and inside a host."""
    sent = {name: call["bytes"] for name, call in collectives(job).items()}
    outside = sum(size for name, size in sent.items() if over_hosts(name, job, cluster))
    seq = "goes over hosts" if over_hosts("all-to-all", job, cluster) else "inside of a host"
    return (
        f"collectives of a device in a step: {outside / GIB:.1f} GiB between hosts, "
        f"{(sum(sent.values()) - outside) / GIB:.1f} GiB inside of a host (seq {job.sp} {seq})"
    )


def evaluation_line(config: TrainConfig, job: Job, cluster: Cluster | None) -> str:
    """A line about the cost of --eval-long."""
    sizes = documents(config, job.length)
    tokens = sum(size * count for size, count in sizes.items())
    if cluster is None:
        cost = f"{tokens / job.length:.0f} sequences forward"
    else:
        cost = f"{forward_seconds(job, cluster, sizes):.1f} s ({tokens:,} tokens forward)"
    every = f", every {config.eval_every} steps" if config.eval_every else ""
    return f"evaluation at length: {cost} each, before the first step{every} and at the end"


def explain(job: Job, cluster: Cluster | None, plan: Plan) -> str:
    """The terms of which a plan's bytes and seconds are the sums. Bytes that only the compiler knows are one term."""
    lines = []
    for place, parts in ledger_of_bytes(job).items():
        terms = [term for part in parts.values() for term in part]
        planned = plan.device_bytes if place == DEVICE else plan.host_bytes
        rest = Term("not in the cost model", planned - total(terms), plan.source)
        where = f"one device, whose peak is at {peak(job)[0]}" if place == DEVICE else "host memory for it"
        lines += ["", f"GiB of {where}", *_rows([*terms, rest], GIB)]
    return "\n".join([*lines, "", "seconds of a step", *_rows(ledger(job, cluster), 1)] if cluster else lines)


def _rows(terms: list[Term], unit: int) -> list[str]:
    row = lambda value, name, where="": f"{value / unit:12.3f}  {name:42}{where}".rstrip()
    return [*(row(term.value, term.name, term.where) for term in terms if term.value), row(total(terms), "sum")]


def announce_plan(planner: Planner, choice: Choice, seconds: float) -> None:
    """Print a run's plan before it starts, in a few lines. UserError if the process would be larger than its host.

    seconds: how long the plan took, the compiler and the attention kernel's own compilation included.
    """
    if outgrown := host_outgrown(choice, planner.cluster):
        raise UserError(outgrown)
    kernels = f", {compiled:.0f} s of them to compile attention's kernels" if (compiled := seconds_compiled()) else ""
    print(f"plan    {choice.plan.line()}; made in {seconds:.0f} s{kernels}")
    print(f"        {describe_process(choice, planner.cluster)}")
    if planner.config.debug_attention_layers is not None:
        print(describe_debug(choice.job.model))
    if planner.config.eval_long is not None:
        print(f"        {evaluation_line(planner.config, choice.job, planner.cluster)}")
    if planner.config.memory == "auto":
        print(f"        {choice.explain()}", flush=True)


def planned_against_measured(choice: Choice, peak_gib: float, host_peak_gib: float, seconds: list[float]) -> str:
    """A run's plan beside its measured peaks (device and process, GiB) and the median of its steps' seconds.

    The first of several steps is left out: it compiles the programs that the plan has not compiled.
    """
    plan, later = choice.plan, seconds[1:] or seconds
    here = min(plan.devices, jax.local_device_count())  # plans are of one device, a process has several
    device, process = plan.device_bytes / GIB, process_bytes(choice, here) / GIB
    against = lambda measured, planned: f"{measured:.1f} measured ({measured / planned - 1:+.0%})"
    parts = [
        f"device {device:.1f} GiB planned, {against(peak_gib, device)}",
        f"host {plan.host_bytes * here / GIB:.1f} GiB planned, the whole process {process:.1f}, its peak "
        f"{against(host_peak_gib, process)}",
    ]
    if later and plan.step_seconds:
        median = statistics.median(later)
        parts.append(f"{plan.step_seconds:.1f} s a step planned, {against(median, plan.step_seconds)}")
    return "plan    " + "; ".join(parts)
