"""Choosing a memory profile: the cost model proposes the fastest one that fits, and the compiler confirms it."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from alst_jax.config import UserError
from alst_jax.planning import footprint
from alst_jax.planning.candidates import PLACEMENTS, Search, bases, with_kept, with_levels, with_tiles
from alst_jax.planning.job import Job, total
from alst_jax.planning.plan import Choice, Plan, in_gib
from alst_jax.planning.seconds import spared_by_byte
from alst_jax.profile import LEVELS, Profile

KEPT_STEPS = 12  # numbers of layers, with outputs kept on the device, that are tried
LENGTH_STEP = 1024
ROUNDS = 5  # of choosing and compiling


def choose(job: Job, search: Search) -> Choice | None:
    """The fastest profile that fits by the cost model, or None. Fixed fields stay as the job has them."""
    best, layers = None, job.model.num_layers
    spread = sorted({round(i * layers / KEPT_STEPS) for i in range(KEPT_STEPS + 1)})
    for base in itertools.chain.from_iterable(bases(job, search, larger) for larger in (True, False)):
        if best and _fastest_possible(base, search) >= best.plan.step_seconds:
            continue
        best = _fastest(with_kept(base, search, spread), search, best)
    if best and job.profile.remat:  # a closer look around the best
        kept = best.job.profile.keep_attention_on_device
        near = range(max(0, kept - layers // KEPT_STEPS), min(layers, kept + layers // KEPT_STEPS) + 1)
        for tiled in dict.fromkeys(with_tiles(best.job, job.profile, search, larger) for larger in (True, False)):
            best = _fastest(with_kept(tiled, search, near), search, best)
    if best is None:
        return None
    larger = with_tiles(best.job, job.profile, search, larger=True).profile
    return dataclasses.replace(best, next_faster=_next_faster(best, search, larger))


def _fastest(candidates: Iterator[Job], search: Search, best: Choice | None) -> Choice | None:
    """The fastest of the candidates that fit and of the best so far."""
    for candidate in candidates:
        if search.lacks(candidate):
            continue
        job = with_levels(candidate, search, best.plan.step_seconds if best else math.inf)
        if best is None or search.plan(job).step_seconds < best.plan.step_seconds:
            best = Choice(job, search.plan(job))
    return best


def candidates(job: Job, search: Search) -> Iterator[Job]:
    """Profiles that need little memory, the smallest first, whatever their speed."""
    for base in reversed(list(bases(job, search, larger=False))):
        yield from with_kept(base, search, (0,), least=True)


def fits_somehow(job: Job, search: Search) -> Job | None:
    """Some profile that fits, fast or not; None if none does."""
    return next((found for found in candidates(job, search) if not search.lacks(found)), None)


def confirm(
    search: Search,
    propose: Callable[[Search], Choice | None],
    compile_plan: Callable[[Job], Plan],
    failed: str,
    say: Callable[[str], None] = lambda text: None,
) -> Choice | None:
    """`propose` until the compiler agrees that the choice fits; its excess over the estimate corrects the estimate.
    None if nothing is proposed at first; UserError, `failed`, if nothing is left."""
    compiled = None
    for _ in range(ROUNDS):
        choice = propose(search)
        if choice is None:
            break
        compiled = compile_plan(choice.job)
        if not compiled.lacks:
            return dataclasses.replace(choice, plan=compiled)
        search, more = search.corrected(choice.job.profile, choice.plan, compiled)
        say(f"the compiled step needs {in_gib(more, '+')} against the estimate: choosing again")
    if compiled is None:
        return None
    raise UserError(failed)


def length_step(job: Job) -> int:
    """The search tries multiples of this length, which the sequence-parallel degree divides."""
    return math.lcm(LENGTH_STEP, job.sp)


def longest(job: Job, search: Search, most: int) -> int:
    """The longest sequence, a multiple of `length_step` up to `most`, for which some profile fits; 0 if none does."""
    step = length_step(job)
    too_long = lambda n: fits_somehow(dataclasses.replace(job, length=n * step), search) is None
    return step * bisect.bisect_left(range(1, most // step + 1), True, key=too_long)


def _fastest_possible(job: Job, search: Search) -> float:
    """Seconds with all attention outputs kept and no input rebuilt, unless the user has fixed less."""
    profile, fixed, changes = job.profile, search.fixed, {}
    if not profile.remat:
        return search.plan(job).step_seconds
    if not {"keep_attention_on_device", "keep_attention_on_host"} & fixed:
        changes = dict(keep_attention_on_device=job.model.num_layers, keep_attention_on_host=0)
    if "segment_layers" not in fixed:
        changes["segment_layers"] = (1,)
    seconds = search.plan(job.changed(**changes)).step_seconds
    if LEVELS.keys() - fixed:
        room = search.cluster.machine.usable - footprint.states_on_device(job) - total(footprint.layer_work(job))
        seconds -= max(0, room) * spared_by_byte(job, search.cluster)
    return seconds


def _next_faster(best: Choice, search: Search, larger: Profile) -> tuple[Job, Plan, dict[str, int]] | None:
    """The slowest choice one change away that is faster and does not fit. larger: the profile with larger tiles."""
    profile, layers = best.job.profile, best.job.model.num_layers
    kept = profile.keep_attention_on_device + profile.keep_attention_on_host
    changes = [{name: False, "share_gradients": False} for name in PLACEMENTS if getattr(profile, name)]
    changes += [{"mlp_tile": larger.mlp_tile, "loss_tile": larger.loss_tile}, {"segment_layers": (1,)}]
    more = ["keep_attention_on_device", "keep_attention_on_host"] if profile.remat and kept < layers else []
    more += [name for name, of in LEVELS.items() if getattr(profile, name) < getattr(profile, of)]
    changes += [{name: getattr(profile, name) + 1} for name in more]
    stays = lambda name, value: name not in search.fixed or value == getattr(profile, name)
    jobs = [best.job.changed(**change) for change in changes if all(map(stays, change.keys(), change.values()))]
    found = [(job, search.plan(job), search.lacks(job)) for job in jobs]
    faster = [item for item in found if item[1].step_seconds < best.plan.step_seconds and item[2]]
    return max(faster, key=lambda item: item[1].step_seconds, default=None)
