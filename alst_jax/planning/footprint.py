"""The cost model: bytes and seconds of one step, from arithmetic alone. Nothing is traced or compiled: microseconds a
plan.

B sequences a device, T tokens a device (B x S / seq), D hidden, F ffn, V vocabulary, L layers, N query heads, K kv
heads, H head dim. The terms follow the program (step.py, stack/stack.py, stack/layer.py) and were checked against
what the compiler allocates: `python -m benchmarks.plan_accuracy` prints the error of each of its combinations.
"""

import dataclasses
import functools
import math

from alst_jax.hardware.machines import Cluster
from alst_jax.models.config import ModelConfig
from alst_jax.ops.cross_entropy import default_tile
from alst_jax.ops.tiling import even_tile
from alst_jax.planning import seconds as speed
from alst_jax.planning.plan import ESTIMATED, Plan
from alst_jax.planning.saving_memory import saving_bytes
from alst_jax.profile import DEVICE, HOST, Profile, Segment, segment_inputs

FRAGMENTS = 1.015  # what the allocator's peak is above the sum of what is alive
STATE_BYTES = {"float32": 8, "bfloat16": 4, "int8": 2 + 2 * 4 / 256}  # of both moments of a parameter
MASTER_BYTES = {"float32": 4, "low-bits": 2, "none": 0}  # of a bfloat16 parameter
UPDATE_CHUNK = 2**26  # elements, as xla/host.py


@dataclasses.dataclass(frozen=True)
class Job:
    """What one optimizer step works on: `rows` sequences of `length` tokens over dp x sp devices, `grad_accum`
    times."""

    model: ModelConfig
    profile: Profile
    rows: int
    length: int
    dp: int = 1
    sp: int = 1
    grad_accum: int = 1
    states: str = "float32"
    master: str = "float32"
    count_workspace: bool = True  # of the attention kernel

    @property
    def devices(self) -> int:
        return self.dp * self.sp

    @property
    def width(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.profile.compute_dtype == "bfloat16" else 4

    @functools.cached_property
    def sizes(self) -> "Sizes":
        return Sizes.of(self)

    @functools.cached_property
    def segments(self) -> list[Segment]:
        return self.profile.segments(self.model.num_layers)

    @functools.cached_property
    def kept(self) -> dict[str, int]:
        return kept_bytes(self)

    @functools.cached_property
    def passes(self) -> speed.Passes:
        return speed.Passes.of(self)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes, on one device, of the arrays that a plan is made of."""

    hidden: int  # [B, T, D]
    heads: int  # [B, T, N, H]
    kv: int  # [B, T, K, H]
    statistics: int  # float32 [B, T, N], of a kernel that gives them
    layer: int  # one layer's weights, gathered
    table: int  # the head's table, gathered
    rope: int  # both tables, float32

    @staticmethod
    def of(job: Job) -> "Sizes":
        model, tokens = job.model, job.rows * job.length // job.devices
        per_token = lambda columns: tokens * columns * job.width
        tables = model.vocab_size * (1 if model.tie_word_embeddings else 2)
        layers = model.num_params - model.hidden_size * (tables + 1)  # and the last norm
        return Sizes(
            hidden=per_token(model.hidden_size), heads=per_token(model.num_heads * model.head_dim),
            kv=per_token(model.num_kv_heads * model.head_dim),
            statistics=tokens * model.num_heads * 4 if job.profile.attention != "xla" else 0,
            layer=layers // model.num_layers * job.width, table=model.vocab_size * model.hidden_size * job.width,
            rope=tokens * model.head_dim * 4)


def estimate(job: Job, cluster: Cluster | None = None, correction: int = 0) -> Plan:
    """The plan of a job, by this model. cluster: the devices' limits and speeds; None: a CPU, without either.

    correction: bytes that the compiler was seen to need beside what this model says, added to the working set.
    """
    weights, gradients, optimizer = state_bytes(job)
    kept = job.kept
    places = {DEVICE: {}, HOST: {}}
    on = lambda offloaded: places[HOST if offloaded else DEVICE]
    on(job.profile.offload_weights)["weights"] = weights
    on(job.profile.offload_weights)["gradients"] = gradients
    on(job.profile.offload_optimizer)["optimizer"] = optimizer
    places[DEVICE]["kept activations"] = kept[DEVICE]
    places[HOST]["kept activations"] = kept[HOST]
    places[HOST]["saving"] = saving_bytes(job, kept[HOST] + places[HOST].get("gradients", 0))
    places[DEVICE]["working set"] = max(0, working_set(job) + correction - kept[DEVICE])
    places[DEVICE]["batch"] = 3 * 4 * job.rows * job.length // job.devices
    flops = job.grad_accum * job.rows * job.model.flops_per_sequence(job.length)
    return Plan(
        ESTIMATED, cluster.machine.kind if cluster else "cpu", places[DEVICE], places[HOST],
        cluster and cluster.machine.usable, cluster and cluster.host_share, flops, speed.collectives(job),
        speed.seconds(job, cluster) if cluster else {}, job.grad_accum * job.rows * job.length, job.devices)


def state_bytes(job: Job) -> tuple[int, int, int]:
    """Weights, gradients and optimizer state: one device's shards."""
    parameters = -(-job.model.num_params // job.devices)
    gradients = parameters * (job.width + (4 if job.grad_accum > 1 else 0)) * (not job.profile.update_in_backward)
    master = MASTER_BYTES[job.master] if job.width == 2 else 0
    return parameters * job.width, gradients, int(parameters * (STATE_BYTES[job.states] + master))


def kept_bytes(job: Job) -> dict[str, int]:
    """What the forward pass keeps for the backward pass, by place."""
    size, profile = job.sizes, job.profile
    kept = {DEVICE: 0, HOST: 0}
    if not profile.remat:
        kept[DEVICE] = job.model.num_layers * unremat_layer(job)
        return kept
    inputs = HOST if profile.offload_activations else DEVICE
    kept[inputs] += size.hidden * segment_inputs(job.segments, profile.offload_activations)
    for segment in job.segments:
        layers = segment.runs[-1].stop - segment.runs[0].start
        if segment.all_inputs:
            kept[place_of(inputs, layers)] += size.hidden * layers
        for run in segment.runs:
            if run.place:
                count = run.stop - run.start
                kept[place_of(run.place, count)] += outputs_bytes(job, count)
    return kept


def outputs_bytes(job: Job, layers: int) -> int:
    """The attention outputs that a run keeps; on a mesh those of a single layer also turned round for the way back."""
    turned = layers == 1 and job.sp > 1 and job.profile.head_chunks == 1
    return layers * ((1 + turned) * job.sizes.heads + job.sizes.statistics)


def place_of(place: str, layers: int) -> str:
    """Where a loop over so many layers keeps things: one of a single trip is none, and the compiler leaves out copies
    to the host and back that have no loop between them."""
    return DEVICE if layers == 1 else place


def unremat_layer(job: Job) -> int:
    """Without rematerialisation: what differentiation keeps of a layer, with MLP and norms (tiled) computed again or
    not."""
    size = job.sizes
    kept = 2 * size.hidden + 2 * size.heads + 2 * size.kv + size.statistics
    if job.profile.mlp_tile is None:
        kept += 4 * size.hidden // job.model.hidden_size * job.model.intermediate_size
    return kept


def working_set(job: Job) -> int:
    """The peak of what is alive beside weights, gradients, optimizer and batch; what is kept on the device included."""
    # Gradients that stay on the device are results, whose places serve other purposes before, if they are large enough.
    before, size, model = 0, job.sizes, job.model
    if not job.profile.offload_weights:
        largest = model.num_layers * model.hidden_size * model.intermediate_size * job.width // job.devices
        logits = 4 * loss_tokens(job) * model.vocab_size
        if largest >= max(size.table, logits * (job.profile.loss_tile is None)):
            before = state_bytes(job)[1] if largest >= size.table * 4 // job.width else size.table
    wide = size.table * 4 // job.width
    embedding = wide + (wide // job.devices if job.devices > 1 else 0)  # at the end: its gradient, and the shard's
    return max(int(FRAGMENTS * max(loss_peak(job) - before, layers_peak(job), embedding)), update_work(job))


def loss_peak(job: Job) -> int:
    """At the loss: all that is kept, three hidden states (two, where one tile is all), the table's gradient in float32,
    the table, and a tile's logits, in float32 and as their gradient."""
    size, model, tile = job.sizes, job.model, loss_tokens(job)
    tokens = job.rows * job.length // job.devices
    wide, logits = size.table * 4 // job.width, tile * model.vocab_size
    work = size.table + (4 + job.width) * logits
    if job.devices == 1:  # where the table is not gathered
        work = max(size.table + 4 * logits, (4 + job.width) * logits)
    if tokens % tile:  # a last, shorter tile has logits and, on a mesh, a gradient of its own, made early
        work += (wide if job.devices > 1 else 0) + tokens % tile * model.vocab_size * job.width
    work += wide
    if job.profile.loss_tile is None:  # the logits' gradient is in float32 at first
        work = max(work, 8 * logits)
    hidden = 3 * size.hidden + tile * model.hidden_size * job.width if tile < tokens else 2 * size.hidden
    return job.kept[DEVICE] + hidden + work + size.rope + again_bytes(job)


def again_bytes(job: Job) -> int:
    """The embedding's table, gathered: where the first segment's input is looked up again, it stays until then."""
    return 0 if job.devices == 1 or job.segments[0].all_inputs else job.sizes.table


def loss_tokens(job: Job) -> int:
    """Tokens of a device, or of a tile of the loss."""
    tokens, tile = job.rows * job.length // job.devices, job.profile.loss_tile
    return tokens if tile is None else min(tile or default_tile(job.model.vocab_size), tokens)


def mlp_tokens(job: Job) -> int:
    """Tokens of a device, or of a tile of all that is token-wise in a layer."""
    tokens, tile = job.rows * job.length // job.devices, job.profile.mlp_tile
    return tokens if tile is None else min(tokens, _even_tile(tokens, tile or job.model.hidden_size))


_even_tile = functools.cache(even_tile)


def layers_peak(job: Job) -> int:
    """In the backward pass: what is still kept, what a segment's layers were rebuilt of, and one layer's work."""
    profile, size = job.profile, job.sizes
    if not profile.remat:
        return job.kept[DEVICE] + layer_work(job)
    inputs_on_device = 0 if profile.offload_activations else size.hidden
    firsts = inputs_on_device * segment_inputs(job.segments, profile.offload_activations)  # one array, to the end
    peak, kept = 0, firsts
    shard, places = unlooped(job)
    output = size.heads + size.statistics
    for segment in job.segments:  # forwards: `kept` is what is there when the backward pass comes to this segment
        count = segment.runs[-1].stop - segment.runs[0].start
        if segment.all_inputs:
            kept += size.hidden if count == 1 else inputs_on_device * count
        lengths = [(run.place, run.stop - run.start) for run in segment.runs]
        here = sum(n for place, n in lengths if place and place_of(place, n) == DEVICE)
        kept += sum(outputs_bytes(job, n) for place, n in lengths if place and place_of(place, n) == DEVICE)
        rebuilt = 0
        if not segment.all_inputs:
            not_kept = sum(run.stop - run.start for run in segment.runs if not run.place)
            not_kept -= segment.runs[-1].place is None  # the last layer's is made in its turn
            rebuilt = (count - 1) * size.hidden + not_kept * output
        if job.sp > 1 and not one_head(job):  # before heads are swapped, a copy of all outputs is turned round
            # That waits for nothing: not for the norm's gradient, not for the segment to be rebuilt.
            early = size.hidden * (2 - profile.offload_weights) if segment.all_inputs else 2 * size.hidden + size.heads
            peak = max(peak, kept + here * size.heads + rebuilt + early)
        work = layer_work(job, 0 if segment.all_inputs else count)
        if segment.all_inputs and count == 1:  # outside of a loop h and o are what is kept, not rows of it
            work -= size.hidden + here * size.heads
        if count == 2 and not (segment.all_inputs or here) and profile.head_chunks == 1:
            rebuilt += pair_bytes(job, segment is job.segments[-1])
        waiting = (job.model.num_layers - segment.runs[-1].stop) * shard - places
        peak = max(peak, kept + rebuilt + waiting + work)
    return peak + again_bytes(job)


def unlooped(job: Job) -> tuple[int, int]:
    """Where no loop goes over layers and gradients stay on the device: bytes of a layer's, which all wait in float32
    until the end, and what the results' places (three of the MLP, those of q and o) hold before that: each an array
    that fits."""
    size, model = job.sizes, job.model
    loop = lambda segment: segment.runs[-1].stop - segment.runs[0].start > (1 if segment.all_inputs else 2)
    if job.profile.offload_weights or any(map(loop, job.segments)):
        return 0, 0
    column = model.num_layers * model.hidden_size * job.width // job.devices
    holds = lambda columns: next((array for array in (size.hidden, size.kv) if array <= columns * column), 0)
    places = 3 * holds(model.intermediate_size) + 2 * holds(model.num_heads * model.head_dim)
    return size.layer * 4 // job.width // job.devices, places


def pair_bytes(job: Job, last: bool) -> int:
    """Of a segment of two, which no loop goes over: places for queries and keys of the first layer are made early. On a
    mesh its output is there as it was and turned round; and the last segment is rebuilt before the gradient of the last
    norm, so that what that is made of waits."""
    size = job.sizes
    return size.heads + size.kv + (size.heads + last * size.hidden) * (job.sp > 1)


def layer_work(job: Job, rebuilt: int = 0) -> int:
    """One layer's backward pass, beside what is kept and rebuilt: at the attention or in a tile of the MLP.

    rebuilt: layers of the segment, if it is one that is rebuilt.
    """
    size, profile = job.sizes, job.profile
    wide = size.layer * 4 // job.width
    attention, mlp = attention_work(job), mlp_work(job)
    always = 2 * size.hidden + 2 * size.heads + size.rope + size.statistics  # h and dh, o and do
    if mlp_tokens(job) < job.rows * job.length // job.devices:
        always += wide  # float32 sums of the weights' gradients
    if profile.offload_weights:
        always += size.table // job.devices  # the head's gradient waits for its way to the host
    elif job.model.tie_word_embeddings:
        always += size.table * 4 // job.width // job.devices  # or for that of the embedding, to be added to
    if job.sp > 1 and not one_head(job):
        mlp += size.heads  # o once more, turned round for its swap over devices
    if rebuilt > 2 and (profile.head_chunks == 1 or job.sp == 1):  # dh as it was, until rows that wait for it are read
        mlp, attention = mlp + size.hidden, attention + size.hidden * (job.sp > 1)
    return always + max(attention, mlp)


def one_head(job: Job) -> bool:
    """Whether a device works on one head of a chunk at a time."""
    return job.model.num_heads == job.profile.head_chunks * job.sp


def attention_work(job: Job) -> int:
    """Gradients of keys and values; one chunk's q, k, v, their gradients, slices of o and do; the kernel's
    workspace."""
    size, model, chunks = job.sizes, job.model, job.profile.head_chunks
    shared = chunks > model.num_kv_heads
    kv_chunk = size.kv // min(chunks, model.num_kv_heads)
    repeats = job.sp // math.gcd(job.sp, max(1, model.num_kv_heads // chunks))
    q_chunk, kv_chunk = size.heads // chunks, kv_chunk * repeats
    if chunks == 1:
        # On a mesh, before the gradients are made: queries and do as they were swapped, and turned round.
        before = 3 * q_chunk + 2 * kv_chunk if job.sp > 1 else 0
        return max(before, 2 * q_chunk + 4 * kv_chunk) + workspace(job)
    return 4 * q_chunk + 4 * kv_chunk + 2 * size.kv * (4 // job.width if shared else 1) + workspace(job)


def workspace(job: Job) -> int:
    """cuDNN's in its backward pass: float32 dq, and dk and dv of each query head, for the heads of one call."""
    if job.profile.attention == "xla" or not job.count_workspace:
        return 0
    model = job.model
    heads = max(1, model.num_heads // job.profile.head_chunks // job.sp)
    rows = job.rows // job.dp
    while rows * job.length * heads * model.head_dim > 2**31 and heads % 2 == 0:  # as ops/attention.py splits them
        heads //= 2
    return rows * job.length * heads * model.head_dim * 8


def mlp_work(job: Job) -> int:
    """The layer's weights, and a tile's intermediates and weight gradients. Where one tile is all, four arrays of the
    MLP's width and four of the model's; and one device has only a matrix at a time."""
    size, model, profile = job.sizes, job.model, job.profile
    tokens = job.rows * job.length // job.devices
    tile = mlp_tokens(job)
    if tile < tokens:
        return size.layer + int(4.75 * tile * model.intermediate_size * job.width)
    return size.layer * (job.devices > 1) + 4 * tile * (model.intermediate_size + model.hidden_size) * job.width


def update_work(job: Job) -> int:
    """What the optimizer's update needs beside its arrays: for a layer of the largest parameter, or a chunk of a
    table."""
    model = job.model
    matrix, table = model.hidden_size * model.intermediate_size, model.vocab_size * model.hidden_size
    return 40 * max(matrix // job.devices, min(table // job.devices, UPDATE_CHUNK))
