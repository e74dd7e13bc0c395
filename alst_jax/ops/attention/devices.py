"""Which kernel runs on which device."""

import dataclasses
import importlib.util

from alst_jax.config import UserError
from alst_jax.ops.attention.spec import Kernel

GPU_KERNEL = "cudnn"  # of `--attention auto`


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, here or in a plan. capability: "9.0" is Hopper. present: whether kernels run here and must be installed."""

    name: str
    capability: str
    present: bool


def installed(package: str) -> bool:
    """Whether a module of this name can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def choose_kernel(wanted: str, kernels: dict[str, Kernel], gpu: Gpu | None, dtype: str, head_dim: int) -> Kernel:
    """The kernel of --attention. gpu: None on a CPU. UserError, with the flag and a way out, if it cannot run there."""
    if wanted == "auto":
        if gpu and dtype not in kernels[GPU_KERNEL].dtypes:
            raise UserError(f"--dtype {dtype} on a GPU: cuDNN attention computes in bfloat16 only. Use --dtype "
                            "bfloat16, or --attention xla, which is exact and very slow at length")
        wanted = GPU_KERNEL if gpu else "xla"
    kernel = kernels[wanted]
    if kernel.needs_gpu and not gpu:
        raise UserError(f"--attention {wanted} needs an NVIDIA GPU, and jax sees none (is jax[cuda12] or "
                        "jax[cuda13] installed?); use --attention xla")
    if dtype not in kernel.dtypes:
        raise UserError(f"--attention {wanted} needs --dtype bfloat16; use that or --attention xla")
    if kernel.package and gpu.present and not installed(kernel.package):
        raise UserError(f"--attention {wanted}: the package is not installed ({kernel.install}); or use --attention cudnn")
    if kernel.capabilities and gpu.capability not in kernel.capabilities:
        raise UserError(f"--attention {wanted}: its kernel was tested on Hopper GPUs only, not on {gpu.name}; use "
                        "--attention cudnn")
    description, serves = kernel.head_dims
    if not serves(head_dim):
        raise UserError(f"--attention {wanted}: the model's head_dim={head_dim} must be {description}; use "
                        "--attention xla")
    return kernel
