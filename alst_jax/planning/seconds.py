"""Seconds of a step, its traffic to the host and between devices: the part of the cost model that counts operations."""

from alst_jax.hardware.machines import Cluster
from alst_jax.ops.attention import costs
from alst_jax.parallel.ulysses import Ulysses
from alst_jax.planning.footprint import state_bytes, trained_bytes
from alst_jax.planning.job import Job, Term, total
from alst_jax.profile import HOST

STREAMED = 0.94  # the part of the host link's rate that the streamed update reaches
EXPOSED = 0.35  # of host traffic's time, not hidden: most reads (docs/log.md, copies to and from host memory)
COPIES = 4.0  # of kept q, k, v, gate and up in device memory
BACKWARD = 2.5  # FLOPs of attention's backward pass, in forwards


def seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Predicted seconds of one optimizer step: the ledger's terms by name; they add up."""
    result = {}
    for term in ledger(job, cluster):
        result[term.name] = result.get(term.name, 0) + term.value
    return result


def ledger(job: Job, cluster: Cluster) -> list[Term]:
    """Predicted seconds of one optimizer step. Traffic that overlaps with arithmetic counts as nothing."""
    model, machine, passes = job.model, cluster.machine, job.passes
    rows, batches, d, h = job.rows / job.dp, job.grad_accum, model.hidden_size, model.head_dim
    tokens = rows * job.length / job.sp
    projections = d * (model.num_heads + 2 * model.num_kv_heads) * h
    others = d * model.num_heads * h + 3 * d * model.intermediate_size  # output projection and MLP
    products = passes.projections * projections + passes.after_attention * others
    if model.qk_norm == "all heads" and job.profile.head_chunks > 1:  # the mean squares of all heads, apart
        squares = passes.attention_forward + model.num_layers
        products += squares * d * (model.num_heads + model.num_kv_heads) * h
    products -= passes.gate_and_up_known * 2 * d * model.intermediate_size
    layers, weights = model.num_layers * (projections + others), job.trained  # frozen weights have no gradient
    products += layers + weights.kernels + 5 * weights.adapters + 2 * model.vocab_size * d + weights.head
    pairs = model.layer_pairs(job.length)
    again = sum(pairs[layer] for layer in job.recomputed_attention)
    attention = 4.0 * model.num_heads * h * rows / job.sp * job.attention_share  # FLOPs of a pair, forward
    length, packed, heads = int(job.length * job.attention_share), job.documents > 0, job.attention.local_heads
    speed = lambda which: costs.speed(job.profile.attention, which, length, machine.peak_flops, packed, heads)
    terms = [
        Term("attention forward", (sum(pairs) + again) * attention / speed("forward"), job.profile.attention),
        Term("attention backward", sum(pairs) * BACKWARD * attention / speed("backward"), job.profile.attention),
        Term("matmuls", machine.matmul_seconds(2.0 * products * tokens, job.width), "projections, MLP, logits"),
        Term("matmuls", tile_sum_bytes(job) / machine.bandwidth, "device memory: float32 sums over tiles"),
        Term("matmuls", adapter_bytes(job) / machine.bandwidth, "device memory: inputs and outputs of adapters"),
        Term("matmuls", kept_copies(job) / machine.bandwidth, "device memory: copies of kept q, k, v, gate and up"),
    ]
    hidden, moved = total(terms), traffic(job)
    copies, ahead = moved["step"] / machine.host_link, moved["ahead"] / machine.host_link
    sent = {name: call["bytes"] for name, call in collectives(job).items()}
    link = lambda name: machine.network if over_hosts(name, job, cluster) else machine.interconnect
    swapped = sent.pop("all-to-all") / batches / link("all-to-all")
    gathered = sum(sent.values()) / batches / link("all-gather")
    terms += [
        Term(
            "host traffic", max(EXPOSED * (copies - ahead), copies - hidden), "host link: what arithmetic does not hide"
        ),
        Term("collectives", swapped, "all-to-all"),
        Term("collectives", max(0.0, gathered - hidden), "gather and reduce-scatter, beyond arithmetic"),
    ]
    return [
        *(term._replace(value=batches * term.value) for term in terms),
        Term("host traffic", moved["update"] / (STREAMED * machine.host_link), "host link: the update"),
        Term("optimizer", moved["device"] / machine.bandwidth, "device memory: the update"),
    ]


def forward_seconds(job: Job, cluster: Cluster, documents: dict[int, int]) -> float:
    """Predicted seconds of the forward passes over so many documents of each length, packed into the job's batches."""
    machine, model, tokens = cluster.machine, job.model, sum(length * count for length, count in documents.items())
    matmuls = machine.matmul_seconds(2.0 * tokens * (job.parameters.kernels + job.parameters.head), job.width)
    flops = lambda length: 4.0 * model.num_heads * model.head_dim * model.causal_pairs(length)
    speed = lambda length: costs.speed(job.profile.attention, "forward", length, machine.peak_flops, packed=True)
    attention = sum(count * flops(length) / speed(length) for length, count in documents.items())
    batches = -(-tokens // (job.rows * job.length))
    copies = batches * state_bytes(job)[0] / machine.host_link if job.profile.offload_weights else 0.0
    computed = (matmuls + attention) / job.devices
    return computed + max(EXPOSED * copies, copies - computed)


def traffic(job: Job) -> dict[str, float]:
    """Bytes that one device moves. "step": to and from host memory in a forward and backward pass; "ahead": of these,
    read a layer ahead; "update": to and from host memory in the update; "device": in device memory in the update."""
    (weights, gradients, optimizer), profile, written = state_bytes(job), job.profile, trained_bytes(job)
    step = 2.0 * (job.kept[HOST] + job.shared_inputs * job.sizes.hidden)
    moved = {True: 0.0, False: 0.0}  # in host memory or not
    if profile.offload_weights:
        step += weights * job.passes.loads / job.model.num_layers + gradients * (2 if job.sums_in_place else 1)
    # For the norm and for the update; there and back, or only back where the layer is on the device already.
    moved[profile.offload_weights] += written if profile.update_in_backward else 2 * gradients + 2 * written
    moved[profile.offload_optimizer] += 2 * optimizer
    ahead = sum(job.read_ahead(segment)[1] for segment in job.segments) if profile.remat else 0
    return {"step": step, "ahead": float(ahead), "update": moved[True], "device": moved[False]}


def tile_sum_bytes(job: Job) -> float:
    """Bytes moved to sum float32 weight gradients over tiles: each is written, read with the sum, the sum written."""
    tiles = lambda tile: 0 if tile >= job.tokens else -(-job.tokens // tile)
    layers = job.model.num_layers * job.trained.layer * tiles(job.tiles.mlp)
    return 16.0 * (layers + job.trained.head * tiles(job.tiles.loss))


def kept_copies(job: Job) -> float:
    """Bytes moved to keep q, k, v, gate and up: their stacks are cleared, then copied to and read from; q, k and v of
    a layer are copied again before their backward pass."""
    profile, level = job.profile, job.level_bytes
    return COPIES * (profile.keep_qkv_on_device * level(True, False) + profile.keep_mlp_on_device * level(False, True))


def spared_by_byte(job: Job, cluster: Cluster) -> float:
    """Seconds of a step that a byte of kept q, k, v, gate or up spares at most: the products of a column of a matrix,
    twice where a segment is rebuilt, less the copies."""
    times = 1 if max(job.profile.segment_layers) == 1 else 2
    products = cluster.machine.matmul_seconds(times * 2.0 * job.model.hidden_size, job.width)
    return max(0.0, job.grad_accum * (products / job.width - COPIES / cluster.machine.bandwidth))


def over_hosts(collective: str, job: Job, cluster: Cluster) -> bool:
    """Whether a collective goes over hosts. Weights and gradients are shared by all devices; a sequence by the --sp
    devices of a row."""
    return cluster.hosts > 1 and (collective != "all-to-all" or job.sp > cluster.per_host)


def adapter_bytes(job: Job) -> float:
    """Bytes of the hidden states that adapters read and write: low-rank products take the time of their copies. Forward
    an input is read, an output read and written; backward about as much twice."""
    if job.model.lora is None:
        return 0.0
    columns = job.parameters.adapters // job.model.lora.rank  # inputs and outputs of all adapters
    again = job.passes.after_attention / job.model.num_layers
    return float(columns * job.tokens * job.width) * (1.5 * again + 2.5)


def collectives(job: Job) -> dict[str, dict[str, int]]:
    """Calls of each collective in a step, and the bytes that one device sends in them."""
    n, batches, passes, layers = job.devices, job.grad_accum, job.passes, job.model.num_layers
    sizes, trained, several = job.parameters, job.trained, job.devices > 1
    others = lambda elements, width: batches * elements * width * (n - 1) // n
    swaps, width = Ulysses.traffic(job.attention), 2 if job.profile.reduce_dtype == "bfloat16" else 4
    both = lambda forward, backward: batches * (passes.attention_forward * forward + layers * backward)
    found = {
        "all-to-all": (
            both(swaps.forward_calls, swaps.backward_calls),
            both(swaps.forward_bytes, swaps.backward_bytes),
        ),
        "all-gather": (  # beside the layers: the embedding's table, the norm, the head's table
            several * batches * (sizes.layer_leaves * passes.loads + 3),
            others(sizes.layer * passes.loads + sizes.head * 2, job.width),
        ),
        "reduce-scatter": (
            several * batches * (trained.layer_leaves * layers + trained.other_leaves),
            others(trained.layer * layers + trained.tables, width),
        ),
        "all-reduce": (several * (batches + 1), several * 4 * (batches + 1)),
    }
    return {name: {"calls": calls, "bytes": size} for name, (calls, size) in found.items()}
