"""A job's profile in the words of the command line."""

import dataclasses
import shlex
from collections.abc import Iterator

from alst_jax.models.config import ModelConfig
from alst_jax.planning.job import Job

PLACEMENTS = ("offload_activations", "offload_weights", "offload_optimizer")


def describe(job: Job) -> str:
    """The choices of a job as flags."""
    profile = job.profile
    words = [f"--{name.replace('_', '-')}" for name in (*PLACEMENTS, "update_in_backward") if getattr(profile, name)]
    if profile.update_in_backward:
        words.append("--clip-norm 0")
    if profile.segment_layers != (1,):
        words.append(f"--segment-layers {' '.join(map(str, profile.segment_layers))}")
    for name, value, default in (
            ("keep-attention-on-device", profile.keep_attention_on_device, 0),
            ("keep-attention-on-host", profile.keep_attention_on_host, 0), ("head-chunks", profile.head_chunks, 1),
            ("stack", profile.stack, "segments"),
            ("loss-tile", profile.loss_tile or 0, 0), ("mlp-tile", profile.mlp_tile or 0, 0),
            ("optimizer-states", job.states, "float32"), ("master-weights", job.master, "float32")):
        if value != default:
            words.append(f"--{name} {value}")
    if job.freeze is not None:
        words.append(f"--freeze {shlex.quote(job.freeze)}")
    if job.model.attention_layers is not None:
        words.append(f"--debug-attention-layers {job.model.attention_layers}")
    return " ".join(words) or "nothing offloaded, every layer's input kept"


def describe_debug(model: ModelConfig) -> str:
    """The warning of a model whose later layers have no attention."""
    return (f"DEBUG   attention runs in {model.attention_layers} of {model.num_layers} layers (--debug-attention-layers): "
            "bytes are those of a full run, seconds are not; losses and weights mean nothing, and nothing is saved or "
            "exported")


def describe_changes(old: Job, new: Job) -> Iterator[str]:
    """The flags by which the profiles of two jobs differ."""
    for field in dataclasses.fields(old.profile):
        before, after = getattr(old.profile, field.name), getattr(new.profile, field.name)
        if before != after:
            flag = field.name.replace("_", "-")
            if isinstance(after, bool):
                yield f"--{'' if after else 'no-'}{flag}"
            else:
                yield f"--{flag} {' '.join(map(str, after)) if isinstance(after, tuple) else after}"
