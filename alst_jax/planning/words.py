"""A job's profile in the words of the command line."""

import shlex
from collections.abc import Iterator

from alst_jax.models.config import ModelConfig
from alst_jax.planning.job import Job

PLACEMENTS = ("offload_activations", "offload_weights", "offload_optimizer")


def describe(job: Job) -> str:
    """The choices of a job as flags."""
    words = list(job.profile.flags())
    if job.profile.update_in_backward:
        words.append("--clip-norm 0")
    words += [f"--{name} {value}" for name, value in (("optimizer-states", job.states), ("master-weights", job.master))
              if value != "float32"]
    if job.freeze is not None:
        words.append(f"--freeze {shlex.quote(job.freeze)}")
    if job.model.attention_layers is not None:
        words.append(f"--debug-attention-layers {job.model.attention_layers}")
    return " ".join(words) or "nothing offloaded, every layer's input kept"


def describe_debug(model: ModelConfig) -> str:
    """The warning of a model whose later layers have no attention."""
    return (f"DEBUG   attention runs in {model.attention_layers} of {model.num_layers} layers (--debug-attention-layers): "
            "planned bytes are those of a full run (docs/log.md has the differences of measured ones), seconds are not; "
            "losses and weights mean nothing, and nothing is saved or exported")


def describe_changes(old: Job, new: Job) -> Iterator[str]:
    """The flags by which the profiles of two jobs differ."""
    yield from new.profile.flags(than=old.profile)
