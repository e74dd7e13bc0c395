"""Bytes that a step needs on one device: for each moment that may be the peak, a ledger of the arrays that are alive.

From arithmetic alone: nothing is traced or compiled. `python -m benchmarks.plan_accuracy` prints the errors against the
compiler's bytes. A term names the file whose arrays it counts, or XLA for arrays that the compiler keeps besides.
"""

import functools

from alst_jax.ops.attention import costs
from alst_jax.optim.formats import WIDTHS, moment_bytes
from alst_jax.planning.job import Job, Term, total
from alst_jax.profile import DEVICE
from alst_jax.segments import Segment, segment_inputs
from alst_jax.xla import host

FRAGMENTS = 1.015  # the allocator's peak over the sum of the live arrays
STACK, LAYER, ENDS, LOSS, UPDATE = "stack/stack", "stack/layer", "stack/ends", "ops/cross_entropy", "optim/streamed"
ATTENTION, MESH, XLA = "ops/attention", "parallel", "XLA"
KEPT = "kept activations"


def states(job: Job) -> dict[str, list[Term]]:
    """Weights, gradients and optimizer state: one device's shards."""
    shard, sizes = lambda whole: -(-whole // job.devices), job.trained
    trained, stored = shard(sizes.total), not job.profile.update_in_backward
    narrow = shard(sizes.total - sizes.adapters)
    # Adapters, float32 themselves, have master weights only where others have: one tree holds both.
    wide = 4 * shard(sizes.adapters) * (narrow > 0 and job.master != "none")
    master = (narrow * WIDTHS[job.master] + wide) * (job.width == 2)
    return {
        "weights": [Term("weights", shard(job.parameters.bytes(job.width)), "models/block")],
        "gradients": [
            Term("gradients", stored * trained_bytes(job) * (not job.sums_in_place), STACK),
            Term("their float32 sums over batches", 4 * trained * stored * (job.grad_accum > 1), UPDATE),
        ],
        "optimizer": [
            Term(f"moments, {job.states}", int(trained * 2 * moment_bytes(job.states)), "optim/formats"),
            Term(f"master weights, {job.master}", master, "optim/formats"),
        ],
    }


def state_bytes(job: Job) -> tuple[int, int, int]:
    """Weights, gradients and optimizer state: one device's shards."""
    return tuple(map(total, states(job).values()))


def states_on_device(job: Job) -> int:
    """Bytes of one device's shards that are not in host memory."""
    return sum(total(terms) for part, terms in states(job).items() if not job.profile.on_host(part))


def trained_bytes(job: Job) -> int:
    """One device's shards of the weights that the update writes."""
    return -(-job.trained.bytes(job.width) // job.devices)


def working_set(job: Job) -> int:
    """The peak of live bytes beside the states and the batch, with the activations kept on the device."""
    return total(peak(job)[1])


def peak(job: Job) -> tuple[str, list[Term]]:
    """The moment with the most live bytes, and its ledger."""
    moments = {"the loss": at_loss(job), "the backward pass of the layers": in_backward(job), "the end": at_end(job)}
    moment, terms = max(moments.items(), key=lambda item: total(item[1]))
    whole = total(terms)
    terms = [*terms, Term("fragments of the allocator", int(FRAGMENTS * whole) - whole, XLA)]
    update = [Term("update of one layer", update_work(job), UPDATE)]
    return max((moment, terms), ("the update", update), key=lambda item: total(item[1]))


def at_loss(job: Job) -> list[Term]:
    """At the loss. A single tile of it takes the last hidden state as it is, and two hidden states are alive."""
    size, tile, tokens = job.sizes, job.tiles.loss, job.tokens
    return [
        Term(KEPT, job.kept[DEVICE], STACK),
        Term("hidden states", (3 if tile < tokens else 2) * size.hidden, ENDS),
        Term("a tile of the hidden state", (tile < tokens) * tile * job.model.hidden_size * job.width, LOSS),
        Term("the head's table, logits, their gradients", head_work(job), LOSS),
        Term("rotary embeddings", size.rope, "models/block"),
        gathered_embedding(job),
        Term("arrays in the buffers of gradients", -in_results(job), XLA),
    ]


def head_work(job: Job) -> int:
    """The head's table and, if it is trained, its float32 gradient; a tile's logits, in float32 and as their
    gradient."""
    size, tile = job.sizes, job.tiles.loss
    wide, logits = job.trained.head * 4, tile * job.model.vocab_size
    work = size.table + (4 + job.width) * logits
    if job.devices == 1:  # the table is not gathered
        work = max(size.table + 4 * logits, (4 + job.width) * logits)
    if job.tokens % tile:  # a shorter last tile has logits of its own and, on a mesh, a gradient of its own, made early
        work += (wide if job.devices > 1 else 0) + job.tokens % tile * job.model.vocab_size * job.width
    # Of a single tile the logits' gradient is in float32 at first.
    return max(work + wide, 8 * logits * (job.profile.loss_tile is None))


def in_results(job: Job) -> int:
    """Bytes of temporary arrays that XLA puts in the buffers of gradients on the device, if these are large enough."""
    if job.profile.offload_weights or job.sums_in_place:  # buffers of sums hold sums from the beginning
        return 0
    size, largest = job.sizes, job.trained.largest_stack * job.width // job.devices
    logits = 4 * job.tiles.loss * job.model.vocab_size * (job.profile.loss_tile is None)
    if largest < max(size.table, logits):
        return 0
    return state_bytes(job)[1] if largest >= size.table * 4 // job.width else size.table


def gathered_embedding(job: Job) -> Term:
    """The gathered table of the embedding. It stays until the first segment's input is looked up again."""
    return Term("gathered embedding", 0 if job.devices == 1 or job.segments[0].all_inputs else job.sizes.table, MESH)


def at_end(job: Job) -> list[Term]:
    """After the layers. A frozen embedding has no gradient."""
    tied = job.model.tie_word_embeddings
    wide, n = 4 * (job.trained.tables if tied else job.trained.tables - job.trained.head), job.devices
    return [Term("the embedding's gradient", wide, ENDS), Term("its shard", wide // n * (n > 1), MESH)]


def in_backward(job: Job) -> list[Term]:
    """In the backward pass of the layers, at the segment that needs most."""
    profile, size, waiting = job.profile, job.sizes, layers_that_wait(job.segments)
    if not profile.remat:
        return [Term(KEPT, job.kept[DEVICE], "stack/plain"), *layer_work(job)]
    kept = 0 if profile.offload_activations else size.hidden * segment_inputs(job.segments, False)  # to the end
    (shard, places), most, work = unlooped(job), [], functools.cache(functools.partial(layer_work, job))
    swap = job.attention_work
    for segment in job.segments:  # first to last: `kept` is alive when the backward pass reaches this segment
        count, here = segment.layers, sum(run.layers for run in segment.runs if run.memory == DEVICE)
        kept += job.saved(segment)[DEVICE]
        terms = [Term(KEPT, kept, STACK), Term("recomputed residuals", rebuilt_bytes(job, segment), STACK)]
        terms.append(Term("a layer read ahead", job.read_ahead(segment)[0], "stack/rows"))
        if swap.output_copy:  # made before its swap, as soon as the outputs exist
            # The copy waits neither for the norm's gradient nor for the segment to be rebuilt.
            early = size.hidden * (2 - profile.offload_weights) if segment.all_inputs else 2 * size.hidden + size.heads
            copies = [Term("early copies of outputs", here * size.heads, XLA), Term("h, dh, o", early, LAYER)]
            most = max(most, terms + copies, key=total)
        alone = [*work(False), Term("float32 gradients of later layers", waiting[segment] * shard, XLA)]
        in_loop = work(not segment.all_inputs) if segment.loops else alone
        terms += in_loop if segment.all_inputs else max(in_loop, alone, key=total)
        if segment.all_inputs and count == 1:  # outside of a loop h and o are the kept arrays, not copies of a row
            terms.append(Term("h and o, kept already", -size.hidden - here * size.heads, STACK))
        if count == 2 and not (segment.all_inputs or here) and profile.head_chunks == 1:
            # Buffers for queries and keys of the first layer. Where attention swaps over devices, its output exists
            # twice, and the last segment is rebuilt before the gradient of the last norm, whose inputs wait.
            waits = size.hidden * swap.swaps * (segment is job.segments[-1])
            early = size.heads + size.kv + swap.lone_output_copy + waits
            terms.append(Term("early arrays of two layers", early, XLA))
        most = max(most, [*terms, Term("arrays in the buffers of gradients", -places, XLA)], key=total)
    return [*most, gathered_embedding(job)]


def rebuilt_bytes(job: Job, segment: Segment) -> int:
    """Residuals that are recomputed before the backward pass of a segment."""
    held = lambda run: not (run.place or job.profile.rebuild_inputs_alone)  # without, layers recompute their outputs
    outputs = sum(min(run.stop, segment.rebuilt.stop) - run.start for run in segment.runs if held(run))
    return len(segment.rebuilt) * job.sizes.hidden + outputs * (job.sizes.heads + job.sizes.statistics)


def unlooped(job: Job) -> tuple[int, int]:
    """Bytes where gradients stay on the device, otherwise zeros.

    First: one layer's float32 gradients, which wait until the next loop over layers, or the end. Second: where no loop
    goes over layers, the buffers of results (three of the MLP, two of q and o) that hold temporary arrays before, each
    an array that fits.
    """
    size, model = job.sizes, job.model
    if job.profile.offload_weights:
        return 0, 0
    column = model.num_layers * model.hidden_size * job.width // job.devices
    holds = lambda columns: next((array for array in (size.hidden, size.kv) if array <= columns * column), 0)
    places = 3 * holds(model.intermediate_size) + 2 * holds(model.num_heads * model.head_dim)
    places *= job.trained == job.parameters and not job.sums_in_place  # frozen parameters have no such buffers
    return job.trained.layer * 4 // job.devices, places * (not any(segment.loops for segment in job.segments))


def layers_that_wait(segments: list[Segment]) -> dict[Segment, int]:
    """For each segment, the layers that the backward pass has done since its last loop."""
    found, waiting = {}, 0
    for segment in reversed(segments):
        found[segment] = waiting
        waiting = 0 if segment.loops else waiting + segment.layers
    return found


def layer_work(job: Job, rebuilt: bool = False) -> list[Term]:
    """One layer's backward pass beside kept and rebuilt activations: at the attention or in a tile of the MLP. rebuilt:
    whether it is in a rebuilt segment of more than two layers."""
    size, profile, work = job.sizes, job.profile, job.attention_work
    heads = (job.attention.local_heads, job.attention.local_kv_heads, job.model.head_dim)
    workspace = costs.workspace(profile.attention, job.rows // job.dp, job.length, *heads, job.documents)
    slices = costs.document_slices(profile.attention, job.length, *heads, job.width) * (job.documents > 0)
    attention = [
        Term("q, k, v and their gradients", work.peak, MESH),
        Term("workspace", workspace * job.count_workspace, ATTENTION),
        Term("slices of documents", slices, ATTENTION),
    ]
    mlp = [
        Term("weights, and a tile of the MLP", mlp_work(job), LAYER),
        Term("copy of o", work.output_copy, XLA),
        Term("masks of dropout", dropout_work(job), "ops/dropout"),
    ]
    if rebuilt and (profile.head_chunks == 1 or not work.swaps):  # the old dh, until all its rows are read
        attention.append(Term("the old dh", size.hidden * work.swaps, XLA))
        mlp.append(Term("the old dh", size.hidden, XLA))
    sums = 4 * job.trained.layer if job.tiles.mlp < job.tokens else 0
    # The head's gradient waits to be copied to the host, or a tied one for the embedding's.
    waits = profile.offload_weights or job.model.tie_word_embeddings
    head = job.trained.head * (job.width if profile.offload_weights else 4) // job.devices if waits else 0
    return [
        Term("h and dh", 2 * size.hidden, LAYER),
        Term("o and do", 2 * size.heads, LAYER),
        Term("rotary embeddings", size.rope, "models/block"),
        Term("log-sum-exps", size.statistics, ATTENTION),
        Term("float32 sums of weight gradients", sums, LAYER),
        Term("the head's gradient", head, ENDS),
        *max(attention, mlp, key=total),
    ]


def mlp_work(job: Job) -> int:
    """The layer's weights, and a tile's intermediates and weight gradients.

    With a single tile: four arrays [T, F] and four [T, D]; one device then has only one matrix at a time.
    """
    size, model, tile = job.sizes, job.model, job.tiles.mlp
    if tile < job.tokens:
        return size.layer + int(4.75 * tile * model.intermediate_size * job.width)
    return size.layer * (job.devices > 1) + 4 * tile * (model.intermediate_size + model.hidden_size) * job.width


def dropout_work(job: Job) -> int:
    """A tile's inputs of the MLP's adapters after dropout, with their masks. The keys of a step's tokens are small."""
    columns = job.model.intermediate_size + 2 * job.model.hidden_size
    return (job.model.dropout > 0) * job.tiles.mlp * columns * (job.width + 1)


def update_work(job: Job) -> int:
    """Temporary bytes of the optimizer's update: for one layer of the largest parameter, or a chunk of a table."""
    matrix = job.trained.largest_stack // job.model.num_layers
    table = job.parameters.head if job.trained.tables else 0
    return 40 * max(matrix // job.devices, min(table // job.devices, host.CHUNK_BYTES // 4))
