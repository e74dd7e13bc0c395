"""Which kernel runs on which device."""

import dataclasses
import importlib.util
from typing import NamedTuple

from alst_jax.config import UserError
from alst_jax.ops.attention.spec import Kernel

FASTEST = "flash"  # of `--attention auto`, where it runs
FALLBACK = "cudnn"  # of `--attention auto` on other GPUs


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, here or in a plan. capability: "9.0" is Hopper. present: whether kernels run here and must be
    installed."""

    name: str
    capability: str
    present: bool


class Chosen(NamedTuple):
    """A kernel, and the reason for it."""

    kernel: Kernel
    why: str


def installed(package: str) -> bool:
    """Whether a module of this name can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def choose_kernel(
    wanted: str, kernels: dict[str, Kernel], gpu: Gpu | None, dtype: str, head_dim: int, deterministic: bool = False
) -> Chosen:
    """The kernel of --attention and --deterministic. gpu: None on a CPU. UserError, with the flag and a way out, if it
    cannot run there."""
    suffix, why = "-deterministic" if deterministic else "", "as --attention says"
    if wanted == "auto":
        wanted, why = automatic(kernels, gpu, dtype, head_dim, suffix)
    if wanted not in kernels:  # in the flags of an older run
        raise UserError(f"--attention {wanted}: there is no such kernel any more; use --attention auto")
    kernel = kernels.get(f"{wanted}{suffix}", kernels[wanted])
    check_kernel(kernels, kernel, wanted, gpu, dtype, head_dim)
    if deterministic and gpu and kernel.name == FALLBACK:
        raise UserError(
            f"--deterministic with --attention {FALLBACK}: cuDNN adds gradients in no fixed order; use "
            "--attention flash (Hopper, extra `flash`) or xla, or leave --deterministic out"
        )
    return Chosen(kernel, why)


def automatic(kernels: dict[str, Kernel], gpu: Gpu | None, dtype: str, head_dim: int, suffix: str) -> tuple[str, str]:
    """The name of the fastest kernel that runs there, and the reason."""
    if gpu is None:
        return "xla", "the only one without a GPU"
    if dtype not in kernels[FALLBACK].dtypes:
        raise UserError(
            f"--dtype {dtype} on a GPU: the fast attention kernels compute in bfloat16 only. Use --dtype "
            "bfloat16, or --attention xla, which is exact and very slow at length"
        )
    try:
        check_kernel(kernels, kernels[f"{FASTEST}{suffix}"], FASTEST, gpu, dtype, head_dim)
        if gpu.present:
            kernels[FASTEST].prepare()
    except UserError as error:
        reason = str(error).removeprefix(f"--attention {FASTEST}: ").split("; use --attention")[0].split("; or use")[0]
        return FALLBACK, f"not {FASTEST}, the fastest on Hopper: {reason}"
    return FASTEST, "the fastest on Hopper"


def check_kernel(
    kernels: dict[str, Kernel], kernel: Kernel, wanted: str, gpu: Gpu | None, dtype: str, head_dim: int
) -> None:
    """UserError if the kernel named `wanted` by a user does not run there. What cannot be mended is named before what
    can be installed."""
    if kernel.needs_gpu and not gpu:
        raise UserError(
            f"--attention {wanted} needs an NVIDIA GPU, and jax sees none (is jax[cuda12] or "
            "jax[cuda13] installed?); use --attention xla"
        )
    if dtype not in kernel.dtypes:
        raise UserError(f"--attention {wanted} needs --dtype bfloat16; use that or --attention xla")
    if kernel.capabilities and gpu.capability not in kernel.capabilities:
        raise UserError(
            f"--attention {wanted}: its kernel was tested on Hopper GPUs only, not on {gpu.name}; use --attention cudnn"
        )
    description, serves = kernel.head_dims
    if not serves(head_dim):
        able = [name for name in (FASTEST, FALLBACK) if _serves(kernels[name], gpu, head_dim)]
        raise UserError(
            f"--attention {wanted}: the model's head_dim={head_dim} must be {description}; use --attention "
            f"{able[0] if able else 'xla'}"
        )
    if kernel.package and gpu.present and not installed(kernel.package):
        raise UserError(
            f"--attention {wanted}: the package is not installed ({kernel.install}); or use --attention cudnn"
        )


def _serves(kernel: Kernel, gpu: Gpu | None, head_dim: int) -> bool:
    """Whether a kernel, once installed, serves the head dim on this GPU."""
    return kernel.head_dims[1](head_dim) and (
        not kernel.capabilities or bool(gpu) and gpu.capability in kernel.capabilities
    )
