"""What must be set before jax starts: simulated devices, memory limits, scheduler. No jax import at the top."""

import os
import subprocess

import psutil

HOST_RESERVE = 0.08  # of host memory, left to the operating system, the data and the program


def prepare(simulate_devices: int | None) -> None:
    """Set the environment of a run, respecting what the user has set already. Call before anything imports jax.

    simulate_devices: that many CPU devices; None or 0: the machine's own devices.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is meant so
    if simulate_devices:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulate_devices)
        return
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # setting both names is an error
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", ".95")
    # jax caps pinned memory at 64 GB unless told otherwise; weights and optimizer states of an 8B model need more.
    gigabytes = int(psutil.virtual_memory().total * (1 - HOST_RESERVE) / 1e9)
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(gigabytes))
    if _has_nvidia_gpu():  # the flag is unknown to CPU-only builds, which would abort
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_gpu_enable_latency_hiding_scheduler" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_latency_hiding_scheduler=true".strip()


def _has_nvidia_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


PEAK_BF16_FLOPS = {  # dense, per device, from the vendor's data sheets; the key is a part of jax's device_kind
    "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device, or None where MFU has no meaning (CPU) or the device is not known."""
    matches = [name for name in PEAK_BF16_FLOPS if name in device_kind]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None
