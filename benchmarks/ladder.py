"""ALST's features one after the other, the Llama-8B shape on one H100: the longest sequence that fits with each, and
the speed at a common length.

    python -m benchmarks.ladder --longest                  # compiled for an H100 (extra cuda13); needs no GPU
    python -m benchmarks.ladder --layers 8 --seq-len 32768 # measured, on a GPU

Full fine-tuning in bfloat16 with 8-bit AdamW and no float32 master, batch 1, each layer's input kept for the backward
pass: ALST's baseline, too, has gradient checkpointing. Each rung adds one feature to the rung above it.
"""

import dataclasses
import functools
import re
import subprocess
import sys
from typing import Literal

import tyro

from alst_jax.hardware import environment
from alst_jax.profile import Profile
from benchmarks.shapes import llama_8b

RUNGS: list[tuple[str, dict]] = [
    ("baseline: each layer's input kept", dict(loss_tile=None, mlp_tile=None)),
    ("+ tiled loss", dict(loss_tile=8192)),
    ("+ tiled MLP", dict(mlp_tile=16384)),
    ("+ activations in host memory", dict(offload_activations=True)),
    ("+ weights and optimizer in host memory", dict(offload_weights=True, offload_optimizer=True)),
    ("+ 8 head chunks", dict(head_chunks=8)),
    ("+ update in the backward pass", dict(update_in_backward=True)),
]
# By layers: a profile that fits at 524,288 tokens for 32, and its like for 8, so that rungs are measured quickly.
KEPT = {  # attention outputs on the device and in host memory, and segments that leave them room
    32: dict(keep_attention_on_device=12, keep_attention_on_host=15, segment_layers=(5, 12, 8, 4, 2, 1)),
    8: dict(keep_attention_on_device=3, keep_attention_on_host=4, segment_layers=(2, 3, 2, 1)),
}
STEP = 4096  # lengths that are looked at


@dataclasses.dataclass
class Options:
    longest: bool = False
    """Look for the longest lengths, by compiling for `machine`. Otherwise measure steps of `seq_len` tokens, here."""
    machine: str = "H100-80"
    host_memory: float = 125
    """GiB of `machine`."""
    layers: Literal[8, 32] = 32
    seq_len: int = 16384
    steps: int = 2
    rungs: tuple[int, ...] = tuple(range(len(RUNGS) + 2))
    """Numbers of the rungs, from 0."""


def profiles(layers: int) -> list[tuple[str, Profile]]:
    """Name and profile of each rung, for a model of so many layers."""
    kept = KEPT[layers]
    outputs, segments = kept["keep_attention_on_device"] + kept["keep_attention_on_host"], kept["segment_layers"]
    last = [
        (f"+ segments of {layers // 4} layers", dict(segment_layers=(layers // 4,))),
        (f"+ attention outputs of {outputs} of {layers} layers kept, segments of {' '.join(map(str, segments))}", kept),
    ]
    profile, found = Profile(attention="flash", compute_dtype="bfloat16"), []
    for name, changes in RUNGS + last:
        profile = dataclasses.replace(profile, **changes)
        found.append((name, profile))
    return found


def main():
    options = tyro.cli(Options)
    if options.longest:
        environment.prepare(None, absent_devices=True)
        columns = ("rung", "longest", "device GiB", "host GiB", "predicted tok/s there")
    else:
        columns = ("rung", f"tok/s at {options.seq_len:,}", "seconds", "device peak GiB", "host peak GiB")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    failed = False
    for name, profile in (profiles(options.layers)[i] for i in options.rungs):
        cells = longest(profile, options) if options.longest else measured(profile, options)
        failed |= "failed" in cells
        print(f"| {name} | {cells} |", flush=True)
    sys.exit(failed)


def longest(profile: Profile, options: Options) -> str:
    """The longest multiple of STEP whose compiled bytes fit, within about 2%."""
    import jax.numpy as jnp

    from alst_jax.config import TrainConfig, UserError
    from alst_jax.hardware.machines import GIB, parse_cluster
    from alst_jax.planning.job import Job
    from alst_jax.planning.planner import Planner
    from alst_jax.run import make_step

    config = TrainConfig(plan_for=options.machine, host_memory=options.host_memory, memory="manual", clip_norm=0.0)
    cluster = parse_cluster(options.machine, options.host_memory)
    planner = Planner.of(config, cluster, functools.partial(make_step, config, cluster, jnp.dtype("bfloat16")))
    if not planner.compiles:
        raise SystemExit("no compiler for GPUs here: install the extra cuda12 or cuda13")
    job = Job(llama_8b(options.layers), profile, 1, STEP, states="int8", master="none")
    try:
        job = planner.longest(job).job
    except UserError as error:
        return f"none: {str(error).partition('. What')[0]} | | | "
    low = max(1, job.length // STEP)
    high = int(low * 1.3) + 2
    plan_at = lambda n: planner.compile(dataclasses.replace(job, length=n * STEP))
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if plan_at(middle).lacks else (middle, high)
    plan = plan_at(low)
    if plan.lacks:
        return f"less than {STEP:,} | | | "
    return (
        f"{low * STEP:,} | {plan.device_bytes / GIB:.1f} of {plan.device_limit / GIB:.1f} | "
        f"{plan.host_bytes / GIB:.1f} of {plan.host_limit / GIB:.1f} | {plan.tokens / plan.step_seconds:,.0f}"
    )


def measured(profile: Profile, options: Options) -> str:
    """The last of some steps, in a process of its own."""
    flags = " ".join([*profile.flags(), "--attention", profile.attention]).split()
    command = [
        sys.executable,
        "-m",
        "benchmarks.step",
        "--layers",
        str(options.layers),
        "--seq-len",
        str(options.seq_len),
        "--steps",
        str(options.steps),
        "--optimizer-states",
        "int8",
        "--master-weights",
        "none",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return cells_of(done.stdout) or f"failed: {(done.stderr or done.stdout).strip()[-200:]} | | | "


def cells_of(printed: str) -> str | None:
    """Tokens a second, seconds, device and host peak of the last step that benchmarks.step printed; None: no step."""
    pattern = r"norm .* +([\d.]+) \+ ([\d.]+) s +([\d,]+) tok/s.* device peak ([\d.]+) GiB +host peak ([\d.]+)"
    if not (found := re.findall(pattern, printed)):
        return None
    forward_backward, update, speed, device, host = found[-1]
    return f"{speed} | {float(forward_backward) + float(update):.2f} | {device} | {host}"


if __name__ == "__main__":
    main()
