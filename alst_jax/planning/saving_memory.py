"""Bytes of host memory that a save holds beside the state that is saved (the limits are those of storage/saving.py)."""

from typing import TYPE_CHECKING

from alst_jax.hardware.machines import LARGEST_HOST
from alst_jax.models.config import ModelConfig
from alst_jax.storage import saving

if TYPE_CHECKING:
    from alst_jax.planning.footprint import Job

WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1, "low-bits": 2, "none": 0}  # of a state's or a master's element


def saving_bytes(job: "Job", free: int) -> int:
    """Bytes of host memory, of one device's part, that a save needs beside those of a step. free: those of a step that
    are not in use then."""
    profile, model, on_host = job.profile, job.model, min(job.devices, LARGEST_HOST)
    state_width = max(WIDTHS[job.states], WIDTHS[job.master] if job.width == 2 else 0)
    has_master = job.width == 2 and job.master != "none"
    held, saved = 0, 0
    for offloaded, width, arrays in (
            (profile.offload_weights, job.width, 1), (profile.offload_optimizer, state_width, 2 + has_master)):
        size = model.num_params * width // job.devices
        saved += arrays * size
        if not offloaded:
            largest = largest_parameter(model) * width // job.devices
            held += min(arrays * size, 2 * max(largest, saving.COPIES // on_host))
    return max(0, held - free) + min(saved, saving.BUFFERS // on_host)


def largest_parameter(model: ModelConfig) -> int:
    """Elements of the largest array of weights: the layers' are stacked."""
    columns = max(model.intermediate_size, model.num_heads * model.head_dim)
    return model.hidden_size * max(model.num_layers * columns, model.vocab_size)
