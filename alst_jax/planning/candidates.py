"""Search: the free choices and the memory they must fit; and the candidates, the profiles that a search tries."""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

from alst_jax.hardware.machines import GIB, Cluster
from alst_jax.models.tiles import usual_tiles
from alst_jax.parallel.costs import head_groups
from alst_jax.planning import footprint
from alst_jax.planning.estimate import estimate, host_ledger
from alst_jax.planning.job import Job, total
from alst_jax.planning.plan import Plan, pinned
from alst_jax.planning.seconds import spared_by_byte
from alst_jax.profile import HOST, LEVELS, Profile

UNCONFIRMED = 0.05  # of the memory, left free where no compiler confirms: the model's error (plan_accuracy.py)
CONFIRMED = 0.01
UNUSUAL = 0.1  # of the device: a larger error concerns one kind of profile, not all
MOST_CHUNKS = 8
BUDGETS = (0.0, 0.25, 0.5, 1.0)  # parts of the free device memory that rebuilding a segment may take
NARROWER = (("bfloat16", "float32"), ("int8", "float32"), ("int8", "none"))  # moments, master
LARGER_TILES = 4  # times the usual: fewer sums of weight gradients, more memory
PLACEMENTS = ("offload_activations", "offload_weights", "offload_optimizer")  # the first needs remat
_estimate = functools.lru_cache(maxsize=256)(estimate)  # a search looks at a candidate several times in a row
EARLY_LOADS = 4  # layers whose weights XLA loads from the host before their turn; segments leave room for them


@dataclasses.dataclass(frozen=True)
class Search:
    """The free choices, and the memory that a choice must fit.

    fixed: fields of the profile that the user typed. narrow: whether the optimizer's formats may be chosen too. margin:
    the part of each memory to leave free. Corrections: bytes that the compiler needed beyond the estimate, of the
    device, of the host, and (of_kinds) of the device for profiles of one kind.
    """

    cluster: Cluster
    fixed: frozenset[str] = frozenset()
    narrow: bool = False
    margin: float = UNCONFIRMED
    device_correction: int = 0
    host_correction: int = 0
    of_kinds: tuple[tuple[tuple[int, int], int], ...] = ()

    def plan(self, job: Job) -> Plan:
        return _estimate(job, self.cluster, self.correction(kind_of(job.profile)))

    def correction(self, kind: tuple[int, int]) -> int:
        """Bytes to add to the estimate on the device, for profiles of a kind."""
        return self.device_correction + dict(self.of_kinds).get(kind, 0)

    def lacks(self, job: Job) -> dict[str, int]:
        """Bytes that the estimated plan of a job lacks of "device" and "host" memory, with the margin left free."""
        return self.plan(job).missing(self.margin, self.host_correction)

    def fits_host(self, job: Job) -> bool:
        """Whether a job lacks no host memory; without the rest of its plan, for candidates of which most are left."""
        need = pinned(sum(map(total, host_ledger(job).values())), job.devices) + self.host_correction
        return need <= int(self.cluster.host_share * (1 - self.margin))

    def corrected(self, profile: Profile, estimated: Plan, compiled: Plan) -> tuple["Search", dict[str, int]]:
        """The search after the compiler refused a profile; and the compiler's excess over the estimate, by memory that
        does not suffice. A correction is a tenth larger than the excess, at least 0.1 GiB, so that the same choice does
        not come back."""
        more = {
            "device": compiled.device_bytes - estimated.device_bytes,
            "host": compiled.host_bytes - estimated.host_bytes - self.host_correction,
        }
        more = {place: more[place] for place in compiled.lacks}
        add = lambda place: max(GIB // 10, int(1.1 * more[place])) if place in more else 0
        everywhere, kind, of_kinds = add("device"), kind_of(profile), dict(self.of_kinds)
        if more.get("device", 0) > UNUSUAL * compiled.device_limit:
            # An excess that a second kind shares is corrected for all kinds.
            others = [bytes for other, bytes in of_kinds.items() if other != kind]
            everywhere = min(everywhere, max(others, default=0))
            of_kinds = {other: max(0, bytes - everywhere) for other, bytes in of_kinds.items()}
            of_kinds[kind] = of_kinds.get(kind, 0) + add("device") - everywhere
        device, on_host = self.device_correction + everywhere, self.host_correction + add("host")
        changes = dict(device_correction=device, host_correction=on_host, of_kinds=tuple(of_kinds.items()))
        return dataclasses.replace(self, **changes), more


def kind_of(profile: Profile) -> tuple[int, int]:
    """The kind of a profile: head chunks, and segments of one layer, two or more. A kind has similar programs."""
    return profile.head_chunks, min(3, max(profile.segment_layers))


def bases(job: Job, search: Search, larger: bool) -> Iterator[Job]:
    """Jobs with all placements, formats and head chunks, largest memory first; with activations in host memory also
    those that read them ahead. larger: with larger tiles than usual."""
    free = [name for name in PLACEMENTS[not job.profile.remat :] if name not in search.fixed]
    now, names = (job.states, job.master), ("optimizer_states", "master_weights")
    stays = lambda pair: all(value == old or name not in search.fixed for name, value, old in zip(names, pair, now))
    suits = lambda pair: pair != now and (pair[1] == "float32" or job.width == 2)
    formats = [now, *(pair for pair in NARROWER if search.narrow and stays(pair) and suits(pair))]
    chunks = [job.profile.head_chunks]
    if "head_chunks" not in search.fixed:
        chunks = head_groups(job.model.num_heads, job.model.num_kv_heads, job.sp, MOST_CHUNKS)
    placements = sorted(itertools.product((False, True), repeat=len(free)), key=sum)
    tiled = with_tiles(job, job.profile, search, larger)
    ahead_or_not = [job.profile.prefetch_activations] if "prefetch_activations" in search.fixed else [False, True]
    for (states, master), values, n, ahead in itertools.product(formats, placements, chunks, ahead_or_not):
        placed = tiled.changed(head_chunks=n, prefetch_activations=ahead, **dict(zip(free, values)))
        if placed.profile.offload_activations or ahead == ahead_or_not[0]:
            yield dataclasses.replace(placed, states=states, master=master)


def with_tiles(job: Job, asked: Profile, search: Search, larger: bool) -> Job:
    """The job with usual or larger tiles where `asked` leaves them open. A loss tile divides the tokens if possible."""
    tokens, changes = job.tokens, {}
    times, usual = LARGER_TILES if larger else 1, usual_tiles(job.model)
    if "mlp_tile" not in search.fixed and asked.mlp_tile == 0:
        changes["mlp_tile"] = times * usual.mlp if larger and tokens > usual.mlp else 0
    if "loss_tile" not in search.fixed and asked.loss_tile == 0:
        most = times * usual.loss
        even = next((n for n in range(most, most // 2, -128) if tokens % n == 0), 0)
        tile = even or (most if larger else 0)
        changes["loss_tile"] = 0 if tokens <= usual.loss or tile == usual.loss else tile
    return job.changed(**changes)


def with_kept(job: Job, search: Search, on_device: Iterable[int], least: bool = False) -> Iterator[Job]:
    """Jobs with segments and kept attention outputs, for given placements. on_device: numbers of layers whose outputs
    stay on the device; host memory takes as many of the others as fit, or with `least` none."""
    profile, fixed = job.profile, search.fixed
    if not profile.remat:
        yield job
    if not profile.remat or profile.share_gradients and not profile.can_share:
        return
    on_device = [profile.keep_attention_on_device] if "keep_attention_on_device" in fixed else on_device
    on_host = profile.keep_attention_on_host if "keep_attention_on_host" in fixed else 0
    for kept, budget in itertools.product(on_device, BUDGETS[:1] if "segment_layers" in fixed else BUDGETS):
        most = on_host if least or "keep_attention_on_host" in fixed else job.model.num_layers - kept
        make = functools.cache(functools.partial(_keeping, job, search, budget, kept))
        if (made := _most_on_host(make, range(on_host, most + 1), search)) is not None:
            if "prefetch_activations" not in fixed and not made.reads_ahead:
                made = made.changed(prefetch_activations=False)
            # Without sharing if host memory has room: the copies that sharing adds are not hidden.
            shares = made.profile.share_gradients and "share_gradients" not in fixed
            alone = made.changed(share_gradients=False) if shares else made
            yield alone if search.fits_host(alone) else made


def _keeping(job: Job, search: Search, budget: float, on_device: int, on_host: int) -> Job | None:
    """The job with so many kept attention outputs, and segments as long as they may be; None if it has no room."""
    levels = {name: 0 for name in LEVELS if name not in search.fixed}
    made = job.changed(keep_attention_on_device=on_device, keep_attention_on_host=on_host, **levels)
    fixed = "segment_layers" in search.fixed
    lengths = made.profile.segment_layers if fixed else segments_within(made, search, budget)
    if lengths is None:
        return None
    made = made.changed(segment_layers=lengths)
    if "share_gradients" in search.fixed or not made.profile.can_share or job.grad_accum > 1:  # sums leave no room
        return made
    shared = made.changed(share_gradients=True)
    return shared if shared.kept[HOST] < made.kept[HOST] else made


def _most_on_host(make: Callable[[int], Job | None], numbers: range, search: Search) -> Job | None:
    """make(n) for the largest of the numbers that fits in host memory; for the smallest if that does not fit itself."""
    fits = lambda n: (job := make(n)) is not None and search.fits_host(job)
    smallest, falling = make(numbers[0]), numbers[::-1]
    if len(numbers) == 1 or smallest is None or search.lacks(smallest):
        return smallest
    if fits(falling[0]):  # tried first: it is often the answer
        return make(falling[0])
    return make(falling[1 + bisect.bisect_left(falling[1:-1], True, key=fits)])


def with_levels(job: Job, search: Search, beat: float) -> Job:
    """The job with q, k and v, then gate and up, kept in as many of the last layers as device memory has room for; as
    it is, if the room of its plan does not bring it below `beat` seconds.

    A kept value spares the products of a column of a matrix, as many for each of these arrays, so that they are worth
    the same by byte; an attention output is worth more.
    """
    free, plan = [name for name in LEVELS if name not in search.fixed], search.plan(job)
    room = search.cluster.machine.usable * (1 - search.margin) - plan.device_bytes
    fastest = plan.step_seconds - room * spared_by_byte(job, search.cluster)
    if not (free and job.profile.keep_attention_on_device and fastest < beat):
        return job
    for name in free:
        most = getattr(job.profile, LEVELS[name])
        # A layer alone is no loop: its arrays are copied. No number leaves one.
        numbers = [n for n in range(1, most + 1) if 1 not in (n, most - n)]
        too_many = lambda n, job=job, name=name: bool(search.lacks(job.changed(**{name: n})))
        job = job.changed(**{name: [0, *numbers][bisect.bisect_left(numbers, True, key=too_many)]})
    return job


def segments_within(job: Job, search: Search, part: float) -> tuple[int, ...] | None:
    """Segments as long as `part` of the free device memory allows; None if the kept outputs alone are too large.

    Built from the last layer back: the backward pass frees kept outputs on its way, so earlier segments may be longer.
    """
    profile, size, layers = job.profile, job.sizes, job.model.num_layers
    if part == 0.0:
        return (1,)
    room = search.cluster.machine.usable * (1 - search.margin) - footprint.states_on_device(job)
    room -= search.correction((profile.head_chunks, 3))
    room = room / footprint.FRAGMENTS - total(footprint.layer_work(job, rebuilt=True))
    room -= size.table * (job.devices > 1)  # the embedding, gathered to look up the first segment's input again
    room -= EARLY_LOADS * size.layer // job.devices * profile.offload_weights
    output = size.heads + size.statistics
    room -= output * profile.prefetch_activations
    qkv, mlp = layers - profile.keep_qkv_on_device, layers - profile.keep_mlp_on_device  # the first layers that do
    on_device = layers - profile.keep_attention_on_device  # the first layer that keeps its output there
    not_kept = on_device - profile.keep_attention_on_host  # the number of layers that keep none
    not_kept *= not profile.rebuild_inputs_alone  # rebuilt segments hold theirs
    # bytes on the device, by layer: kept arrays of the layers before it
    held = ((layer >= on_device) * output + job.level_bytes(layer >= qkv, layer >= mlp) for layer in range(layers))
    kept_before = list(itertools.accumulate(held, initial=0))
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
    if len(lengths) > 1 and lengths[-1] == 1:  # a first segment of one layer keeps its input on the device to the end
        both = lengths[-2] + 1
        if lengths[-2] > 2:
            lengths[-2:] = [lengths[-2] - 1, 2]
        elif kept_before[both] + (both - 1) * size.hidden + output * min(both - 1, not_kept) <= budget:
            lengths[-2:] = [both]
    return (lengths[0],) if len(set(lengths)) == 1 else tuple(reversed(lengths))
