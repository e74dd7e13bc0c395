"""Speed and memory against length: plans of --memory auto for Llama-8B on one H100, and measured steps.

    python -m benchmarks.lengths --measured benchmarks/results/2026-11-24-h100-steps.json --out lengths

Full fine-tuning, batch 1, bfloat16, attention by flash-attn-4, 8-bit AdamW without a float32 master. Plans are those
of the cost model: no compiler is asked. Prints a table and draws OUT.png.
"""

import dataclasses
import json
import pathlib

import tyro

from alst_jax.hardware import environment
from benchmarks.shapes import LLAMA_8B

GIB = 2**30


@dataclasses.dataclass
class Options:
    machine: str = "H100-80"
    host_memory: float = 125
    """GiB of the host."""
    lengths: tuple[int, ...] = (16384, 32768, 65536, 131072, 196608, 262144, 327680, 393216, 458752, 524288)
    measured: pathlib.Path | None = None
    """JSON: objects with tokens and seconds of whole steps."""
    out: pathlib.Path = pathlib.Path("lengths")


def main():
    options = tyro.cli(Options)
    environment.prepare(None, absent_devices=True)
    from alst_jax.hardware.machines import parse_cluster
    from alst_jax.planning.candidates import Search
    from alst_jax.planning.job import Job, describe
    from alst_jax.planning.search import choose
    from alst_jax.profile import Profile

    search = Search(parse_cluster(options.machine, options.host_memory))
    profile = Profile(attention="flash", compute_dtype="bfloat16")
    measured = json.loads(options.measured.read_text()) if options.measured else []
    planned = []
    print("| tokens | planned tok/s | seconds | device GiB | host GiB | profile |\n|" + "---|" * 6)
    for length in options.lengths:
        choice = choose(Job(LLAMA_8B, profile, 1, length, states="int8", master="none"), search)
        if choice is None:
            print(f"| {length:,} | does not fit | | | | |", flush=True)
            continue
        plan = choice.plan
        row = dict(
            tokens=length, seconds=plan.step_seconds, device_gib=plan.device_bytes / GIB, host_gib=plan.host_bytes / GIB
        )
        planned.append(row)
        print(
            f"| {length:,} | {length / row['seconds']:,.0f} | {row['seconds']:.1f} | {row['device_gib']:.1f} | "
            f"{row['host_gib']:.1f} | {describe(choice.job)} |",
            flush=True,
        )
    draw(planned, measured, options)


def draw(planned: list[dict], measured: list[dict], options: Options) -> None:
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.2))
    tokens = lambda rows: [row["tokens"] / 1024 for row in rows]
    column = lambda rows, name: [row[name] for row in rows]
    rate = lambda rows: [row["tokens"] / row["seconds"] for row in rows]
    speed.plot(tokens(planned), rate(planned), label="planned (cost model)")
    speed.plot(tokens(measured), rate(measured), "o", label="measured, all states in host memory")
    speed.set(ylabel="tokens a second", yscale="log")
    for name, label, colour in (("device_gib", "GPU", "C0"), ("host_gib", "host", "C1")):
        memory.plot(tokens(planned), column(planned, name), colour, label=f"{label}, planned")
    memory.set(ylabel="GiB", ylim=(0, None))
    for axes in (speed, memory):
        axes.set(xlabel="sequence length, thousands (1,024) of tokens", xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Llama-8B, full fine-tuning, one {options.machine}, {options.host_memory:g} GiB of host memory")
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
