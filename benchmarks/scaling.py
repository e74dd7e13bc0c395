"""Forward and backward of a Llama-8B shape on meshes of the GPUs of one host: speed a GPU, and the cost of collectives.

    python -m benchmarks.scaling --layers 4 --cases 2 1 65536 1 2 131072
    python -m benchmarks.scaling --layers 4 --cases 1 2 131072 --flags xla_gpu_enable_while_loop_double_buffering=true

A case is dp, sp and the length of a sequence. Weights are sharded over all of its GPUs and gathered layer by layer.
After the timed steps one more is traced. Of each GPU's span in that trace the table gives, in the mean over GPUs, the
share in which a computing kernel ran; in which NCCL ran (which waits for the slower GPU, too), by kind; and how much of
that no computing kernel covered. Each of the flags, given to the compiler alone, is compared with none on the last
case. "measured" is the peak of the process, so it is given only where it rose: begin with the case that needs least.
"""

import dataclasses
import gc
import json
import pathlib
import re
import statistics
import sys
import tempfile
import time
from typing import Any, Literal, NamedTuple

import tyro

from alst_jax.hardware import environment
from alst_jax.profile import Profile
from benchmarks.shapes import llama_8b

KINDS = {
    "SendRecv": "all-to-all",
    "AllGather": "all-gather",
    "ReduceScatter": "reduce-scatter",
    "AllReduce": "all-reduce",
}
"""Parts of the names of NCCL's kernels, and the collectives they serve."""


@dataclasses.dataclass
class Options:
    cases: tuple[int, ...] = (1, 1, 65536)
    """dp, sp, tokens of a sequence, and again."""
    layers: int = 4
    steps: int = 4
    """The first is not counted; at least 4."""
    attention: Literal["cudnn", "flash"] = "flash"
    flags: tuple[str, ...] = ()
    """XLA's, as name=value."""


class Shares(NamedTuple):
    """Of a GPU's span: computing, in collectives, in collectives alone; seconds of each kind of collective."""

    span: float
    computing: float
    collectives: float
    exposed: float
    kinds: dict[str, float]


def main():
    options = tyro.cli(Options)
    if not options.cases or len(options.cases) % 3:
        sys.exit(f"--cases {' '.join(map(str, options.cases))}: three numbers each, dp, sp and tokens")
    if options.steps < 4:
        sys.exit(f"--steps {options.steps}: at least 4, of which the first is not counted")
    environment.prepare(None)
    import jax

    from alst_jax.config import UserError
    from alst_jax.parallel.mesh import choose_degrees

    cases = [options.cases[i : i + 3] for i in range(0, len(options.cases), 3)]
    try:
        for dp, sp, _ in cases:
            choose_degrees(dp, sp, len(jax.devices()))
    except UserError as error:
        sys.exit(str(error))
    print(f"jax {jax.__version__}, {len(jax.devices())} x {jax.devices()[0].device_kind}; {options}")
    columns = (
        "dp x sp",
        "tokens",
        "flag",
        "seconds",
        "spread",
        "tok/s a GPU",
        "MFU",
        "GiB planned",
        "measured",
        "computing",
        "NCCL",
        "NCCL alone",
        "kinds",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for i, (dp, sp, length) in enumerate(cases, 1):
        measure(options, dp, sp, length, options.flags if i == len(cases) else ())
        gc.collect()


def measure(options: Options, dp: int, sp: int, length: int, flags: tuple[str, ...]) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from alst_jax.optim.adamw import AdamW
    from alst_jax.parallel.mesh import make_mesh
    from alst_jax.step import TrainStep

    model, devices = llama_8b(options.layers), jax.devices()[: dp * sp]
    profile = Profile(
        attention=options.attention,
        compute_dtype="bfloat16",
        keep_attention_on_device=options.layers,
        mlp_tile=16384,
        loss_tile=8192,
    )
    step = TrainStep(model, make_mesh(dp, sp), profile, AdamW(), jnp.bfloat16)
    params = step.init_params(jax.random.key(0), jnp.bfloat16)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (dp, length), dtype=np.int32)
    batch = step.put_batch(tokens, np.roll(tokens, -1, 1), np.tile(np.arange(length, dtype=np.int32), (dp, 1)))
    lowered = step.loss_and_grad.lower(step.trained, step.frozen, batch, jax.ShapeDtypeStruct((), jnp.float32))
    flops = dp * model.flops_per_sequence(length) / len(devices)
    peak = environment.peak_flops(devices[0].device_kind) or float("nan")
    peaks = lambda: max(device.memory_stats()["peak_bytes_in_use"] for device in devices)
    for flag in (None, *flags):
        before = peaks()
        compiled = lowered.compile(compiler_options=compiler_option(flag) if flag else None)
        plan = compiled.memory_analysis()
        planned = (
            plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
        )

        def seconds() -> float:
            started = time.perf_counter()
            jax.block_until_ready(compiled(*step.split(params), batch, jnp.float32(1 / tokens.size)))
            return time.perf_counter() - started

        times = [seconds() for _ in range(options.steps)][1:]
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                seconds()
            shares = read_trace(pathlib.Path(directory))
        median, spread = statistics.median(times), max(times) - min(times)
        measured = f"{peaks() / 2**30:.2f}" if peaks() > before else ""
        print(
            f"| {dp} x {sp} | {length:,} | {flag or ''} | {median:.3f} | {spread:.3f} | "
            f"{dp * length / median / len(devices):,.0f} | {flops / median / peak:.1%} | {planned / 2**30:.2f} | "
            f"{measured} | {describe(shares, len(devices))} |",
            flush=True,
        )


def compiler_option(flag: str) -> dict[str, Any]:
    """name=value, the value as JSON has it."""
    name, _, value = flag.partition("=")
    try:
        return {name: json.loads(value)}
    except json.JSONDecodeError:
        sys.exit(f"--flags {flag}: name=value, such as xla_gpu_enable_while_loop_double_buffering=true")


def read_trace(directory: pathlib.Path) -> list[Shares]:
    """Shares of each GPU of the newest trace in a directory."""
    import jax

    newest = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = [plane for plane in jax.profiler.ProfileData.from_file(str(newest)).planes if "/device:GPU" in plane.name]
    streams = lambda plane: (line for line in plane.lines if line.name.startswith("Stream"))
    times = lambda event: (event.name, event.start_ns / 1e9, event.end_ns / 1e9)
    return [shares_of([times(event) for line in streams(plane) for event in line.events]) for plane in planes]


def shares_of(events: list[tuple[str, float, float]]) -> Shares:
    """Shares of the (name, start, end) of one GPU's kernels. Copies are neither computing nor collectives."""
    collectives = [event for event in events if re.search("nccl", event[0], re.IGNORECASE)]
    copies = [event for event in events if re.match("mem(cpy|set)", event[0], re.IGNORECASE)]
    others = {*collectives, *copies}
    rest = [event for event in events if event not in others]
    busy, in_collectives = union(rest), union(collectives)
    either = union(rest + collectives)
    length = lambda intervals: sum(end - start for start, end in intervals)
    kinds: dict[str, float] = {}
    for name, start, end in collectives:
        kind = next((kind for part, kind in KINDS.items() if part in name), "other")
        kinds[kind] = kinds.get(kind, 0.0) + end - start
    span = max(end for _, _, end in events) - min(start for _, start, _ in events) if events else 0.0
    return Shares(span, length(busy), length(in_collectives), length(either) - length(busy), kinds)


def union(events: list[tuple[Any, float, float]]) -> list[tuple[float, float]]:
    """The time covered by at least one event, as disjoint intervals in order."""
    merged: list[tuple[float, float]] = []
    for _, start, end in sorted(events, key=lambda event: event[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def describe(shares: list[Shares], gpus: int) -> str:
    """Cells of the table: computing, collectives, collectives alone, kinds; means over the GPUs that ran anything.
    gpus: how many the case uses; the trace has those that it leaves idle too."""
    shares = [one for one in shares if one.span]
    if len(shares) != gpus:
        return f"{len(shares)} of {gpus} GPUs in the trace | | | "
    mean = lambda part: statistics.mean(part(one) / one.span for one in shares)
    kinds = ", ".join(
        f"{kind} {mean(lambda one: one.kinds.get(kind, 0.0)):.1%}"
        for kind in sorted({kind for one in shares for kind in one.kinds})
    )
    return (
        f"{mean(lambda one: one.computing):.1%} | {mean(lambda one: one.collectives):.1%} | "
        f"{mean(lambda one: one.exposed):.1%} | {kinds}"
    )


if __name__ == "__main__":
    main()
