"""Choosing a memory profile: the fastest, by the cost model, of those that fit; the compiler has the last word."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

from alst_jax.config import UserError
from alst_jax.hardware.machines import GIB, Cluster
from alst_jax.ops.cross_entropy import default_tile
from alst_jax.planning import footprint as cost
from alst_jax.planning.footprint import Job
from alst_jax.planning.plan import Plan
from alst_jax.planning.saving_memory import saving_bytes
from alst_jax.planning.words import PLACEMENTS, describe, describe_changes
from alst_jax.profile import HOST, Profile

UNCONFIRMED = 0.05  # of the memory, left free where no compiler confirms: the model's error (plan_accuracy.py)
CONFIRMED = 0.01
MOST_CHUNKS = 8
BUDGETS = (0.0, 0.25, 0.5, 1.0)  # parts of the free device memory that rebuilding a segment may take
KEPT_STEPS = 12  # numbers of layers that are tried for what is kept on the device
NARROWER = (("bfloat16", "float32"), ("int8", "float32"), ("int8", "none"))  # moments, master
LARGER_TILES = 4  # times the usual: fewer sums of weight gradients, where there is room
EARLY_LOADS = 4  # layers whose weights come from the host before they are needed, for which segments leave room
LENGTH_STEP = 1024
ROUNDS = 5  # of choosing and compiling
UNUSUAL = 0.1  # of the device: an error of the model so large is that of one kind of profile, not of all


@dataclasses.dataclass(frozen=True)
class Search:
    """What may be chosen, and what it has to fit.

    fixed: fields of the profile that the user has typed. narrow: whether the optimizer's formats may be chosen too.
    margin: part of each memory to leave free. corrections: bytes of device and host that the compiler was seen to need
    more; of_kinds: of the device, for profiles of one kind.
    """

    cluster: Cluster
    fixed: frozenset[str] = frozenset()
    narrow: bool = False
    margin: float = UNCONFIRMED
    device_correction: int = 0
    host_correction: int = 0
    of_kinds: tuple[tuple[tuple[int, int], int], ...] = ()

    def plan(self, job: Job) -> Plan:
        return cost.estimate(job, self.cluster, self.correction(kind_of(job.profile)))

    def correction(self, kind: tuple[int, int]) -> int:
        """Of the device, for profiles of a kind."""
        return self.device_correction + dict(self.of_kinds).get(kind, 0)

    def missing(self, plan: Plan) -> dict[str, int]:
        """Bytes that a plan lacks of "device" and "host" memory, what is to be left free included."""
        spare = {
            "device": int(plan.device_limit * (1 - self.margin)) - plan.device_bytes,
            "host": int(plan.host_limit * (1 - self.margin)) - plan.host_bytes - self.host_correction}
        return {place: -bytes for place, bytes in spare.items() if bytes < 0}

    def corrected(self, profile: Profile, estimated: Plan, compiled: Plan) -> tuple["Search", dict[str, int]]:
        """With what the compiler says of a profile's plan that it does not let through; and what it needs more than was
        estimated, of the memories that do not suffice. A tenth more than seen, at least 0.1 GiB: the same choice must
        not come back."""
        more = {"device": compiled.device_bytes - estimated.device_bytes,
                "host": compiled.host_bytes - estimated.host_bytes - self.host_correction}
        more = {place: more[place] for place in compiled.lacks}
        add = lambda place: max(GIB // 10, int(1.1 * more[place])) if place in more else 0
        search = dataclasses.replace(self, host_correction=self.host_correction + add("host"))
        everywhere, kind, of_kinds = add("device"), kind_of(profile), dict(self.of_kinds)
        if more.get("device", 0) > UNUSUAL * compiled.device_limit:
            # What a second kind needs more as well is no matter of kinds.
            others = [bytes for other, bytes in of_kinds.items() if other != kind]
            everywhere = min(everywhere, max(others, default=0))
            of_kinds = {other: max(0, bytes - everywhere) for other, bytes in of_kinds.items()}
            of_kinds[kind] = of_kinds.get(kind, 0) + add("device") - everywhere
        return dataclasses.replace(search, device_correction=self.device_correction + everywhere,
                                   of_kinds=tuple(of_kinds.items())), more


def kind_of(profile: Profile) -> tuple[int, int]:
    """Profiles of one kind have programs alike: as many head chunks, and segments of one layer, two or more."""
    return profile.head_chunks, min(3, max(profile.segment_layers))


@dataclasses.dataclass(frozen=True)
class Choice:
    """A job whose profile was chosen, its plan, and what a slightly faster one lacked."""

    job: Job
    plan: Plan
    next_faster: tuple[Job, Plan, dict[str, int]] | None = None

    def explain(self) -> str:
        """One paragraph: what was chosen, and what the next faster choice lacks."""
        text = f"memory: {describe(self.job)}; {self.plan.speed_line()}."
        if self.next_faster is None:
            return text + " No choice that was tried would be faster."
        job, plan, missing = self.next_faster
        lacked = " and ".join(f"{value / GIB:.1f} GiB of {place} memory" for place, value in missing.items())
        changes = ", ".join(describe_changes(self.job, job))
        return text + f" The next faster, with {changes} ({plan.step_seconds:.1f} s), lacks {lacked}."


def choose(job: Job, search: Search) -> Choice | None:
    """The fastest profile that fits by the cost model, or None. What is fixed stays as the job has it."""
    best: Choice | None = None
    for base in itertools.chain.from_iterable(_bases(job, search, larger) for larger in (True, False)):
        if best and _fastest_possible(base, search) >= best.plan.step_seconds:
            continue
        best = _fastest(_kept(base, search, _spread(job.model.num_layers)), search, best)
    if best and job.profile.remat:  # a closer look around the best
        kept, layers = best.job.profile.keep_attention_on_device, job.model.num_layers
        near = range(max(0, kept - layers // KEPT_STEPS), min(layers, kept + layers // KEPT_STEPS) + 1)
        for profile in dict.fromkeys(_with_tiles(best.job, job.profile, search, larger) for larger in (True, False)):
            best = _fastest(_kept(dataclasses.replace(best.job, profile=profile), search, near), search, best)
    if best is None:
        return None
    larger = _with_tiles(best.job, job.profile, search, larger=True)
    return dataclasses.replace(best, next_faster=_next_faster(best, search, larger))


def _fastest(candidates: Iterator[Job], search: Search, best: Choice | None) -> Choice | None:
    """The fastest of the candidates that fit and of the best so far."""
    for candidate in candidates:
        plan = search.plan(candidate)
        if not search.missing(plan) and (best is None or plan.step_seconds < best.plan.step_seconds):
            best = Choice(candidate, plan)
    return best


def candidates(job: Job, search: Search) -> Iterator[Job]:
    """Profiles that need little, those first that need least; without a look at speed."""
    for base in reversed(list(_bases(job, search, larger=False))):
        yield from _kept(base, search, (0,), least=True)


def fits_somehow(job: Job, search: Search) -> Job | None:
    """A profile that fits, without looking for a fast one; None if there is none."""
    return next((found for found in candidates(job, search) if not search.missing(search.plan(found))), None)


def confirm(
    job: Job, search: Search, compile_plan: Callable[[Job], Plan], say: Callable[[str], None] = lambda text: None
) -> Choice:
    """`choose`, until the compiler agrees that the choice fits: its excess over the model corrects the model. UserError
    if nothing is left."""
    search = dataclasses.replace(search, margin=CONFIRMED)
    for _ in range(ROUNDS):
        choice = choose(job, search)
        if choice is None:
            break
        compiled = compile_plan(choice.job)
        if not compiled.lacks:
            return dataclasses.replace(choice, plan=compiled)
        search, more = search.corrected(choice.job.profile, choice.plan, compiled)
        needs = " and ".join(f"{value / GIB:+.1f} GiB of {place} memory" for place, value in more.items())
        say(f"the compiler needs {needs} against the estimate: choosing again")
    raise UserError(f"--memory auto: no profile was found that the compiler says fits {search.cluster}; "
                    "use a shorter --seq-len, a larger --sp, or choose by hand with --memory manual")


def length_step(job: Job) -> int:
    """Lengths that are looked at: multiples of this, which the sequence-parallel degree divides."""
    return math.lcm(LENGTH_STEP, job.sp)


def longest(job: Job, search: Search, most: int) -> int:
    """The longest sequence, a multiple of `length_step` up to `most`, for which some profile fits; 0 if there is
    none."""
    step = length_step(job)
    fits = lambda n: fits_somehow(dataclasses.replace(job, length=n * step), search) is not None
    if step > most or not fits(1):
        return 0
    low, high = 1, 2
    while high * step <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most // step + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


# ----------------------------------------------------------------------------------------------------------- candidates


def _bases(job: Job, search: Search, larger: bool) -> Iterator[Job]:
    """Placements, formats and head chunks, those first that take most memory; with larger tiles than usual or not."""
    free = [name for name in PLACEMENTS if name not in search.fixed]
    if not job.profile.remat and "offload_activations" in free:
        free.remove("offload_activations")
    formats = [(job.states, job.master)]
    if search.narrow:
        free_pair = lambda pair: all(name not in search.fixed or value == now for name, value, now in zip(
            ("optimizer_states", "master_weights"), pair, formats[0]))
        formats += [p for p in NARROWER if p != formats[0] and free_pair(p) and (p[1] == "float32" or job.width == 2)]
    chunks = [job.profile.head_chunks] if "head_chunks" in search.fixed else _chunks(job)
    for (states, master), values, n in itertools.product(
            formats, sorted(itertools.product((False, True), repeat=len(free)), key=sum), chunks):
        profile = _with_tiles(job, job.profile, search, larger)
        profile = dataclasses.replace(profile, head_chunks=n, **dict(zip(free, values)))
        yield dataclasses.replace(job, profile=profile, states=states, master=master)


def _with_tiles(job: Job, asked: Profile, search: Search, larger: bool) -> Profile:
    """The profile of a job with tiles of the usual size or larger, where `asked` leaves them open. That of the loss is
    even, if it can be: it divides the tokens of a device."""
    tokens, changes = job.rows * job.length // job.devices, {}
    times = LARGER_TILES if larger else 1
    if "mlp_tile" not in search.fixed and asked.mlp_tile == 0:
        changes["mlp_tile"] = times * job.model.hidden_size if larger and tokens > job.model.hidden_size else 0
    if "loss_tile" not in search.fixed and asked.loss_tile == 0:
        usual = default_tile(job.model.vocab_size)
        even = next((n for n in range(times * usual, times * usual // 2, -128) if tokens % n == 0), 0)
        tile = even or (times * usual if larger else 0)
        changes["loss_tile"] = 0 if tokens <= usual or tile == usual else tile
    return dataclasses.replace(job.profile, **changes)


def _chunks(job: Job) -> list[int]:
    model = job.model
    return [n for n in range(1, MOST_CHUNKS + 1)
            if model.num_heads % n == 0 and model.num_heads // n % job.sp == 0
            and (n % model.num_kv_heads == 0 or model.num_kv_heads % n == 0)]


def _kept(job: Job, search: Search, on_device: Iterable[int], least: bool = False) -> Iterator[Job]:
    """Segments and kept attention outputs for given placements: so many layers' on the device, as many as possible
    (`least`: none) in host memory."""
    profile, layers = job.profile, job.model.num_layers
    if not profile.remat:
        yield job
        return
    fixed = search.fixed
    for kept in [profile.keep_attention_on_device] if "keep_attention_on_device" in fixed else on_device:
        for budget in BUDGETS:
            def make(on_host, kept=kept, budget=budget):
                part = dataclasses.replace(profile, keep_attention_on_device=kept, keep_attention_on_host=on_host)
                if "segment_layers" not in fixed:
                    lengths = segments_within(dataclasses.replace(job, profile=part), search, budget)
                    part = lengths and dataclasses.replace(part, segment_layers=lengths)
                return part and dataclasses.replace(job, profile=part)

            if "keep_attention_on_host" in fixed or least:
                candidate = make(profile.keep_attention_on_host if "keep_attention_on_host" in fixed else 0)
            else:
                candidate = _most_on_host(make, layers - kept, search)
            if candidate is not None:
                yield candidate
            if "segment_layers" in fixed:
                break


def _most_on_host(make: Callable[[int], Job | None], most: int, search: Search) -> Job | None:
    """make(n) for the largest n whose host memory suffices; make(0) if none does."""
    room = search.cluster.host_share * (1 - search.margin) - search.host_correction
    fits = lambda job: job is not None and host_bytes(job) <= room
    best, low, high = make(0), 0, most + 1
    if not fits(best) or search.missing(search.plan(best)).keys() == {"device"}:
        return best
    middle = most  # tried first: it is often the answer
    while high - low > 1:
        job = make(middle)
        if fits(job):
            best, low = job, middle
        else:
            high = middle
        middle = (low + high) // 2
    return best


def host_bytes(job: Job) -> int:
    """Of host memory in a job's plan, without the rest of it."""
    weights, gradients, optimizer = cost.state_bytes(job)
    profile = job.profile
    step_only = job.kept[HOST] + gradients * profile.offload_weights
    states = weights * profile.offload_weights + optimizer * profile.offload_optimizer
    return states + step_only + saving_bytes(job, step_only)


def segments_within(job: Job, search: Search, part: float) -> tuple[int, ...] | None:
    """Segments as long as `part` of the free device memory allows, from the last layer back: what is kept on the device
    is freed on the way, so earlier segments may be longer. None if what is kept alone is too much."""
    profile, size, layers = job.profile, job.sizes, job.model.num_layers
    if part == 0.0:
        return (1,)
    weights, gradients, optimizer = cost.state_bytes(job)
    states = (0 if profile.offload_weights else weights + gradients) + (0 if profile.offload_optimizer else optimizer)
    room = search.cluster.machine.usable * (1 - search.margin) - states - search.correction((profile.head_chunks, 3))
    room = room / cost.FRAGMENTS - cost.layer_work(job, 3) - size.table * (job.devices > 1)  # looked up again
    room -= EARLY_LOADS * size.layer // job.devices * profile.offload_weights
    output = size.heads + size.statistics
    on_device = layers - profile.keep_attention_on_device  # the first layer that keeps its output there
    not_kept = on_device - profile.keep_attention_on_host  # so many layers keep none
    # on the device, of the layers before
    kept_before = [max(0, layer - on_device) * output for layer in range(layers + 1)]
    free = (room - kept_before[-1]) * part  # at the end of the forward pass
    if free < 0:
        return None
    budget, lengths, stop = kept_before[-1] + free, [], layers
    while stop:
        need, start = kept_before[stop], stop - 1
        while start:
            need += size.hidden + output * (start - 1 < not_kept)
            if need > budget:
                break
            start -= 1
        lengths.append(stop - start)
        stop = start
    if len(lengths) > 1 and lengths[-1] == 1:  # a first layer by itself keeps its input on the device to the end
        if lengths[-2] > 2:
            lengths[-2:] = [lengths[-2] - 1, 2]
        elif kept_before[3] + 2 * size.hidden + output * min(2, not_kept) <= budget:
            lengths[-2:] = [3]
    return (lengths[0],) if len(set(lengths)) == 1 else tuple(reversed(lengths))


def _spread(layers: int) -> list[int]:
    return sorted({round(i * layers / KEPT_STEPS) for i in range(KEPT_STEPS + 1)})


def _fastest_possible(job: Job, search: Search) -> float:
    """Seconds with all attention outputs kept and no input rebuilt, unless the user has fixed less."""
    profile, changes = job.profile, {}
    if profile.remat and not {"keep_attention_on_device", "keep_attention_on_host"} & search.fixed:
        changes = dict(keep_attention_on_device=job.model.num_layers, keep_attention_on_host=0)
    if profile.remat and "segment_layers" not in search.fixed:
        changes["segment_layers"] = (1,)
    return search.plan(dataclasses.replace(job, profile=dataclasses.replace(profile, **changes))).step_seconds


def _next_faster(best: Choice, search: Search, larger: Profile) -> tuple[Job, Plan, dict[str, int]] | None:
    """Of the choices one change away, the slowest that is faster and does not fit. larger: with larger tiles."""
    profile, layers = best.job.profile, best.job.model.num_layers
    kept = profile.keep_attention_on_device + profile.keep_attention_on_host
    changes = [{name: False} for name in PLACEMENTS if getattr(profile, name)]
    changes += [{"mlp_tile": larger.mlp_tile, "loss_tile": larger.loss_tile}] if larger != profile else []
    if profile.remat:
        changes += [{"segment_layers": (1,)}] if profile.segment_layers != (1,) else []
        if kept < layers:
            more = lambda name: {name: getattr(profile, name) + 1}
            changes += [more("keep_attention_on_device"), more("keep_attention_on_host")]
    found = []
    for change in changes:
        if any(name in search.fixed and value != getattr(profile, name) for name, value in change.items()):
            continue
        job = dataclasses.replace(best.job, profile=dataclasses.replace(profile, **change))
        plan = search.plan(job)
        if plan.step_seconds < best.plan.step_seconds and search.missing(plan):
            found.append((job, plan, search.missing(plan)))
    return max(found, key=lambda item: item[1].step_seconds, default=None)
