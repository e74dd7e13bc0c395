"""Seconds of a step, its traffic to the host and between devices: the part of the cost model that counts operations."""

import math

from alst_jax.hardware.machines import Cluster
from alst_jax.ops.attention import buckets, flash_rates
from alst_jax.parallel.ulysses import Ulysses
from alst_jax.planning.footprint import loss_tokens, mlp_tokens, state_bytes, trained_bytes
from alst_jax.planning.job import Job, Term, total
from alst_jax.profile import HOST

# The part of the peak that is reached, measured on an H100 and an H200 at head dim 128 (docs/log.md,
# benchmarks/results): matrix products, and causal attention by tokens of the whole sequence. Other machines are assumed
# to reach the same part.
MATMUL = 650 / 989
ATTENTION = {
    "cudnn": {"forward": {32768: 647, 131072: 590, 524288: 481}, "backward": {32768: 529, 131072: 513, 524288: 550}},
} | flash_rates.RATES
# Packed documents: TFLOP/s of useful work by the sum of the documents' squares over the sum of their lengths.
DOCUMENTS = {"flash": flash_rates.DOCUMENT_RATES,
             "cudnn": {"forward": buckets.DOCUMENT_RATES, "backward": buckets.DOCUMENT_RATES}}
MEASURED_PEAK = 989  # TFLOP/s of the measured device
SLOW_ATTENTION = 0.05  # part of the peak, for kernels that are not in the table
UPDATE_BYTES_PER_SECOND = 0.94  # of the host link's, reached by the streamed update
# The part of host traffic's time that is not hidden (docs/log.md: 28,786 to 26,853 tok/s with all offloaded).
EXPOSED = 0.55
BACKWARD = 2.5  # FLOPs of attention's backward pass, in forwards


def attention_speed(implementation: str, which: str, length: int, peak: float, packed: bool = False) -> float:
    """FLOP/s of causal FLOPs at sequences of `length`, between the measured lengths by the logarithm. packed: of
    documents, where `length` is the sum of their squares over the sum of their lengths."""
    if implementation not in ATTENTION:
        return SLOW_ATTENTION * peak
    rates = DOCUMENTS.get(implementation, ATTENTION[implementation]) if packed else ATTENTION[implementation]
    points = sorted(rates[which].items())
    length = min(max(length, points[0][0]), points[-1][0])
    for (low, slow), (high, fast) in zip(points, points[1:]):
        if length <= high:
            part = math.log(length / low) / math.log(high / low)
            return (slow + part * (fast - slow)) / MEASURED_PEAK * peak
    raise AssertionError("the points cover their own range")


def seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Predicted seconds of one optimizer step: the ledger's terms by name; they add up."""
    terms = ledger(job, cluster)
    return {name: sum(term.value for term in terms if term.name == name) for name in dict.fromkeys(t.name for t in terms)}


def ledger(job: Job, cluster: Cluster) -> list[Term]:
    """Predicted seconds of one optimizer step. Traffic that overlaps with arithmetic counts as nothing."""
    model, machine, passes = job.model, cluster.machine, job.passes
    rows = job.rows / job.dp
    tokens = rows * job.length / job.sp
    batches = job.grad_accum
    d, h = model.hidden_size, model.head_dim
    projections = d * (model.num_heads + 2 * model.num_kv_heads) * h
    others = d * model.num_heads * h + 3 * d * model.intermediate_size  # output projection and MLP
    products = passes.projections * projections + passes.after_attention * others
    if model.qk_norm == "all heads" and job.profile.head_chunks > 1:  # the mean squares of all heads, apart
        squares = passes.attention_forward + model.num_layers
        products += squares * d * (model.num_heads + model.num_kv_heads) * h
    products += 2 * model.num_layers * (projections + others) + 3 * model.vocab_size * d
    pairs = model.layer_pairs(job.length)
    again = sum(pairs[layer] for layer in job.recomputed_attention)
    attention = 4.0 * model.num_heads * h * rows / job.sp * job.attention_share  # FLOPs of a pair, forward
    speed = lambda which: attention_speed(
        job.profile.attention, which, int(job.length * job.attention_share), machine.peak_flops, job.documents > 0)
    width = 1 if job.width == 2 else 16  # float32 products do not use the same units
    terms = [
        Term("attention forward", (sum(pairs) + again) * attention / speed("forward"), job.profile.attention),
        Term("attention backward", sum(pairs) * BACKWARD * attention / speed("backward"), job.profile.attention),
        Term("matmuls", 2.0 * products * tokens * width / (MATMUL * machine.peak_flops), "projections, MLP, logits"),
        Term("matmuls", tile_sum_bytes(job) / machine.bandwidth, "device memory: float32 sums over tiles")]
    hidden = total(terms)
    traffic = host_traffic(job)
    copies = traffic["step"] / machine.host_link
    wires = machine.interconnect if cluster.hosts == 1 else machine.network
    calls = collectives(job)
    wire = machine.interconnect if job.sp <= cluster.per_host else machine.network
    swapped = calls["all-to-all"]["bytes"] / batches / wire
    gathered = sum(call["bytes"] for name, call in calls.items() if name != "all-to-all") / batches / wires
    terms += [
        Term("host traffic", max(EXPOSED * copies, copies - hidden), "host link: what arithmetic does not hide"),
        Term("collectives", swapped, "all-to-all"),
        Term("collectives", max(0.0, gathered - hidden), "gather and reduce-scatter, beyond arithmetic")]
    return [*(term._replace(value=batches * term.value) for term in terms),
            Term("host traffic", traffic["update"] / (UPDATE_BYTES_PER_SECOND * machine.host_link), "host link: the update"),
            Term("optimizer", device_update_bytes(job) / machine.bandwidth, "device memory: the update")]


def host_traffic(job: Job) -> dict[str, float]:
    """Bytes of one device to and from host memory: in a forward and backward pass ("step") and in the update."""
    weights, gradients, optimizer = state_bytes(job)
    profile, written = job.profile, trained_bytes(job)
    step = 2.0 * (job.kept[HOST] + job.shared_inputs * job.sizes.hidden)
    update = 0.0
    if profile.offload_weights:
        step += weights * job.passes.loads / job.model.num_layers + gradients
        # For the norm and for the update; there and back, or only back where the layer is on the device already.
        update += written if profile.update_in_backward else 2 * gradients + 2 * written
    if profile.offload_optimizer:
        update += 2 * optimizer
    return {"step": step, "update": update}


def tile_sum_bytes(job: Job) -> float:
    """Bytes read and written to sum the weights' float32 gradients over tiles. Each tile's gradient is written, then
    read with the sum, which is written back."""
    tiles = lambda tile: 0 if tile >= job.tokens else -(-job.tokens // tile)
    layers = job.model.num_layers * job.trained.layer * tiles(mlp_tokens(job))
    return 16.0 * (layers + job.trained.head * tiles(loss_tokens(job)))


def device_update_bytes(job: Job) -> float:
    """Bytes that the update reads and writes in device memory."""
    _, gradients, optimizer = state_bytes(job)
    here = 0 if job.profile.offload_weights else 2 * gradients + 2 * trained_bytes(job)
    return float(here + (0 if job.profile.offload_optimizer else 2 * optimizer))


def collectives(job: Job) -> dict[str, dict[str, int]]:
    """Calls of each collective in a step, and the bytes that one device sends in them."""
    n, batches, passes, layers = job.devices, job.grad_accum, job.passes, job.model.num_layers
    sizes, trained = job.parameters, job.trained
    gathered = sizes.layer * passes.loads + sizes.head * 2
    reduced = trained.layer * layers + trained.tables
    calls = {name: {"calls": 0, "bytes": 0} for name in ("all-to-all", "all-gather", "reduce-scatter", "all-reduce")}
    if n > 1:
        others = lambda elements, width: batches * elements * width * (n - 1) // n
        # Beside the layers: the embedding's table, the norm, the head's table.
        calls["all-gather"] = {"calls": batches * (sizes.layer_leaves * passes.loads + 3),
                               "bytes": others(gathered, job.width)}
        calls["reduce-scatter"] = {"calls": batches * (trained.layer_leaves * layers + trained.other_leaves),
                                   "bytes": others(reduced, 2 if job.profile.reduce_dtype == "bfloat16" else 4)}
        calls["all-reduce"] = {"calls": batches + 1, "bytes": 4 * (batches + 1)}
    traffic = Ulysses.traffic(job.attention)
    total = lambda forward, backward: batches * (passes.attention_forward * forward + layers * backward)
    calls["all-to-all"] = {"calls": total(traffic.forward_calls, traffic.backward_calls),
                           "bytes": total(traffic.forward_bytes, traffic.backward_bytes)}
    return calls
