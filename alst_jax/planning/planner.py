"""From flags to a plan: which machine, which profile, does it fit; what to say before a run and after it."""

import dataclasses
import functools
import itertools
import json
import math
import operator
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

from alst_jax.config import TrainConfig, UserError
from alst_jax.hardware import environment
from alst_jax.hardware.environment import has_cuda_compiler
from alst_jax.hardware.machines import GIB, LARGEST_HOST, Cluster, parse_cluster
from alst_jax.ops.rope import MAX_POSITION
from alst_jax.optim.adamw import AdamW
from alst_jax.parallel.mesh import make_mesh
from alst_jax.planning import search as auto
from alst_jax.planning.compiled import absent_devices, plan_step, this_cluster
from alst_jax.planning.footprint import Job
from alst_jax.planning.plan import ESTIMATED, Plan
from alst_jax.planning.saving_memory import largest_parameter
from alst_jax.planning.search import Choice, Search
from alst_jax.planning.words import PLACEMENTS, describe
from alst_jax.step import TrainStep, check_profile
from alst_jax.storage import saving
from alst_jax.xla import host

POOL_SLACK, POOL_MATTERS = 2, 16  # GiB
# What a process holds beside pinned memory and a save's writers: Python, CUDA's libraries, the compiler; and more for each
# device after the first. Fitted to seven processes that were measured (benchmarks/results/2026-11-27-h100.md).
PROCESS, PROCESS_DEVICE = 4 * GIB, 3 * GIB
ANY_LENGTH = 1024  # where the length is what is looked for
MEASURED_ERROR = ("estimated by arithmetic, without a compiler: its measured error is in "
                  "benchmarks/results/2026-11-27-plan-accuracy.md; install the extra cuda12 or cuda13 to compile for "
                  "these devices without having them")


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans of one command line: for the devices at hand, or for the machine it names.

    cluster: that machine; None where no limits and speeds are known (CPU). compiles: whether a compiler for it is here.
    last: the step of the last job that one was made for; a run goes on with what was compiled for its plan.
    """

    config: TrainConfig
    cluster: Cluster | None
    compiles: bool
    dtype: jnp.dtype
    last: dict[Job, TrainStep] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def of(config: TrainConfig, cluster: Cluster | None, dtype: jnp.dtype) -> "Planner":
        return Planner(config, cluster, not config.plan_for or has_cuda_compiler(), dtype)

    @property
    def search(self) -> Search:
        """What --memory auto may choose; with manual, nothing."""
        profile_fields = {"segment_layers", "keep_attention_on_device", "keep_attention_on_host", "head_chunks",
                          "optimizer_states", "master_weights", "loss_tile", "mlp_tile", *PLACEMENTS}
        fixed = profile_fields if self.config.memory == "manual" else profile_fields & set(self.config.typed)
        return Search(self.cluster, frozenset(fixed), self.config.allow_narrow_optimizer,
                      auto.CONFIRMED if self.compiles else auto.UNCONFIRMED)

    def step(self, job: Job) -> TrainStep:
        """The step of a job, on the devices at hand or on those it is planned for; the same if it was the last."""
        if job not in self.last:
            self.last.clear()  # first: what was compiled for it is no longer needed
            self.last[job] = self._make_step(job)
        return self.last[job]

    def _make_step(self, job: Job) -> TrainStep:
        config = self.config
        optimizer = AdamW(config.beta1, config.beta2, config.eps, config.weight_decay, config.clip_norm,
                          job.states, job.master, config.seed)
        devices = absent_devices(self.cluster) if config.plan_for else None
        return TrainStep(job.model, make_mesh(job.dp, job.sp, devices), job.profile, optimizer, self.dtype)

    def compile(self, job: Job) -> Plan:
        """The plan of a job by the compiler, or by the cost model where there is none."""
        if not self.compiles:
            return self.search.plan(job)
        if self.config.plan_for and job.profile.attention == "tokamax":
            # Its kernel is made for the device at hand only; what cuDNN's forward needs is the same to the byte.
            as_cudnn = dataclasses.replace(job, profile=dataclasses.replace(job.profile, attention="cudnn"))
            return dataclasses.replace(self.compile(as_cudnn), seconds=self.search.plan(job).seconds)
        return plan_step(self.step(job), job.rows, job.length, job.grad_accum, self.cluster, at_once=self.config.planning)

    def choose(self, job: Job, say: Callable[[str], None] = print) -> Choice:
        """The job with the profile that --memory says, and its plan. UserError if it cannot fit."""
        check_profile(job.profile, job.model, job.sp)
        if self.cluster is None:
            return Choice(job, self.compile(job))
        search = self.search
        if self.config.memory == "manual":
            choice = Choice(job, self.compile(job))
            # What an estimate misses by less than its error is shown, not refused.
            error, plan = 0.0 if self.compiles else auto.UNCONFIRMED, choice.plan
            limits = {"device": plan.device_limit, "host": plan.host_limit}
            if any(missing > error * limits[place] for place, missing in plan.lacks.items()):
                raise UserError(self.too_large(job, choice.plan))
            return choice
        if self.compiles and auto.fits_somehow(job, search) is not None:
            return auto.confirm(job, search, self.compile, say)
        choice = None if self.compiles else auto.choose(job, search)
        if choice is None:
            raise UserError(self.too_large(job, search.plan(job)))
        return choice

    def longest(self, job: Job) -> Choice:
        """The job at the longest length that fits, with its plan. UserError if none does."""
        search, most = self.search, min(MAX_POSITION, 2**31 // job.model.head_dim)
        check_profile(job.profile, job.model, job.sp)
        for _ in range(auto.ROUNDS):
            length = auto.longest(job, search, most)
            if not length:
                raise UserError(self.never_fits(job, search))
            found = auto.fits_somehow(dataclasses.replace(job, length=length), search)
            plan = self.compile(found)
            if not plan.lacks:
                return Choice(found, plan)
            search, _ = search.corrected(found.profile, search.plan(found), plan)
        raise UserError("--find-max-seq-len: the compiler and the cost model did not agree on any length; plan one "
                        "length at a time with --plan-only --seq-len")

    # ------------------------------------------------------------------------------------------------------- refusals

    def too_large(self, job: Job, plan: Plan) -> str:
        """Why a job does not fit, the longest length that does, and the flags that would help."""
        search = self.search
        missing = plan.lacks or search.missing(plan)
        if self.config.memory == "auto":
            missing = self._least_missing(job, search)
        longest = auto.longest(job, search, job.length - 1)
        if not longest:
            return self.never_fits(job, search)
        return (f"--seq-len {job.length}: does not fit {self.cluster}: {_lacks(missing)} missing. The longest that "
                f"fits with these flags is about {longest}" + self._help(job, search))

    def never_fits(self, job: Job, search: Search) -> str:
        """Why a model does not fit at any length."""
        short = dataclasses.replace(job, length=auto.length_step(job))
        least = self._least_missing(short, search)
        return (f"the model ({job.model.num_params / 1e9:.1f} billion parameters) does not fit {self.cluster} at any "
                f"length: at {short.length} tokens {_lacks(least)} missing" + self._help(short, search))

    def _least_missing(self, job: Job, search: Search) -> dict[str, int]:
        found = (search.missing(search.plan(candidate)) for candidate in auto.candidates(job, search))
        return min(found, key=lambda missing: sum(missing.values()))

    def _help(self, job: Job, search: Search) -> str:
        wider = dataclasses.replace(search, fixed=frozenset(), narrow=False)
        found = []
        if cure := _switches_that_cost(job, search):
            found.append(f"without {cure}")
        elif search.fixed and (cure := _switches_that_cost(job, wider)):
            found.append(f"without {cure}, and the other memory flags left to --memory auto")
        if search.fixed and auto.fits_somehow(job, wider):
            found.append("leave the memory flags to --memory auto")
        if not search.narrow and auto.fits_somehow(job, dataclasses.replace(wider, narrow=True)):
            found.append("--allow-narrow-optimizer (or --optimizer-states int8 --master-weights none)")
        if job.devices > job.sp and job.model.num_heads % job.devices == 0:
            found.append(f"--sp {job.devices}")
        return f". What would help: {'; '.join(found) or 'more devices (--sp) or host memory'}"


def _switches_that_cost(job: Job, search: Search) -> str | None:
    """The fewest of the flags that switch a feature off without which the job fits, in words; None if it never does, or
    does with all of them."""
    profile = job.profile
    off = [(name, change) for name, is_off, change in (
        ("--no-remat", not profile.remat, {"remat": True}),
        ("--no-tiled-loss", profile.loss_tile is None, {"loss_tile": 0}),
        ("--no-tiled-mlp", profile.mlp_tile is None, {"mlp_tile": 0})) if is_off]
    for some in (some for n in range(1, len(off) + 1) for some in itertools.combinations(off, n)):
        changes = functools.reduce(operator.or_, (change for _, change in some))
        changed = dataclasses.replace(job, profile=dataclasses.replace(profile, **changes))
        if auto.fits_somehow(changed, search):
            return " and ".join(name for name, _ in some)
    return None


def _lacks(missing: dict[str, int]) -> str:
    return " and ".join(f"{value / GIB:.1f} GiB of {place} memory" for place, value in missing.items())


# ------------------------------------------------------------------------------------------------------------ the story


def target(config: TrainConfig) -> Cluster | None:
    """The machine that a command line plans for, or that it is on; None on a CPU. UserError for --host-memory there."""
    if config.plan_for:
        return dataclasses.replace(parse_cluster(config.plan_for, config.host_memory), used=config.devices)
    cluster = this_cluster(config.host_memory, config.devices)
    if cluster is None and config.host_memory is not None:
        raise UserError(f"--host-memory {config.host_memory:g}: limits what GPUs may keep in host memory, and jax sees "
                        "no GPU; leave it out, or name a machine with --plan-for")
    return cluster


def report(planner: Planner, job: Job) -> str:
    """What --plan-only and --find-max-seq-len print; draws the picture, if one was asked for."""
    config = planner.config
    quiet = (lambda text: None) if config.json else print
    if config.find_max_seq_len and planner.cluster is None:
        raise UserError("--find-max-seq-len on a CPU: nobody knows its limits; name a machine with --plan-for")
    choice = planner.longest(job) if config.find_max_seq_len else planner.choose(job, quiet)
    plan = choice.plan
    if config.plan_picture:
        plan.picture(config.plan_picture)
    process = planner.cluster and process_bytes(choice, planner.cluster.per_host)
    if config.json:
        found = {"max_seq_len": choice.job.length} if config.find_max_seq_len else {}
        host_memory = planner.cluster and planner.cluster.host_memory
        fits = not plan.lacks and not (planner.cluster and host_outgrown(choice, planner.cluster))
        return json.dumps(json.loads(plan.to_json()) | {"flags": describe(choice.job), "seq_len": choice.job.length,
            "process_bytes": process, "host_memory": host_memory, "fits": fits} | found)
    lines = [plan.table()]
    if planner.cluster is not None:
        lines.append(describe_process(choice, planner.cluster))
        if outgrown := host_outgrown(choice, planner.cluster):
            lines.append(f"warning: {outgrown}")
    if config.find_max_seq_len:
        lines.insert(0, f"longest sequence: {choice.job.length:,} tokens, with {describe(choice.job)}")
    if plan.source == ESTIMATED:
        lines.append(MEASURED_ERROR)
    if planner.cluster is not None and config.memory == "auto" and not config.find_max_seq_len:
        lines.append(dataclasses.replace(choice, plan=plan).explain())
    return "\n".join(lines)


def announce(planner: Planner, choice: Choice) -> None:
    """Before a run: its plan, in a few lines. UserError if the process would be larger than its host."""
    if outgrown := host_outgrown(choice, planner.cluster):
        raise UserError(outgrown)
    print(f"plan    {choice.plan.line()}\n        {describe_process(choice, planner.cluster)}")
    if planner.config.memory == "auto":
        print(f"        {choice.explain()}", flush=True)


def make_host_pool(plan: Plan) -> None:
    """Pin the host memory of a plan in one piece a device (see `host.reserve`), if it is of a size that matters: with some
    slack, but no more than jax may pin. UserError if the host refuses."""
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


def pinned_gibibytes(plan: Plan) -> int:
    """GiB that a device needs in pinned memory: all but its part of what writers of a save hold."""
    return max(0, -(-(plan.host_bytes - saving.BUFFERS // min(plan.devices, LARGEST_HOST)) // GIB))


def pool_bytes(plan: Plan) -> int:
    """Of jax's pool of pinned memory for one device: the next power of two, or what jax may pin if that is less; of a plan
    for which none is made before (`make_host_pool`) what is needed, at least: such a pool grows as it goes."""
    need = pinned_gibibytes(plan)
    if need < POOL_MATTERS:
        return need * GIB
    pool = 2 ** math.ceil(math.log2(need + POOL_SLACK)) * GIB
    return pool if plan.host_limit is None else max(need * GIB, min(pool, plan.host_limit))


def staging_bytes(job: Job) -> int:
    """Of the pinned memory, beside the pools, through which arrays seem to go to and fro: a device's part of the largest, in
    a piece that is a power of two (4.0 GiB came within two seconds when an 8B model was loaded; docs/log.md). Once for all
    devices, for one part is loaded after another."""
    largest = largest_parameter(job.model) * job.width // job.devices
    return 2 ** math.ceil(math.log2(largest))


def beside_pools(job: Job, per_host: int) -> int:
    """Host memory of a process beside its pools, on hosts with so many devices."""
    return staging_bytes(job) + saving.BUFFERS + PROCESS + (min(job.devices, per_host) - 1) * PROCESS_DEVICE


def process_bytes(choice: Choice, per_host: int) -> int:
    """Host memory of a whole process, on hosts with so many devices."""
    return min(choice.plan.devices, per_host) * pool_bytes(choice.plan) + beside_pools(choice.job, per_host)


def with_room(cluster: Cluster | None, job: Job) -> Cluster | None:
    """The cluster, on which jax pins no more than a process of this job leaves it; where the limit is set already, as it is."""
    if cluster is None or cluster.pinned is not None:
        return cluster
    return dataclasses.replace(cluster, pinned=min(cluster.host_share, most_pinned(cluster, job)))


def most_pinned(cluster: Cluster, job: Job) -> int:
    """Bytes of a device's pool at most, so that the process fits its host."""
    return max(0, cluster.host_memory - beside_pools(job, cluster.per_host)) // min(job.devices, cluster.per_host)


def describe_process(choice: Choice, cluster: Cluster) -> str:
    """process_bytes, what they are of, and how many there are."""
    here = min(choice.plan.devices, cluster.per_host)
    process, pools = process_bytes(choice, here), here * pool_bytes(choice.plan)
    return (f"the whole process: about {process / GIB:.0f} of {cluster.host_memory / GIB:.0f} GiB of host memory: "
            f"{pools / GIB:.0f} in jax's pools, the rest Python, CUDA's libraries, the compiler, loading and saving")


def host_outgrown(choice: Choice, cluster: Cluster) -> str:
    """Why the process does not fit its host, and what would help; nothing if it does."""
    if process_bytes(choice, cluster.per_host) <= cluster.host_memory:
        return ""
    pinned = most_pinned(cluster, choice.job) // GIB
    help = f". {environment.HOST_LIMIT}={pinned} in the environment leaves it room" if pinned else ""
    return f"more than there is: {describe_process(choice, cluster)}{help}"


def planned_against_measured(choice: Choice, peak_gib: float, host_peak_gib: float, seconds: list[float]) -> str:
    """After a run: peaks of the device and of the process in GiB and the median of its steps' seconds, beside the plan.
    The first step is left out where there are others: what a plan has not compiled is compiled in it."""
    later = seconds[1:] or seconds
    plan = choice.plan
    here = min(plan.devices, jax.local_device_count())  # plans are of one device, a process has several
    expected = process_bytes(choice, here)
    parts = [f"device {plan.device_bytes / GIB:.1f} GiB planned, {peak_gib:.1f} measured ({_percent(peak_gib * GIB,
        plan.device_bytes)})",
             f"host {plan.host_bytes * here / GIB:.1f} GiB planned, the whole process {expected / GIB:.1f}, its peak "
             f"{host_peak_gib:.1f} measured ({_percent(host_peak_gib * GIB, expected)})"]
    if later and plan.step_seconds:
        measured = statistics.median(later)
        parts.append(f"{plan.step_seconds:.1f} s a step planned, {measured:.1f} measured ({_percent(measured,
            plan.step_seconds)})")
    return "plan    " + "; ".join(parts)


def _percent(measured: float, planned: float | int) -> str:
    return f"{(measured / planned - 1) * 100:+.0f}%"
