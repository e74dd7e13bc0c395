"""Seconds of the evaluation at length (--eval-long), from the cost model of a step: forward passes alone."""

import collections

from alst_jax.at_length.longppl import windows
from alst_jax.at_length.tasks import cells
from alst_jax.config import TrainConfig
from alst_jax.hardware.machines import Cluster
from alst_jax.ops.attention import costs
from alst_jax.planning.footprint import state_bytes
from alst_jax.planning.job import Job
from alst_jax.planning.seconds import EXPOSED, MATMUL


def documents(config: TrainConfig, length: int) -> collections.Counter[int]:
    """How many texts of each length one evaluation reads, if the held-out text has as many as are asked for."""
    found = collections.Counter({length: config.eval_long_sequences})
    for window in windows(length, config.eval_long_context):
        found[window.stop - window.start] += config.eval_long_sequences
    for _, size, _ in cells(length):
        found[size] += config.eval_long_samples
    return found


def evaluation_seconds(config: TrainConfig, job: Job, cluster: Cluster) -> float:
    """Of one evaluation. Each document is attended alone, whatever sequence it is packed into."""
    model, machine, sizes = job.model, cluster.machine, documents(config, job.length)
    d, h = model.hidden_size, model.head_dim
    layer = 2 * d * (model.num_heads + model.num_kv_heads) * h + 3 * d * model.intermediate_size
    tokens, width = sum(size * count for size, count in sizes.items()), 1 if job.width == 2 else 16
    matmuls = 2.0 * tokens * (model.num_layers * layer + model.vocab_size * d) * width / (MATMUL * machine.peak_flops)
    attention = sum(
        count * 4.0 * model.num_heads * h * model.causal_pairs(size)
        / costs.speed(job.profile.attention, "forward", size, machine.peak_flops, packed=True)
        for size, count in sizes.items())
    batches = -(-tokens // (job.rows * job.length))
    copies = batches * state_bytes(job)[0] / machine.host_link if job.profile.offload_weights else 0.0
    computed = (matmuls + attention) / job.devices
    return computed + max(EXPOSED * copies, copies - computed)


def evaluation_line(config: TrainConfig, job: Job, cluster: Cluster | None) -> str:
    """A line about the cost of --eval-long."""
    sizes = documents(config, job.length)
    tokens = sum(size * count for size, count in sizes.items())
    if cluster is None:
        cost = f"{tokens / job.length:.0f} sequences forward"
    else:
        cost = f"{evaluation_seconds(config, job, cluster):.1f} s ({tokens:,} tokens forward)"
    every = f", every {config.eval_every} steps" if config.eval_every else ""
    return f"evaluation at length: {cost} each, before the first step{every} and at the end"
