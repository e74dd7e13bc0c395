"""Full fine-tuning and LoRA of rank 16 on all linear layers, planned for one H100: memory and speed at three lengths.

    python -m benchmarks.lora              # by the cost model
    python -m benchmarks.lora --compiled   # the bytes by the compiler (extra cuda12 or cuda13); needs no GPU

Nothing is measured: speeds are predictions. bfloat16 weights, batch 1, the flash kernel, 125 GiB of host memory. Full
fine-tuning has float32 moments and master weights, or 8-bit moments and no master. `--alone` adds
--rebuild-inputs-alone to all profiles, for longer sequences.
"""

import dataclasses
import functools
from typing import Any, Literal

import tyro

from alst_jax.hardware import environment
from benchmarks.shapes import LLAMA_8B, QWEN3_32B

MODELS = {"Llama-8B": LLAMA_8B, "Qwen3-32B": QWEN3_32B}
MACHINE, HOST, RANK = "H100-80", 125.0, 16
FORMATS = {
    "full, float32 states": ("float32", "float32"),
    "full, int8 states, no master": ("int8", "none"),
    f"LoRA, rank {RANK}": ("float32", "float32"),
}
CASES = (("Llama-8B", 131_072), ("Llama-8B", 524_288), ("Llama-8B", 1_048_576), ("Qwen3-32B", 131_072))


@dataclasses.dataclass
class Options:
    compiled: bool = False
    """Confirm each plan's bytes by the compiler."""
    ways: tuple[Literal["full, float32 states", "full, int8 states, no master", "LoRA, rank 16"], ...] = tuple(FORMATS)
    models: tuple[Literal["Llama-8B", "Qwen3-32B"], ...] = tuple(MODELS)
    lengths: tuple[int, ...] = (131_072, 524_288, 1_048_576)
    alone: bool = False
    """With --rebuild-inputs-alone."""
    longest: bool = False
    """Also look for the longest length of each way."""


def main():
    options = tyro.cli(Options)
    environment.prepare(None, absent_devices=True)
    print(f"| model | tokens | way | device GiB | host GiB | planned tok/s | profile |\n|{'---|' * 7}", flush=True)
    for name, length in CASES:
        if name in options.models and length in options.lengths:
            for way in options.ways:
                print(f"| {name} | {length:,} | {way} | {cells(name, length, way, options)} |", flush=True)
    for name, way in [(name, way) for name in options.models for way in options.ways if options.longest]:
        print(f"| {name} | longest | {way} | {cells(name, None, way, options)} |", flush=True)


def cells(name: str, length: int | None, way: str, options: Options) -> str:
    """Device and host GiB, tokens a second and flags of the best plan. length: None for the longest."""
    from alst_jax.config import UserError
    from alst_jax.planning.job import describe

    planner, job = plan_for(name, length, way, options)
    try:
        choice = planner.longest(job) if length is None else planner.choose(job, lambda text: None)
    except UserError as error:
        return f"| | | does not fit: {str(error).partition('. What would')[0].partition(': ')[2]}"
    plan, tokens = choice.plan, "" if length else f" ({choice.job.length:,} tokens)"
    return (
        f"{plan.device_bytes / 2**30:.1f} | {plan.host_bytes / 2**30:.1f} | "
        f"{plan.tokens / plan.step_seconds:,.0f}{tokens} | {describe(choice.job)}"
    )


def plan_for(name: str, length: int | None, way: str, options: Options) -> tuple[Any, Any]:
    """(the planner of the machine, the job) of one line."""
    import jax.numpy as jnp

    from alst_jax.config import TrainConfig
    from alst_jax.hardware.machines import parse_cluster
    from alst_jax.models.lora import Lora
    from alst_jax.planning.job import Job
    from alst_jax.planning.planner import ANY_LENGTH, Planner
    from alst_jax.planning.process import with_room
    from alst_jax.profile import Profile
    from alst_jax.run import make_step

    (states, master), model = FORMATS[way], MODELS[name]
    if way.startswith("LoRA"):
        model = dataclasses.replace(model, lora=Lora(RANK, float(RANK)))
    config = TrainConfig(
        plan_for=MACHINE, host_memory=HOST, plan_only=length is not None, find_max_seq_len=length is None
    )
    profile = Profile(attention="flash", compute_dtype="bfloat16", rebuild_inputs_alone=options.alone)
    job = Job(model, profile, 1, length or ANY_LENGTH, states=states, master=master)
    cluster = with_room(parse_cluster(MACHINE, HOST), job)
    planner = Planner.of(config, cluster, functools.partial(make_step, config, cluster, jnp.dtype("bfloat16")))
    return dataclasses.replace(planner, compiles=planner.compiles and options.compiled), job


if __name__ == "__main__":
    main()
