"""Bytes that a step needs on one device, from arithmetic alone: nothing is traced or compiled.

The terms follow the program (step.py, stack/stack.py, stack/layer.py) and were checked against the compiler's bytes:
`python -m benchmarks.plan_accuracy` prints the error of each combination. Letters as in job.py.
"""

import functools

from alst_jax.models.tiles import tile_sizes
from alst_jax.ops.attention.flash_tiles import workspace_bytes
from alst_jax.ops.tiling import even_tile
from alst_jax.planning.job import Job, outputs_bytes, place_of
from alst_jax.profile import DEVICE, Segment, segment_inputs

FRAGMENTS = 1.015  # the allocator's peak over the sum of the live arrays
STATE_BYTES = {"float32": 8, "bfloat16": 4, "int8": 2 + 2 * 4 / 256}  # of both moments of a parameter
MASTER_BYTES = {"float32": 4, "low-bits": 2, "none": 0}  # of a bfloat16 parameter
UPDATE_CHUNK = 2**26  # elements, as xla/host.py


def state_bytes(job: Job) -> tuple[int, int, int]:
    """Weights, gradients and optimizer state: one device's shards."""
    weights, trained = (-(-sizes.total // job.devices) for sizes in (job.parameters, job.trained))
    gradients = trained * (job.width + (4 if job.grad_accum > 1 else 0)) * (not job.profile.update_in_backward)
    master = MASTER_BYTES[job.master] if job.width == 2 else 0
    return weights * job.width, gradients, int(trained * (STATE_BYTES[job.states] + master))


def trained_bytes(job: Job) -> int:
    """One device's shards of the weights that the update writes."""
    return -(-job.trained.total // job.devices) * job.width


def working_set(job: Job) -> int:
    """The peak of live bytes beside weights, gradients, optimizer and batch. Includes the activations kept on the
    device."""
    # Gradients that stay on the device are results. XLA puts temporary arrays in their buffers first, if these are
    # large enough.
    before, size = 0, job.sizes
    if not job.profile.offload_weights:
        largest = job.trained.largest_stack * job.width // job.devices
        logits = 4 * loss_tokens(job) * job.model.vocab_size
        if largest >= max(size.table, logits * (job.profile.loss_tile is None)):
            before = state_bytes(job)[1] if largest >= size.table * 4 // job.width else size.table
    wide = size.table * 4 // job.width
    embedding = wide + (wide // job.devices if job.devices > 1 else 0)  # at the end: its gradient, and the shard's
    return max(int(FRAGMENTS * max(loss_peak(job) - before, layers_peak(job), embedding)), update_work(job))


# ------------------------------------------------------------------------------------------------------------- the loss


def loss_peak(job: Job) -> int:
    """Live bytes at the loss.

    All kept activations; three hidden states, or two with a single tile; the table and its float32 gradient; a tile's
    logits, in float32 and as their gradient.
    """
    size, model, tile, tokens = job.sizes, job.model, loss_tokens(job), job.tokens
    wide, logits = size.table * 4 // job.width, tile * model.vocab_size
    work = size.table + (4 + job.width) * logits
    if job.devices == 1:  # the table is not gathered
        work = max(size.table + 4 * logits, (4 + job.width) * logits)
    if tokens % tile:  # a shorter last tile has logits of its own and, on a mesh, a gradient of its own, made early
        work += (wide if job.devices > 1 else 0) + tokens % tile * model.vocab_size * job.width
    work += wide
    if job.profile.loss_tile is None:  # the logits' gradient is in float32 at first
        work = max(work, 8 * logits)
    hidden = 3 * size.hidden + tile * model.hidden_size * job.width if tile < tokens else 2 * size.hidden
    return job.kept[DEVICE] + hidden + work + size.rope + gathered_embedding(job)


def gathered_embedding(job: Job) -> int:
    """The gathered table of the embedding. It stays until the first segment's input is looked up again."""
    return 0 if job.devices == 1 or job.segments[0].all_inputs else job.sizes.table


def loss_tokens(job: Job) -> int:
    """Tokens of a device, or of a tile of the loss."""
    tile = tile_sizes(job.profile, job.model).loss
    return job.tokens if tile is None else min(tile, job.tokens)


# ----------------------------------------------------------------------------------------------------------- the layers


def mlp_tokens(job: Job) -> int:
    """Tokens of a device, or of a tile of a layer's token-wise parts."""
    tile = tile_sizes(job.profile, job.model).mlp
    return job.tokens if tile is None else min(job.tokens, _even_tile(job.tokens, tile))


_even_tile = functools.cache(even_tile)


def layers_peak(job: Job) -> int:
    """Live bytes in the backward pass: kept activations, the rebuilt residuals of a segment, one layer's work."""
    profile, size, work = job.profile, job.sizes, job.attention_work
    if not profile.remat:
        return job.kept[DEVICE] + layer_work(job)
    inputs_on_device = 0 if profile.offload_activations else size.hidden
    firsts = inputs_on_device * segment_inputs(job.segments, profile.offload_activations)  # one array, to the end
    peak, kept = 0, firsts
    shard, places = unlooped(job)
    for segment in job.segments:  # first to last: `kept` is alive when the backward pass reaches this segment
        count = segment.runs[-1].stop - segment.runs[0].start
        if segment.all_inputs:
            kept += size.hidden if count == 1 else inputs_on_device * count
        lengths = [(run.place, run.stop - run.start) for run in segment.runs]
        here = sum(n for place, n in lengths if place and place_of(place, n) == DEVICE)
        kept += sum(outputs_bytes(job, n) for place, n in lengths if place and place_of(place, n) == DEVICE)
        rebuilt = rebuilt_bytes(job, segment)
        if work.output_copy:  # made before its swap, as soon as the outputs exist
            # The copy waits neither for the norm's gradient nor for the segment to be rebuilt.
            early = size.hidden * (2 - profile.offload_weights) if segment.all_inputs else 2 * size.hidden + size.heads
            peak = max(peak, kept + here * size.heads + rebuilt + early)
        of_layer = layer_work(job, 0 if segment.all_inputs else count)
        if segment.all_inputs and count == 1:  # outside of a loop h and o are the kept arrays, not copies of a row
            of_layer -= size.hidden + here * size.heads
        if count == 2 and not (segment.all_inputs or here) and profile.head_chunks == 1:
            rebuilt += pair_bytes(job, segment is job.segments[-1])
        waiting = (job.model.num_layers - segment.runs[-1].stop) * shard - places
        peak = max(peak, kept + rebuilt + waiting + of_layer)
    return peak + gathered_embedding(job)


def rebuilt_bytes(job: Job, segment: Segment) -> int:
    """Residuals that are recomputed before the backward pass of a segment."""
    if segment.all_inputs:
        return 0
    not_kept = sum(run.stop - run.start for run in segment.runs if not run.place)
    not_kept -= segment.runs[-1].place is None  # the last layer recomputes its output in its own turn
    layers = segment.runs[-1].stop - segment.runs[0].start
    return (layers - 1) * job.sizes.hidden + not_kept * (job.sizes.heads + job.sizes.statistics)


def unlooped(job: Job) -> tuple[int, int]:
    """Bytes where no loop goes over layers and gradients stay on the device, otherwise zeros.

    First: the float32 gradients of one layer; those of all layers wait until the end. Second: the buffers of results
    (three of the MLP, those of q and o) that hold temporary arrays before, each an array that fits.
    """
    size, model = job.sizes, job.model
    loop = lambda segment: segment.runs[-1].stop - segment.runs[0].start > (1 if segment.all_inputs else 2)
    if job.profile.offload_weights or any(map(loop, job.segments)):
        return 0, 0
    column = model.num_layers * model.hidden_size * job.width // job.devices
    holds = lambda columns: next((array for array in (size.hidden, size.kv) if array <= columns * column), 0)
    places = 3 * holds(model.intermediate_size) + 2 * holds(model.num_heads * model.head_dim)
    return job.trained.layer * 4 // job.devices, 0 if job.freeze else places  # frozen parameters have no such buffers


def pair_bytes(job: Job, last: bool) -> int:
    """Arrays of a segment of two layers, over which no loop goes.

    Buffers for queries and keys of the first layer are made early. Where attention swaps over devices, its output
    exists twice, and the last segment is rebuilt before the gradient of the last norm, whose inputs wait.
    """
    size, work = job.sizes, job.attention_work
    return size.heads + size.kv + work.lone_output_copy + last * size.hidden * work.swaps


def layer_work(job: Job, rebuilt: int = 0) -> int:
    """One layer's backward pass beside kept and rebuilt activations: at the attention or in a tile of the MLP.

    rebuilt: the number of layers of a segment that is rebuilt.
    """
    size, profile, work = job.sizes, job.profile, job.attention_work
    attention, mlp = work.peak + workspace(job), mlp_work(job)
    always = 2 * size.hidden + 2 * size.heads + size.rope + size.statistics  # h and dh, o and do
    if mlp_tokens(job) < job.tokens:
        always += size.layer * 4 // job.width  # float32 sums of the weights' gradients
    if profile.offload_weights:
        always += size.table // job.devices  # the head's gradient, until it is copied to the host
    elif job.model.tie_word_embeddings:
        always += size.table * 4 // job.width // job.devices  # the head's gradient, until the embedding's is added
    mlp += work.output_copy
    if rebuilt > 2 and (profile.head_chunks == 1 or not work.swaps):  # the old dh, until all its rows are read
        mlp, attention = mlp + size.hidden, attention + size.hidden * work.swaps
    return always + max(attention, mlp)


def workspace(job: Job) -> int:
    """The kernel's workspace in the backward pass. cuDNN's: float32 dq, and dk and dv of each query head of one call."""
    if job.profile.attention == "xla" or not job.count_workspace:
        return 0
    head_dim, heads, rows = job.model.head_dim, job.attention.local_heads, job.rows // job.dp
    if str(job.profile.attention).startswith("flash"):
        kv_heads = max(1, job.model.num_kv_heads // job.profile.head_chunks * job.attention.repeats // job.sp)
        return workspace_bytes(rows, job.length, heads, kv_heads, head_dim, documents=job.documents)
    while rows * job.length * heads * head_dim > 2**31 and heads % 2 == 0:  # as ops/attention.py splits them
        heads //= 2
    return rows * job.length * heads * head_dim * 8


def mlp_work(job: Job) -> int:
    """The layer's weights, and a tile's intermediates and weight gradients.

    With a single tile: four arrays [T, F] and four [T, D]; one device then has only one matrix at a time.
    """
    size, model, tile = job.sizes, job.model, mlp_tokens(job)
    if tile < job.tokens:
        return size.layer + int(4.75 * tile * model.intermediate_size * job.width)
    return size.layer * (job.devices > 1) + 4 * tile * (model.intermediate_size + model.hidden_size) * job.width


# ----------------------------------------------------------------------------------------------------------- the update


def update_work(job: Job) -> int:
    """Temporary bytes of the optimizer's update: for one layer of the largest parameter, or a chunk of a table."""
    matrix = job.trained.largest_stack // job.model.num_layers
    table = job.parameters.head if job.trained.tables else 0
    return 40 * max(matrix // job.devices, min(table // job.devices, UPDATE_CHUNK))
