"""The cost model against the compiler: bytes of device and host memory, over models, lengths, meshes and profiles.

    python -m benchmarks.plan_accuracy --machine H100-80 --rows /tmp/rows.jsonl

Needs the extra cuda12 or cuda13, and no GPU: the step is compiled for devices that are not here. With
--rows benchmarks/results/2026-11-27-plan-accuracy.jsonl nothing is compiled and neither is needed. The cost model was
fitted to the combinations of FITTED; it had not seen HELD_OUT. Left out on both sides: the optimizer's state,
which is exact and would make errors look small, and cuDNN's workspace, which the compiler knows only where the device
is. Compiled numbers are kept in --rows and not compiled again.
"""

import dataclasses
import json
import pathlib
import time

import tyro

from alst_jax.hardware import environment
from alst_jax.hardware.machines import GIB, parse_cluster
from alst_jax.models.config import ModelConfig
from alst_jax.profile import Profile
from benchmarks.shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B, QWEN3_32B

TINY = ModelConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=1408, num_layers=6, num_heads=8, num_kv_heads=2, head_dim=64
)
MODELS = {"tiny": TINY, "1B": LLAMA_1B, "8B": LLAMA_8B, "32B": QWEN3_32B, "70B": LLAMA_70B}
A = dict(offload_activations=True)
AW = dict(offload_activations=True, offload_weights=True, offload_optimizer=True)


def kept(device=0, host=0):
    return dict(keep_attention_on_device=device, keep_attention_on_host=host)


def segments(*layers):
    return dict(segment_layers=layers)


def chunks(n):
    return dict(head_chunks=n)


def tiles(mlp, loss):
    return dict(mlp_tile=mlp, loss_tile=loss)


FITTED = [  # model, tokens, dp, sp, profile
    ("8B", 131072, 1, 1, {}),
    ("8B", 131072, 1, 1, A),
    ("8B", 131072, 1, 1, AW),
    ("8B", 131072, 1, 1, AW | kept(4)),
    ("8B", 131072, 1, 1, AW | kept(4, 8)),
    ("8B", 131072, 1, 1, AW | segments(4)),
    ("8B", 131072, 1, 1, AW | segments(4) | kept(8, 8)),
    ("8B", 131072, 1, 1, AW | chunks(8)),
    ("8B", 262144, 1, 1, AW | segments(4) | chunks(8) | kept(4, 4)),
    ("8B", 524288, 1, 1, AW | segments(5, 5, 8, 6, 4, 3, 1) | chunks(8) | kept(12, 9)),
    ("8B", 524288, 1, 1, AW | segments(4) | chunks(8) | kept(0, 8)),
    ("8B", 524288, 1, 1, AW | segments(8) | chunks(8)),
    ("8B", 65536, 1, 1, A | kept(32)),
    ("8B", 65536, 1, 1, AW | dict(loss_tile=None)),
    ("8B", 65536, 1, 1, AW | dict(mlp_tile=None)),
    ("8B", 524288, 1, 8, A | kept(8)),
    ("8B", 1048576, 1, 8, AW | segments(4) | kept(8, 8)),
    ("8B", 2097152, 1, 8, AW | segments(4) | chunks(4) | kept(4, 8)),
    ("8B", 131072, 8, 1, A),
    ("8B", 262144, 2, 4, A | segments(2)),
    ("8B", 262144, 1, 2, AW | kept(4) | segments(2)),
    ("8B", 262144, 1, 4, A | kept(16)),
    ("8B", 4194304, 1, 8, AW | segments(4) | chunks(4)),
    ("70B", 131072, 1, 8, AW),
    ("70B", 262144, 1, 8, AW | segments(4) | kept(4, 4)),
    ("70B", 524288, 1, 8, AW | segments(8) | chunks(4) | kept(8, 8)),
    ("70B", 65536, 1, 4, AW | kept(20)),
    ("70B", 32768, 1, 8, A),
    ("32B", 131072, 1, 1, AW | segments(4) | chunks(8)),
    ("32B", 262144, 1, 1, AW | segments(8) | chunks(8) | kept(8)),
    ("32B", 262144, 1, 8, A | kept(8)),
    ("32B", 1048576, 1, 8, AW | segments(4) | chunks(4)),
    ("32B", 131072, 1, 2, AW | kept(16)),
    ("32B", 65536, 1, 4, AW | segments(2)),
    ("1B", 131072, 1, 1, {}),
    ("1B", 524288, 1, 1, A | segments(4) | kept(4)),
    ("1B", 524288, 1, 1, A | segments(4, 4, 4, 2, 1, 1) | kept(8, 4) | chunks(4)),
    ("1B", 1048576, 1, 1, A | segments(4) | chunks(8)),
    ("1B", 1048576, 1, 4, A | kept(8)),
    ("1B", 262144, 2, 2, kept(4)),
    ("1B", 262144, 1, 8, kept(16)),
    ("1B", 524288, 4, 2, A | segments(2)),
    ("tiny", 131072, 1, 1, {}),
    ("tiny", 524288, 1, 1, A),
    ("tiny", 1048576, 1, 1, A | segments(2) | kept(2)),
    ("tiny", 1048576, 1, 1, AW | segments(3) | kept(1, 2) | chunks(2)),
    ("tiny", 262144, 1, 8, kept(6)),
    ("tiny", 524288, 2, 4, A | segments(2)),
    # held out once
    ("8B", 393216, 1, 1, AW | segments(4, 6, 9, 7, 4, 2) | chunks(8) | kept(10, 10)),
    ("8B", 65536, 1, 1, A | kept(8, 16)),
    ("8B", 196608, 1, 1, AW | segments(2) | chunks(4) | kept(12)),
    ("8B", 786432, 1, 4, AW | segments(6) | chunks(4) | kept(6, 6)),
    ("8B", 1048576, 2, 4, AW | chunks(2) | kept(16)),
    ("70B", 196608, 1, 8, AW | chunks(4) | kept(10, 20)),
    ("70B", 98304, 2, 4, AW | kept(8)),
    ("32B", 196608, 1, 1, AW | segments(5, 6, 8, 9, 10, 9, 8, 5, 3, 1) | chunks(8) | kept(6, 4)),
    ("32B", 524288, 1, 8, AW | chunks(8) | kept(20)),
    ("1B", 262144, 1, 1, A | kept(6, 10) | chunks(4)),
    ("1B", 786432, 1, 2, AW | segments(4) | chunks(2) | kept(4)),
    ("tiny", 786432, 1, 4, A | chunks(2) | kept(3, 3)),
    # compiled to see the live arrays, or held out until they were missed
    ("8B", 65536, 1, 1, A | segments(2)),
    ("8B", 131072, 1, 2, A | segments(2)),
    ("1B", 393216, 1, 1, A | segments(2)),
    ("8B", 524288, 2, 2, AW | segments(2)),
    ("8B", 262144, 1, 2, AW | segments(3) | kept(6, 3)),
    ("8B", 262144, 1, 8, AW | segments(4) | chunks(2) | kept(4, 4) | tiles(32768, 0)),
    ("8B", 131072, 1, 4, AW | segments(4) | kept(8, 8) | tiles(32768, 0)),
]
HELD_OUT = [
    (
        "8B",
        524288,
        1,
        1,
        AW
        | segments(5, 12, 8, 4, 2, 1)
        | chunks(8)
        | kept(12, 15)
        | tiles(16384, 8192)
        | dict(update_in_backward=True),
    ),
    ("8B", 458752, 1, 1, AW | segments(6, 11, 8, 4, 2, 1) | chunks(8) | kept(11, 14) | tiles(16384, 8192)),
    ("8B", 131072, 1, 1, AW | kept(32) | tiles(16384, 8192)),
    ("8B", 65536, 1, 1, tiles(16384, 8192)),
    ("8B", 24576, 1, 1, tiles(None, None)),
    ("8B", 249856, 1, 1, AW | chunks(8) | tiles(16384, 8192)),
    ("1B", 262144, 1, 1, A | kept(16) | tiles(8192, 8192)),
    ("32B", 131072, 1, 4, AW | segments(4) | kept(10, 10) | tiles(20480, 4096)),
    ("70B", 262144, 1, 8, AW | segments(8) | chunks(2) | kept(8, 8) | tiles(32768, 4096)),
    ("1B", 524288, 1, 2, A | kept(12)),
    ("8B", 1048576, 1, 4, AW | segments(4) | kept(6, 6) | chunks(2)),
    ("32B", 262144, 1, 4, AW | segments(3)),
    ("70B", 131072, 1, 4, AW | kept(12, 8)),
    ("8B", 131072, 1, 4, A | segments(2)),
    ("1B", 393216, 2, 2, A | segments(4) | chunks(2) | kept(4, 4)),
    ("70B", 65536, 1, 8, AW | kept(4) | dict(mlp_tile=None)),
    ("1B", 786432, 1, 4, A | segments(4) | kept(4)),
    ("8B", 262144, 1, 4, AW | segments(5) | kept(7, 4)),
    ("8B", 98304, 1, 2, A | segments(2) | kept(2)),
]


@dataclasses.dataclass
class Options:
    machine: str = "H100-80"
    rows: pathlib.Path | None = None
    """File of what was compiled before, one JSON object a line; it is added to."""


def main():
    options = tyro.cli(Options)
    environment.prepare(None, absent_devices=True)
    import jax
    import jax.numpy as jnp

    from alst_jax.hardware.devices import absent_devices
    from alst_jax.optim.adamw import AdamW
    from alst_jax.parallel.mesh import make_mesh
    from alst_jax.planning.compiled import plan_step
    from alst_jax.planning.estimate import estimate
    from alst_jax.planning.footprint import working_set
    from alst_jax.step import TrainStep

    known = {}
    if options.rows is not None and options.rows.exists():
        known = {row["key"]: row for row in map(json.loads, options.rows.read_text().splitlines())}
    print(f"jax {jax.__version__}, {options.machine}\n")
    print(
        "| model | tokens | dp x sp | profile | device GiB compiled | estimated | error | host GiB compiled "
        "| estimated | error |"
    )
    print("|" + "---|" * 10)
    errors = {"fitted": [], "held out": []}
    for group, combinations in (("fitted", FITTED), ("held out", HELD_OUT)):
        for name, length, dp, sp, changes in combinations:
            cluster = parse_cluster(f"{dp * sp}x{options.machine}")
            bare = bare_job(name, length, dp, sp, changes)
            key = json.dumps([options.machine, name, length, dp, sp, changes])
            if key not in known:
                mesh = make_mesh(dp, sp, absent_devices(cluster))
                started = time.perf_counter()
                step = TrainStep(bare.model, mesh, bare.profile, AdamW(clip_norm=0.0), jnp.bfloat16)
                whole = dataclasses.replace(bare, count_workspace=True)
                device, host = numbers(plan_step(step, whole, cluster))
                device -= working_set(whole) - working_set(bare)
                known[key] = dict(key=key, device=device, host=host, seconds=time.perf_counter() - started)
                if options.rows is not None:
                    with options.rows.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
            row, (device, host) = known[key], numbers(estimate(bare, cluster))
            pairs = ((row["device"], device), (row["host"], host))
            off = [ours / theirs - 1 if theirs else 0.0 for theirs, ours in pairs]
            errors[group].append(off)
            cells = " | ".join(
                f"{theirs / GIB:.2f} | {ours / GIB:.2f} | {error:+.1%}" for (theirs, ours), error in zip(pairs, off)
            )
            print(f"| {name} | {length:,} | {dp} x {sp} | {words(changes)} | {cells} |", flush=True)
    for group, rows in errors.items():
        for place, column in zip(("device", "host"), zip(*rows)):
            sizes = sorted(map(abs, column))
            within, median = sum(e <= 0.05 for e in sizes), sizes[len(sizes) // 2]
            print(
                f"\n{group}, {place}: {within} of {len(sizes)} within 5%, median {median:.1%}, largest {sizes[-1]:.1%}"
            )


def bare_job(name: str, length: int, dp: int, sp: int, changes: dict):
    """The job of a combination, without the workspace of cuDNN's attention."""
    from alst_jax.planning.job import Job

    profile = Profile(attention="cudnn", compute_dtype="bfloat16", **changes)
    return Job(MODELS[name], profile, dp, length, dp, sp, count_workspace=False)


def numbers(plan) -> tuple[int, int]:
    """Bytes of a plan on the device and on the host, without the optimizer's."""
    return plan.device_bytes - plan.device.get("optimizer", 0), plan.host_bytes - plan.host.get("optimizer", 0)


def words(changes: dict) -> str:
    """A profile in a table's cell."""
    short = {"offload_activations": "A", "offload_weights": "W", "offload_optimizer": "O"}
    text = ["".join(letter for name, letter in short.items() if changes.get(name))]
    if "segment_layers" in changes:
        text.append("segments " + " ".join(map(str, changes["segment_layers"])))
    if "keep_attention_on_device" in changes:
        text.append(f"kept {changes['keep_attention_on_device']} + {changes['keep_attention_on_host']}")
    if "head_chunks" in changes:
        text.append(f"{changes['head_chunks']} chunks")
    text += [f"{name} {changes[name]}" for name in ("loss_tile", "mlp_tile", "update_in_backward") if name in changes]
    return ", ".join(filter(None, text)) or "all on the device"


if __name__ == "__main__":
    main()
