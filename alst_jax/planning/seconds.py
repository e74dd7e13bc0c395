"""How long a step takes, and what it sends over the wire: the part of the cost model that counts operations."""

import dataclasses
import math
from typing import TYPE_CHECKING

from alst_jax.hardware.machines import Cluster

if TYPE_CHECKING:
    from alst_jax.planning.footprint import Job

# Part of the peak that is reached, measured on an H100 and an H200 at head dim 128 (docs/log.md; benchmarks/results):
# matrix products, and causal attention by tokens of the whole sequence. Other machines are assumed to reach the same
# part.
MATMUL = 650 / 989
ATTENTION = {
    "cudnn": {"forward": {32768: 647, 131072: 590, 524288: 481}, "backward": {32768: 529, 131072: 513, 524288: 550}},
    "tokamax": {"forward": {32768: 645, 131072: 652, 524288: 646}, "backward": {32768: 529, 131072: 513, 524288: 550}},
}
MEASURED_PEAK = 989  # TFLOP/s, of the device those numbers are from
SLOW_ATTENTION = 0.05  # part of the peak, of kernels that are not in the table
UPDATE_BYTES_PER_SECOND = 0.94  # of the host link's, reached by the streamed update
# of the time host traffic takes, that is not hidden (docs/log.md: 28,786 to 26,853 tok/s with all offloaded)
EXPOSED = 0.55
BACKWARD = 2.5  # FLOPs of attention's backward pass, in forwards


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often, summed over the layers, something is done in one forward and backward pass."""

    attention_forward: int
    projections: int  # of q, k and v, forward
    behind: int  # output projection and MLP, forward
    loads: int  # a layer's weights brought to where they are used

    @staticmethod
    def of(job: "Job") -> "Passes":
        layers, profile = job.model.num_layers, job.profile
        if not profile.remat:
            again = layers if profile.mlp_tile is not None else 0
            return Passes(layers, layers, layers + again, layers)
        kept = rebuilt = rebuilt_with_attention = 0
        for segment in job.segments:
            count = segment.runs[-1].stop - segment.runs[0].start
            kept += sum(run.stop - run.start for run in segment.runs if run.place)
            if not segment.all_inputs:
                rebuilt += count - 1
                rebuilt_with_attention += count - 1 - sum(
                    run.stop - run.start for run in segment.runs if run.place) + (segment.runs[-1].place is not None)
        again = layers - kept  # attention forwards, whether in rebuilding or in the layer's own turn
        return Passes(layers + again, 3 * layers + again, 2 * layers + rebuilt, 2 * layers + rebuilt)


def attention_speed(implementation: str, which: str, length: int, peak: float) -> float:
    """FLOP/s of causal FLOPs at sequences of `length`, between the measured lengths by the logarithm."""
    if implementation not in ATTENTION:
        return SLOW_ATTENTION * peak
    points = sorted(ATTENTION[implementation][which].items())
    length = min(max(length, points[0][0]), points[-1][0])
    for (low, slow), (high, fast) in zip(points, points[1:]):
        if length <= high:
            part = math.log(length / low) / math.log(high / low)
            return (slow + part * (fast - slow)) / MEASURED_PEAK * peak
    raise AssertionError("the points cover their own range")


def seconds(job: "Job", cluster: Cluster) -> dict[str, float]:
    """Predicted seconds of one optimizer step, by term; they add up. What hides behind the arithmetic counts as
    nothing."""
    model, machine, passes = job.model, cluster.machine, job.passes
    rows = job.rows / job.dp
    tokens = rows * job.length / job.sp
    batches = job.grad_accum
    d, h = model.hidden_size, model.head_dim
    projections = d * (model.num_heads + 2 * model.num_kv_heads) * h
    behind = d * model.num_heads * h + 3 * d * model.intermediate_size
    products = passes.projections * projections + passes.behind * behind
    products += 2 * model.num_layers * (projections + behind) + 3 * model.vocab_size * d
    attention = 2.0 * job.length**2 * model.num_heads * h * rows / job.sp
    speed = lambda which: attention_speed(job.profile.attention, which, job.length, machine.peak_flops)
    width = 1 if job.width == 2 else 16  # float32 products do not use the same units
    terms = {
        "attention forward": passes.attention_forward * attention / speed("forward"),
        "attention backward": model.num_layers * BACKWARD * attention / speed("backward"),
        "matmuls": 2.0 * products * tokens * width / (MATMUL * machine.peak_flops),
    }
    terms["matmuls"] += tile_sum_bytes(job) / machine.bandwidth
    hidden = sum(terms.values())
    traffic = host_traffic(job)
    copies = traffic["step"] / machine.host_link
    terms["host traffic"] = max(EXPOSED * copies, copies - hidden)
    wires = machine.interconnect if cluster.hosts == 1 else machine.network
    calls = collectives(job)
    wire = machine.interconnect if job.sp <= cluster.per_host else machine.network
    swapped = calls["all-to-all"]["bytes"] / batches / wire
    others = sum(call["bytes"] for name, call in calls.items() if name != "all-to-all") / batches / wires
    terms["collectives"] = swapped + max(0.0, others - hidden)  # weights are gathered while something else is computed
    terms = {name: batches * value for name, value in terms.items()}
    terms["host traffic"] += traffic["update"] / (UPDATE_BYTES_PER_SECOND * machine.host_link)
    terms["optimizer"] = device_update_bytes(job) / machine.bandwidth
    return terms


def host_traffic(job: "Job") -> dict[str, float]:
    """Bytes of one device to and from host memory: in a forward and backward pass ("step") and in the update."""
    from alst_jax.planning.footprint import HOST, state_bytes

    weights, gradients, optimizer = state_bytes(job)
    profile, layers = job.profile, job.model.num_layers
    step = 2.0 * job.kept[HOST]
    update = 0.0
    if profile.offload_weights:
        step += weights * job.passes.loads / layers + gradients
        # For the norm and for the update; there and back, or only back where the layer is on the device already.
        update += weights if profile.update_in_backward else 2 * gradients + 2 * weights
    if profile.offload_optimizer:
        update += 2 * optimizer
    return {"step": step, "update": update}


def tile_sum_bytes(job: "Job") -> float:
    """Bytes read and written to sum the weights' float32 gradients over tiles: that of each tile is written, then read
    with the sum, which is written back."""
    from alst_jax.planning.footprint import loss_tokens, mlp_tokens

    tokens, size = job.rows * job.length // job.devices, job.sizes
    tiles = lambda tile: 0 if tile >= tokens else -(-tokens // tile)
    layers = job.model.num_layers * size.layer * tiles(mlp_tokens(job))
    return 16.0 * (layers + size.table * tiles(loss_tokens(job))) / job.width


def device_update_bytes(job: "Job") -> float:
    """Bytes that the update reads and writes in device memory."""
    from alst_jax.planning.footprint import state_bytes

    weights, gradients, optimizer = state_bytes(job)
    here = 0 if job.profile.offload_weights else 2 * gradients + 2 * weights
    return float(here + (0 if job.profile.offload_optimizer else 2 * optimizer))


def collectives(job: "Job") -> dict[str, dict[str, int]]:
    """Calls of each collective in a step, and the bytes that one device sends in them."""
    model, size, n, sp = job.model, job.sizes, job.devices, job.sp
    batches, passes = job.grad_accum, job.passes
    leaves = 9 + (4 if model.attention_bias else 0) + (3 if model.mlp_bias else 0)  # of a layer
    tables = 1 if model.tie_word_embeddings else 2
    gathered = size.layer * passes.loads + size.table * 2
    reduce_width = 2 if job.profile.reduce_dtype == "bfloat16" else 4
    reduced = (size.layer * model.num_layers + size.table * tables) * reduce_width // job.width
    calls = {name: {"calls": 0, "bytes": 0} for name in ("all-to-all", "all-gather", "reduce-scatter", "all-reduce")}
    if n > 1:
        others = lambda whole: batches * whole * (n - 1) // n
        calls["all-gather"] = {"calls": batches * (leaves * passes.loads + 3), "bytes": others(gathered)}
        calls["reduce-scatter"] = {"calls": batches * (leaves * model.num_layers + 1 + tables),
            "bytes": others(reduced)}
        calls["all-reduce"] = {"calls": batches + 1, "bytes": 4 * (batches + 1)}
    if sp > 1:
        chunks, layers = job.profile.head_chunks, model.num_layers
        repeats = sp // math.gcd(sp, max(1, model.num_kv_heads // chunks))
        qkv = size.heads + 2 * size.kv * repeats * max(1, chunks // model.num_kv_heads)
        forward, backward = qkv + size.heads, 2 * qkv + 2 * size.heads
        moved = passes.attention_forward * forward + layers * backward
        calls["all-to-all"] = {"calls": batches * chunks * (4 * passes.attention_forward + 8 * layers),
                               "bytes": batches * moved * (sp - 1) // sp}
    return calls
