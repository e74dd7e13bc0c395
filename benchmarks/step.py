"""One training step of a Llama-8B shape: planned and measured bytes of a GPU, seconds, tokens a second, MFU.

    python -m benchmarks.step --layers 4 --seq-len 65536 --keep-attention-on-device 1
    python -m benchmarks.step --layers 32 --seq-len 524288 --compile-only --offload-weights ...
    python -m benchmarks.step --layers 32 --seq-len 131072 --sp 2 --optimizer-states int8 --master-weights none

Random weights and tokens, bfloat16, a sequence for each of --dp groups of --sp GPUs. The memory flags are those of
train.py. Prints one line a step, so that a long run can be watched.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Literal

import psutil
import tyro

from alst_jax.hardware import environment
from alst_jax.profile import MemoryFlags, Profile
from benchmarks.shapes import llama_8b

if TYPE_CHECKING:  # jax starts after `environment.prepare`
    from alst_jax.stack.batch import Batch
    from alst_jax.step import TrainStep

GIB = 2**30


@dataclasses.dataclass
class Options:
    layers: int = 4
    seq_len: int = 65536
    dp: int = 1
    sp: int = 1
    steps: int = 4
    update: bool = True
    """With the optimizer step, or forward and backward only."""
    optimizer_states: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of AdamW's moments."""
    master_weights: Literal["float32", "low-bits", "none"] = "float32"
    """Of the bfloat16 weights."""
    attention: str = "cudnn"
    """A kernel's name."""
    compile_only: bool = False
    reserve: int = 0
    """GiB of pinned host memory to make in one piece first, for each GPU; needed where a step's activations take tens
    of GiB of it."""
    memory: tyro.conf.OmitArgPrefixes[MemoryFlags] = MemoryFlags()

    @property
    def profile(self) -> Profile:
        return self.memory.profile(self.attention, "bfloat16")


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a step. gradients: loss and gradient, or the whole step that updates in the backward
    pass. norm, update: None where they do not run apart."""

    gradients: Any
    norm: Any = None
    update: Any = None


def main():
    options = tyro.cli(Options)
    environment.prepare(None, devices=options.dp * options.sp)
    step = make_step(options)
    import jax  # after `prepare`, which sets the environment that jax starts with

    print(f"{options}, jax {jax.__version__}, {step.mesh.size} x {jax.devices()[0].device_kind}", flush=True)
    programs = compile_programs(options, step)
    if options.compile_only:
        return
    environment.return_freed_memory()
    if options.reserve:
        reserve(options.reserve, list(step.mesh.devices.flat))
    run_steps(options, step, programs)


def make_step(options: Options) -> "TrainStep":
    """The step of the options, without arrays."""
    import jax
    import jax.numpy as jnp

    from alst_jax.config import UserError
    from alst_jax.optim.adamw import AdamW
    from alst_jax.parallel.mesh import choose_degrees, make_mesh
    from alst_jax.step import TrainStep

    in_backward = options.profile.update_in_backward
    if in_backward and not options.update:
        raise SystemExit("--update-in-backward with --no-update: leave one of them out")
    optimizer = AdamW(
        states=options.optimizer_states, master=options.master_weights, clip_norm=0.0 if in_backward else 1.0
    )
    try:
        mesh = make_mesh(*choose_degrees(options.dp, options.sp, len(jax.devices())))
    except UserError as error:
        raise SystemExit(str(error)) from error
    return TrainStep(llama_8b(options.layers), mesh, options.profile, optimizer, jnp.bfloat16)


def compile_programs(options: Options, step: "TrainStep") -> Programs:
    """Compile loss and gradient, print planned bytes, and compile the update. SystemExit if the device is too small."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from alst_jax.stack.batch import Batch

    in_backward, abstract = options.profile.update_in_backward, Batch.abstract(options.dp, options.seq_len, step.mesh)
    number, started = jax.ShapeDtypeStruct((), jnp.float32), time.perf_counter()
    if in_backward:
        gradients = step.update_in_backward.lower(
            step.trained, step.frozen, step.optimizer_state, abstract, number, number
        ).compile()
    else:
        gradients = step.loss_and_grad.lower(step.trained, step.frozen, abstract, number).compile()
    planned, limit = print_plan(options, step, gradients, time.perf_counter() - started), bytes_limit()
    if planned > limit:
        raise SystemExit(f"planned {planned / GIB:.2f} GiB, and jax may use {limit / GIB:.2f} of the device's")
    if options.compile_only or in_backward or not options.update:
        return Programs(gradients)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(step.mesh, PartitionSpec()))
    return Programs(
        gradients,
        step.gradient_norm.lower(step.params).compile(),
        step.update.lower(step.params, step.params, step.optimizer_state, scalar, scalar).compile(),
    )


def bytes_limit() -> int:
    """Bytes of a device that jax may use."""
    import jax

    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else sys.maxsize  # a CPU has none


def print_plan(options: Options, step: "TrainStep", compiled: Any, seconds: float) -> int:
    """Print the bytes that the compiler plans. Returns a device's bytes while gradients are computed."""
    import jax

    from alst_jax.xla.arrays import shard_bytes

    plan, in_backward = compiled.memory_analysis(), options.profile.update_in_backward
    states = 0  # on the device while gradients are computed, beside the program that computes them
    if options.update and not options.profile.offload_optimizer and not in_backward:
        states = sum(map(shard_bytes, jax.tree.leaves(step.optimizer_state)))
    device_plan = (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
        + states
    )
    print(
        f"compiled in {seconds:.0f} s; GiB planned: device temp "
        f"{plan.temp_size_in_bytes / GIB:.2f} + arguments {plan.argument_size_in_bytes / GIB:.2f} + outputs "
        f"{plan.output_size_in_bytes / GIB:.2f} + states {states / GIB:.2f} = {device_plan / GIB:.2f}; host temp "
        f"{plan.host_temp_size_in_bytes / GIB:.2f} + arguments {plan.host_argument_size_in_bytes / GIB:.2f} + "
        f"outputs {plan.host_output_size_in_bytes / GIB:.2f}",
        flush=True,
    )
    return device_plan


def run_steps(options: Options, step: "TrainStep", programs: Programs) -> None:
    """Make weights, states and a batch, run the steps, and print a line for each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    length, started = options.seq_len, time.perf_counter()
    tokens = np.random.default_rng(0).integers(0, step.model.vocab_size, (options.dp, length), dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (options.dp, 1))
    batch = step.put_batch(tokens, np.roll(tokens, -1, 1), positions)
    params, frozen = step.split(jax.block_until_ready(step.init_params(jax.random.key(0), jnp.bfloat16)))
    state = jax.block_until_ready(step.init_optimizer(params)) if options.update else None
    print(f"weights and states made in {time.perf_counter() - started:.0f} s", flush=True)
    peak_flops = environment.peak_flops(jax.devices()[0].device_kind) or float("nan")
    for number in range(options.steps):
        with Monitor(step.mesh.size) as monitor:
            params, state, loss, norm, (seconds, update_seconds) = run_step(
                step, programs, params, frozen, state, batch, number
            )
        total = seconds + update_seconds
        mfu = options.dp * step.model.flops_per_sequence(length) / total / step.mesh.size / peak_flops
        device_peak = max(device.memory_stats()["peak_bytes_in_use"] for device in step.mesh.devices.flat)
        print(
            f"step {number + 1}: loss {loss:.4f} norm {norm:.3f}  {seconds:.3f} + {update_seconds:.3f} "
            f"s  {tokens.size / total:,.0f} tok/s  MFU {mfu:.1%}  forward+backward alone "
            f"{tokens.size / seconds:,.0f} tok/s  device peak {device_peak / GIB:.2f} GiB  {monitor.summary()}",
            flush=True,
        )


def run_step(
    step: "TrainStep", programs: Programs, params: Any, frozen: Any, state: Any, batch: "Batch", number: int
) -> tuple[Any, Any, float, float, tuple[float, float]]:
    """(weights, states, loss, norm of the gradient, seconds of the gradients and of the update) of one step."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    scale, rate, norm = jnp.float32(1 / batch.tokens.size), jnp.float32(1e-5), float("nan")
    started = time.perf_counter()
    if step.profile.update_in_backward:
        loss, norm, finite, layers, params, state = jax.block_until_ready(
            programs.gradients(params, frozen, state, batch, scale, rate)
        )
        assert finite and layers == step.model.num_layers, (finite, layers)
    else:
        loss, gradients = jax.block_until_ready(programs.gradients(params, frozen, batch, scale))
    seconds = time.perf_counter() - started
    print(f"step {number + 1}: loss {float(loss):.4f} after {seconds:.3f} s", flush=True)
    if programs.update is None:
        return params, state, float(loss), float(norm), (seconds, 0.0)
    started = time.perf_counter()
    norm = programs.norm(gradients)
    rate = jax.device_put(rate, NamedSharding(step.mesh, PartitionSpec()))
    params, state = jax.block_until_ready(programs.update(params, gradients, state, norm, rate))
    return params, state, float(loss), float(norm), (seconds, time.perf_counter() - started)


def reserve(gibibytes: int, devices: list) -> None:
    """`host.reserve`, with its seconds."""
    from alst_jax.xla import host

    started = time.perf_counter()
    host.reserve(gibibytes, devices)
    print(
        f"{len(devices)} x {gibibytes} GiB of pinned memory made in {time.perf_counter() - started:.0f} s, "
        f"{used_gib():.1f} GiB of host memory in use",
        flush=True,
    )


def used_gib() -> float:
    """Host memory of the machine that is not available to others."""
    memory = psutil.virtual_memory()
    return (memory.total - memory.available) / GIB


class Monitor:
    """Samples some GPUs (nvidia-smi, once a second) and host memory while it is open."""

    def __init__(self, gpus: int):
        self.gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]

    def __enter__(self):
        command = [
            "nvidia-smi",
            "-i",
            ",".join(self.gpus),
            "--query-gpu=utilization.gpu,clocks.sm,power.draw",
            "--format=csv,noheader,nounits",
            "-l",
            "1",
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.samples, self.host_peak = [], used_gib()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def _read(self):
        for line in self._process.stdout:
            self.samples.append([float(x) for x in line.split(",")])
            self.host_peak = max(self.host_peak, used_gib())

    def __exit__(self, *_):
        self._process.terminate()
        self._thread.join()
        self.host_peak = max(self.host_peak, used_gib())

    def summary(self) -> str:
        """Host peak; mean share of time in which a kernel ran, SM clock and power."""
        means = [statistics.mean(column) for column in zip(*self.samples)]
        busy, clock, power = means or [float("nan")] * 3
        return f"host peak {self.host_peak:.1f} GiB  GPU busy {busy:.0f}%  {clock:.0f} MHz  {power:.0f} W"


if __name__ == "__main__":
    main()
