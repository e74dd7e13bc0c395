"""The planner of one command line: which machine, which profile, does it fit; and why not."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

from alst_jax.config import TrainConfig, UserError, chosen_fields
from alst_jax.hardware.environment import has_cuda_compiler
from alst_jax.hardware.machines import Cluster
from alst_jax.ops.attention.cudnn import CUDNN_MAX_HEAD_DIM
from alst_jax.ops.rope import MAX_POSITION
from alst_jax.parallel.costs import why_not
from alst_jax.planning import search as auto
from alst_jax.planning.candidates import CONFIRMED, UNCONFIRMED, Search
from alst_jax.planning.compiled import plan_step
from alst_jax.planning.estimate import estimate
from alst_jax.planning.job import Job
from alst_jax.planning.plan import Choice, Plan, in_gib
from alst_jax.profile import BY_HAND
from alst_jax.stack.check import check_effect, check_profile
from alst_jax.step import TrainStep

ANY_LENGTH = 1024  # the length of a job whose length is searched


def with_attention(job: Job, layers: int | None) -> Job:
    """The job with attention in so many layers; None: in all."""
    return dataclasses.replace(job, model=dataclasses.replace(job.model, attention_layers=layers))


def compiles_for_absent(job: Job) -> bool:
    """Whether a job can be compiled for GPUs that are not here: in place of flash cuDNN is, for heads that it has."""
    return not job.profile.attention.startswith("flash") or job.model.head_dim <= CUDNN_MAX_HEAD_DIM


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans of one command line, for the devices of this process or for the machine that it names.

    cluster: that machine; None where limits and speeds are unknown (CPU). compiles: whether its compiler is installed.
    make_step: builds the step of a job. cached: the last step made; a run goes on with its plan's compiled programs.
    """

    config: TrainConfig
    cluster: Cluster | None
    compiles: bool
    make_step: Callable[[Job], TrainStep]
    cached: dict[Job, TrainStep] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def of(
        config: TrainConfig, cluster: Cluster | None, make_step: Callable[[Job], TrainStep], job: Job | None = None
    ) -> "Planner":
        """job: the one to plan, whose attention may have no program for absent GPUs."""
        compiles = not config.plan_for or (has_cuda_compiler() and (job is None or compiles_for_absent(job)))
        return Planner(config, cluster, compiles, make_step)

    @property
    def search(self) -> Search:
        """The choices that --memory auto has; with manual, none."""
        config, margin = self.config, CONFIRMED if self.compiles else UNCONFIRMED
        fixed = {*config.typed, *(BY_HAND if config.stack == "plain" else ())}  # the plain stack has no others
        chosen = frozenset(name for name in chosen_fields() if config.memory == "manual" or name in fixed)
        return Search(self.cluster, chosen, config.allow_narrow_optimizer, margin)

    def step(self, job: Job) -> TrainStep:
        """The step of a job; the cached one if it was made for the same job."""
        if job not in self.cached:
            self.cached.clear()  # first: its compiled programs are no longer needed
            self.cached[job] = self.make_step(job)
        return self.cached[job]

    def compile(self, job: Job) -> Plan:
        """The plan of a job by the compiler, or without one by the cost model."""
        if not self.compiles:
            return self.search.plan(job)
        own, plan = estimate(job, self.cluster), self._plan(self._of_same_bytes(job), with_attention(job, None))
        if job.model.attention_layers is not None and not self.config.planning:
            self._plan(job, job)  # a debug run's own programs: its first step compiles nothing either
        return dataclasses.replace(plan, seconds=own.seconds, flops=own.flops, tokens=own.tokens)

    def _plan(self, job: Job, asked: Job) -> Plan:
        return plan_step(self.step(job), job, self.cluster, self.config.planning, asked)

    def _of_same_bytes(self, job: Job) -> Job:
        """The job whose program is compiled for the bytes of this one: its own, if there is no reason against it."""
        job = with_attention(job, None)  # a debug run measures the bytes of the whole run
        if not self.config.plan_for or job.profile.attention not in ("flash", "flash-deterministic"):
            return job
        # Its kernel compiles for this process's device only; cuDNN's forward pass needs the same bytes exactly, without
        # the windows, soft caps and documents that it does not implement.
        kinds = tuple(dataclasses.replace(kind, window=None) for kind in job.model.layer_kinds)
        model = dataclasses.replace(job.model, layer_kinds=kinds, attention_soft_cap=None)
        return dataclasses.replace(job.changed(attention="cudnn"), model=model, documents=0)

    def choose(self, job: Job, say: Callable[[str], None] = print) -> Choice:
        """The job with the profile that --memory says, and its plan. UserError if it cannot fit, or has a flag without
        effect."""
        choice = self._choose(job, say)
        check_effect(choice.job.profile, choice.job.shared_inputs, choice.job.reads_ahead)
        return choice

    def _choose(self, job: Job, say: Callable[[str], None]) -> Choice:
        check_profile(job.profile, job.model, job.sp)
        if self.cluster is None:
            return Choice(job, self.compile(job))
        if job.model.attention_layers is not None:  # a debug run has the profile of the whole run
            chosen = self.choose(with_attention(job, None), say).job
            debug = with_attention(chosen, job.model.attention_layers)
            return Choice(debug, self.compile(debug))
        if self.config.memory == "manual":
            choice = Choice(job, self.compile(job))
            if choice.plan.missing(0.0 if self.compiles else -UNCONFIRMED):  # less than the model's error is shown only
                raise UserError(self.too_large(job, choice.plan.lacks))
            return choice
        choice = auto.confirm(
            self.search,
            functools.partial(auto.choose, job),
            self.compile,
            f"--memory auto: by the compiler, no profile was found that fits {self.cluster}; "
            "use a shorter --seq-len, a larger --sp, or choose by hand with --memory manual",
            say,
        )
        if choice is None:
            raise UserError(self.too_large(job, _least_missing(job, self.search)))
        return choice

    def longest(self, job: Job) -> Choice:
        """The job at the longest length that fits, with its plan. UserError if none does."""
        check_profile(job.profile, job.model, job.sp)
        most = min(MAX_POSITION, 2**31 // job.model.head_dim)

        def propose(search: Search) -> Choice:
            if not (length := auto.longest(job, search, most)):
                raise UserError(self.never_fits(job, search))
            found = auto.fits_somehow(dataclasses.replace(job, length=length), search)
            return Choice(found, search.plan(found))

        return auto.confirm(
            self.search,
            propose,
            self.compile,
            "--find-max-seq-len: the compiler and the cost model did not agree on any length; plan one "
            "length at a time with --plan-only --seq-len",
        )

    def too_large(self, job: Job, missing: dict[str, int]) -> str:
        """Why a job does not fit, the longest length that does, and the flags that would help."""
        search = self.search
        if not (longest := auto.longest(job, search, job.length - 1)):
            return self.never_fits(job, search)
        return (
            f"--seq-len {job.length}: does not fit {self.cluster}: {in_gib(missing)} missing. The longest that "
            f"fits with these flags is about {longest}" + _help(job, search)
        )

    def never_fits(self, job: Job, search: Search) -> str:
        """Why a model does not fit at any length."""
        short = dataclasses.replace(job, length=auto.length_step(job))
        least = in_gib(_least_missing(short, search))
        return (
            f"the model ({job.parameters.total / 1e9:.1f} billion parameters) does not fit {self.cluster} at any "
            f"length: at {short.length} tokens {least} missing{_help(short, search)}"
        )


def _least_missing(job: Job, search: Search) -> dict[str, int]:
    found = map(search.lacks, auto.candidates(job, search))
    return min(found, key=lambda missing: sum(missing.values()))


def _help(job: Job, search: Search) -> str:
    """The changes that would make the job fit, as the end of a message."""
    wider, model, found = dataclasses.replace(search, fixed=frozenset(), narrow=False), job.model, []
    if cure := _switches_that_cost(job, search):
        found.append(f"without {cure}")
    elif search.fixed and (cure := _switches_that_cost(job, wider)):
        found.append(f"without {cure}, and the other memory flags left to --memory auto")
    if search.fixed and auto.fits_somehow(job, wider):
        found.append("leave the memory flags to --memory auto")
    if not search.narrow and auto.fits_somehow(job, dataclasses.replace(wider, narrow=True)):
        found.append("--allow-narrow-optimizer (or --optimizer-states int8 --master-weights none)")
    if job.devices > job.sp and why_not(model.num_heads, model.num_kv_heads, job.devices, 1) is None:
        found.append(f"--sp {job.devices}")
    return f". What would help: {'; '.join(found) or 'more devices (--sp) or host memory'}"


def _switches_that_cost(job: Job, search: Search) -> str | None:
    """The fewest flags that switch features off, without which the job fits; None if it never fits, or with all."""
    profile, usual = job.profile, {"remat": True, "loss_tile": 0, "mlp_tile": 0}
    off = [(name, on) for name, on in usual.items() if getattr(profile, name) != on and not getattr(profile, name)]
    for count in range(1, len(off) + 1):
        for some in itertools.combinations(off, count):
            without = job.changed(**dict(some))
            if auto.fits_somehow(without, search):
                return " and ".join(sorted(profile.flags(than=without.profile)))
    return None
