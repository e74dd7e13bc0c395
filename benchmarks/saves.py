"""Costs of a save: seconds, host memory beside the arrays, bytes on disk. Random bits, which do not compress.

    python -m benchmarks.saves                          # needs 5 GB of memory and 2 GB in /tmp
    python -m benchmarks.saves --slow 300 --cores 16    # a disk of 300 MB/s in all (slow_disk.c; needs cc), 16 writers

Each case runs in a process of its own, on simulated CPU devices; its second save is measured. Arrays are written
without a copy, like arrays in pinned memory on a GPU machine. The disk is the machine's, cached by its kernel.
"""

import argparse
import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

CASES = {  # shape, bytes of an element, devices, the dim that is sharded
    "8B gate_proj, 8 layers, bfloat16": ((8, 4096, 14336), 2, 1, 1),
    "32B gate_proj, 3 layers, float32": ((3, 5120, 25600), 4, 1, 1),
    "70B gate_proj, 2 layers, float32": ((2, 8192, 28672), 4, 1, 1),
    "8B embedding, bfloat16, hidden dim over 4": ((128256, 4096), 2, 4, 1),
    "8B embedding, bfloat16, vocabulary over 4": ((128256, 4096), 2, 4, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", type=int, metavar="MB/S", help="a slower disk (default: the machine's)")
    parser.add_argument("--cores", type=int, help="as many writers as on a machine with so many cores")
    parser.add_argument("--case", choices=CASES, help="one case in this process, which has to have its devices")
    args = parser.parse_args()
    if args.case:
        return print(*_measure(*CASES[args.case], args.cores))
    print(f"{'':43} {'arrays':>8} {'seconds':>8} {'memory':>8} {'on disk':>8}   (GB)")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | (_slow_disk(folder, args.slow) if args.slow else {})
        cores = ["--cores", str(args.cores)] if args.cores else []
        for case, (_, _, devices, _) in CASES.items():
            flags = f"--xla_force_host_platform_device_count={devices}"
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.saves", "--case", case, *cores],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            )
            size, seconds, memory, written = map(float, done.stdout.split())
            print(f"{case:43} {size / 1e9:8.3f} {seconds:8.1f} {memory / 1e9:8.2f} {written / 1e9:8.3f}", flush=True)


def _slow_disk(folder: str, megabytes: int) -> dict[str, str]:
    """Environment of a process whose writes take that long."""
    library = f"{folder}/slow_disk.so"
    source = pathlib.Path(__file__).with_name("slow_disk.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": library, "SLOW_MBS": str(megabytes)}


def _measure(shape: tuple[int, ...], itemsize: int, devices: int, dim: int, cores: int | None) -> tuple[float, ...]:
    """(bytes of the array, seconds, bytes of memory at the peak beside those before, bytes on disk)"""
    import jax
    import ml_dtypes
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from orbax.checkpoint._src.serialization import tensorstore_utils

    from alst_jax.storage.checkpoint import Checkpoints

    if cores:
        os.cpu_count = lambda: cores
        tensorstore_utils.get_ts_context = functools.partial(
            tensorstore_utils.get_ts_context, data_copy_concurrency_limit=cores
        )
    bits = np.random.default_rng(0).integers(0, 256**itemsize, shape, np.dtype(f"u{itemsize}"))
    sharding = NamedSharding(jax.make_mesh((devices,), ("x",)), PartitionSpec(*[None] * dim, "x"))
    array = jax.block_until_ready(jax.device_put(bits.view({2: ml_dtypes.bfloat16, 4: np.float32}[itemsize]), sharding))
    del bits
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, {"small": jax.numpy.ones(1000)}, None, {})
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM is the peak
        before, start = _kilobytes("VmRSS"), time.perf_counter()
        checkpoints.save(2, {"large": array}, None, {})
        seconds, memory = time.perf_counter() - start, (_kilobytes("VmHWM") - before) * 1024
        files = pathlib.Path(folder, "checkpoints", "2").rglob("*")
        saved = sum(file.stat().st_size for file in files if file.is_file())
    return array.nbytes, seconds, memory, saved


def _kilobytes(field: str) -> int:
    return int(re.search(field + r":\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
