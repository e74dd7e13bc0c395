"""The save levels for Llama-8B's shape: the arrays that each level keeps of every layer, their bytes and seconds.

    python -m benchmarks.levels --seq-len 131072                              # by plan, for one H100
    python -m benchmarks.levels --seq-len 32768 --layers 4 --measure          # measured beside it, on a GPU

Each level keeps the arrays of the levels above it, too. Seconds are those of a whole step; the seconds of a layer are
the time that the level saves in one layer, forward and backward.
"""

import dataclasses

import tyro

from alst_jax.hardware import environment
from alst_jax.profile import Profile
from benchmarks import ladder
from benchmarks.shapes import llama_8b


@dataclasses.dataclass
class Options:
    seq_len: int = 131072
    layers: int = 32
    machine: str = "H100-80"
    measure: bool = False
    """Measure a step at each level, in a process of its own; planned bytes that exceed the device fail there."""
    steps: int = 2


def levels(layers: int) -> list[tuple[str, str | None, dict]]:
    """Name of each level, of the level that it extends, and its flags, for all layers."""
    attention = dict(keep_attention_on_device=layers)
    qkv = attention | dict(keep_qkv_on_device=layers)
    return [
        ("input", None, {}),
        ("+ attention output, in host memory", "input", dict(keep_attention_on_host=layers)),
        ("+ attention output", "input", attention),
        ("+ q, k, v", "+ attention output", qkv),
        ("+ gate and up", "+ q, k, v", qkv | dict(keep_mlp_on_device=layers)),
    ]


def rows(options: Options) -> list[tuple[Profile, list[str]]]:
    """Profile and table cells of each level: planned."""
    from alst_jax.hardware.machines import GIB, parse_cluster
    from alst_jax.planning.estimate import estimate
    from alst_jax.planning.job import Job

    base, cluster = Profile(attention="flash", compute_dtype="bfloat16"), parse_cluster(options.machine)
    found, known = [], {None: (0, 0.0)}  # bytes kept and seconds of each level
    for name, below, changes in levels(options.layers):
        profile = dataclasses.replace(base, **changes)
        job = Job(llama_8b(options.layers), profile, 1, options.seq_len, states="int8", master="none")
        plan = estimate(job, cluster)
        known[name] = sum(job.kept.values()), plan.step_seconds
        gibibytes = (known[name][0] - known[below][0]) / options.layers / GIB
        spared = 1000 * (known[below][1] - known[name][1]) / options.layers if below else 0.0
        found.append(
            (
                profile,
                [
                    name,
                    f"{gibibytes:.3f}",
                    f"{spared:.1f}",
                    f"{spared / gibibytes:.1f}",
                    f"{plan.device_bytes / GIB:.1f}",
                    f"{plan.host_bytes / GIB:.1f}",
                    f"{plan.step_seconds:.2f}",
                ],
            )
        )
    return found


def main():
    options = tyro.cli(Options)
    environment.prepare(None, absent_devices=not options.measure)
    columns = ["level", "GiB a layer", "ms spared a layer", "ms a GiB", "device GiB", "host GiB", "planned s"]
    columns += ["tok/s", "s", "device peak GiB", "host peak GiB"] * options.measure
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for profile, cells in rows(options):
        if options.measure:
            cells.append(
                ladder.measured(
                    profile, ladder.Options(layers=options.layers, seq_len=options.seq_len, steps=options.steps)
                )
            )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
