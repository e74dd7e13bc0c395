"""What a run prints of itself before its first step, and the record beside its checkpoints."""

import json
import pathlib
from typing import Any

import jax

from alst_jax.config import TrainConfig
from alst_jax.data.documents import Stats
from alst_jax.data.report import print_sources
from alst_jax.parallel.mesh import seq_over_hosts
from alst_jax.planning.job import Job, describe_debug
from alst_jax.planning.plan import Plan
from alst_jax.processes.link import link
from alst_jax.run import attention_kernel, choose_dtype
from alst_jax.step import TrainStep
from alst_jax.storage.about import about
from alst_jax.storage.source import ModelSource
from alst_jax.trainer import Data


def about_run(
    config: TrainConfig, step: TrainStep, job: Job, settings: dict[str, Any], plan: Plan | None
) -> dict[str, Any]:
    """The record beside each checkpoint."""
    shapes = {"rows": job.rows, "length": job.length, "grad_accum": job.grad_accum, "documents": job.documents}
    planned = None if plan is None else json.loads(plan.to_json())
    kernel = attention_kernel(config, choose_dtype(config), step.model)
    return about(config, step, kernel, settings, shapes, planned)


def announce(
    config: TrainConfig, source: ModelSource, step: TrainStep, job: Job, stats: Stats, steps: int, done: int, data: Data
) -> None:
    """Print the model, mesh, memory features, data and steps of a run. done: steps before it was resumed."""
    dp, sp = step.mesh.devices.shape
    kind = step.mesh.devices.flat[0].device_kind
    profile, model = step.profile, step.model
    idle = jax.device_count() - dp * sp
    if link().several:
        print(
            f"hosts   {len(set(link().machines))} with {link().count} processes (found by: {link().how}) and "
            f"{jax.device_count()} devices: {seq_over_hosts(sp, link().machines)}"
        )
    print(
        f"model   {source.name}: {model.num_params / 1e6:,.1f}M parameters, {model.num_layers} layers, "
        f"{profile.compute_dtype}, attention {profile.attention}"
    )
    print(f"mesh    dp {dp} x sp {sp} on {kind}{f'; {idle} devices stay idle' if idle else ''}")
    print(f"memory  {', '.join(profile.words()) or 'no feature on'}")
    if config.debug_attention_layers is not None:
        print(describe_debug(model))
    if model.lora is not None:
        count, lora = sum(leaf.size for leaf in jax.tree.leaves(step.trained)), model.lora
        dropped = f", dropout {lora.dropout:g}" * bool(lora.dropout)
        print(
            f"lora    rank {lora.rank}, scale {lora.scale:g}{dropped}, beside {', '.join(lora.targets)}: "
            f"{count / 1e6:,.1f}M parameters are trained"
        )
    elif config.freeze:
        count = sum(leaf.size for leaf in jax.tree.leaves(step.frozen))
        print(f"frozen  {count / 1e6:,.1f}M parameters match --freeze {config.freeze}")
    padded = f", padded to {job.length}" if job.length != config.seq_len else ""
    print(f"data    {stats.summary(config.seq_len)}{padded}")
    if stats.lengths is not None:
        print(f"lengths {stats.lengths}")
    if stats.fullness is not None:
        print(f"packs   {stats.fullness.summary()}")
    print_sources(stats.sources)
    print_sources(stats.held_out, "eval")
    for addition in data.added:
        print(f"added   after step {addition['step']}: {', '.join(addition['data'])}")
    start = f", resumed at step {done}" if done else ""
    a_step = job.rows * job.grad_accum
    for report in stats.sources if stats.sources and stats.sources[0].weight is not None else ():
        times = steps * a_step * report.weight / report.sequences
        print(f"weight  {report.weight:.3g} of the sequences from {report.name}: each {times:.1f} times")
    print(
        f"steps   {steps} of {a_step} sequences, {steps * a_step / stats.sequences:.1f} times the data{start} -> "
        f"{pathlib.Path(config.out)}",
        flush=True,
    )
