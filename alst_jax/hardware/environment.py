"""Settings before jax starts: simulated devices, memory limits, scheduler. No jax import at the top."""

import ctypes
import glob
import importlib.util
import itertools
import os
import platform
import subprocess
from collections.abc import Callable

from alst_jax.config import UserError
from alst_jax.hardware.host_limits import host_memory
from alst_jax.hardware.machines import GIB, MEMORY_FRACTION, machine_of_kind, pinned_share

HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
# With dynamic slice fusion, a kernel of an opaque call whose output is both put into a stack and used otherwise is run
# twice (found with a Pallas attention kernel in programs of jax 0.11.2, see docs/log.md); cuDNN's is not.
# XLA's own rematerialization counts arrays in host memory as the device's. With many of them it recomputes to no avail:
# no program needed less (docs/log.md), and compiling one of 13 segments took 25 minutes instead of two.
# Asynchronous copies inside of the device's memory share the streams of copies from and to the host, and wait for them.
XLA_GPU_FLAGS = {
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_enable_dynamic_slice_fusion": "false",
    "xla_disable_hlo_passes": "rematerialization,dynamic-slice-copy-fusion-async-wrapper",
}
DETERMINISTIC_FLAGS = {"xla_gpu_deterministic_ops": "true"}
# The kernels of a CUDA graph are in a trace without the names of their operations, hence without a scope.
TRACED_FLAGS = {"xla_gpu_enable_command_buffer": ""}
# XLA ends a process whose simulated devices do not meet within 40 s, as on a machine with much other work.
XLA_CPU_FLAGS = {"xla_cpu_collective_call_terminate_timeout_seconds": "1200"}
CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_limited: list[tuple[int, int]] = []  # (bytes of the host, devices) of the limit that `prepare` set, if it did


def prepare(
    simulate_devices: int | None,
    absent_devices: bool = False,
    host_memory_gib: float | int | None = None,
    devices: int | None = None,
    deterministic: bool = False,
    sharing: int = 1,
    traced: bool = False,
) -> None:
    """Set the environment of a run; variables that the user has set stay. Call before anything imports jax.

    simulate_devices: that many CPU devices; None or 0: the machine's own devices. absent_devices: only to plan for, or
    compile for, devices that are not here; the machine's own devices are not used. host_memory_gib: use no more of
    the host. devices: this many of the machine's devices share it; None: all do. deterministic: the compiler
    chooses only operations that sum in a fixed order. sharing: processes of the run on this host that see other GPUs
    each. traced: the run traces steps.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is left out on purpose
    if absent_devices:
        if has_cuda_compiler():
            _set_compiler_flags(deterministic, traced)
        import jax

        jax.config.update("jax_platforms", "cpu")
        return
    if simulate_devices:
        _add_flags(XLA_CPU_FLAGS)
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulate_devices)
        return
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # setting both names is an error
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    # Each device has a separate pool of pinned memory, which jax caps at 64 GiB by default; weights and
    # optimizer states of an 8B model need more. The unit is GiB, whatever the name says.
    gpus = visible_gpus() * sharing
    total, pools = host_memory(host_memory_gib), max(1, min(gpus, devices or gpus))
    _limited[:] = [] if HOST_LIMIT in os.environ else [(total, pools)]
    os.environ.setdefault(HOST_LIMIT, str(pinned_share(total, pools) // GIB))
    if gpus and has_cuda_compiler():  # the flag is unknown to CPU-only builds, which would abort
        _set_compiler_flags(deterministic, traced)


def leave_room(beside: Callable[[int], int]) -> None:
    """Lower the limit on pinned memory that `prepare` set, if the process would have too little memory beside its
    pools. A limit that the user has set stays. Call before jax makes its devices: they read the limit once.

    beside: number of devices -> bytes of host memory beside their pools.
    """
    for total, pools in _limited:
        share = max(0, total - beside(pools)) // pools
        os.environ[HOST_LIMIT] = str(min(pinned_share(total, pools), share) // GIB)


def pinned_limit() -> int | None:
    """Bytes of host memory that jax may pin for each device, as the environment says; None if it does not. UserError if
    it is no whole number."""
    text = os.environ.get(HOST_LIMIT)
    if text is not None and not text.isdigit():
        raise UserError(f"{HOST_LIMIT}={text}: a whole number of GiB")
    return None if text is None else int(text) * GIB


def _set_compiler_flags(deterministic: bool, traced: bool) -> None:
    _add_flags(XLA_GPU_FLAGS | (DETERMINISTIC_FLAGS if deterministic else {}) | (TRACED_FLAGS if traced else {}))


def _add_flags(wanted: dict[str, str]) -> None:
    """Set these flags of XLA, but none that the user has set."""
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{name}={value}" for name, value in wanted.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def return_freed_memory() -> None:
    """Give freed memory that the C library keeps back to the system: 1.5 of 3.3 GiB after compiling 8 layers of an 8B
    model. Does nothing where the library is not glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def has_cuda_compiler() -> bool:
    """Whether this installation can compile for NVIDIA GPUs, with or without one."""
    found = importlib.util.find_spec("jax_plugins")
    return found is not None and any(importlib.util.find_spec(name) for name in CUDA_PLUGINS)


def visible_gpus() -> int:
    """The number of NVIDIA GPUs that jax will see: the machine's, less the GPUs that CUDA_VISIBLE_DEVICES leaves out.
    Asks nvidia-smi, or reads the driver's files where a container has no nvidia-smi."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, text=True, check=True).stdout
        here = sum(line.startswith("GPU ") for line in listed.splitlines())
    except (OSError, subprocess.SubprocessError):
        here = len(glob.glob("/dev/nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return here
    names = (name.strip() for name in visible.split(","))  # CUDA stops at the first that is none
    return min(here, sum(1 for _ in itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), names)))


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device, or None where MFU has no meaning (CPU) or the device is not known."""
    machine = machine_of_kind(device_kind)
    return machine and machine.peak_flops
