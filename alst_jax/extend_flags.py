"""The flags of a longer context: how positions are stretched, and how the model is judged at length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from alst_jax.declare import AtLeast, Length, default

REFERENCE = "reference"
"""The word of --eval-long that names the embedded text."""
SHORT_CONTEXT = 4096
"""Tokens of LongPPL's short context in its paper (arXiv 2410.23771)."""


@dataclasses.dataclass(frozen=True)
class ExtendFlags:
    """A longer context: how positions are stretched, and how the model is judged at length."""

    rope_scaling: Annotated[Literal["yarn", "linear", "llama3", "dynamic"] | None, default("the model's own")] = None
    """Stretch the positions of the model by --rope-factor. Written to the exported config.json."""
    rope_factor: Annotated[float | None, default("none")] = None
    """With --rope-scaling: the new length divided by the length the model was made for."""
    rope_theta: Annotated[float | None, default("the model's own")] = None
    """Another base of the rotary embedding, instead of --rope-scaling. Written to the exported config.json."""
    eval_long: Annotated[str | None, default("none")] = None
    """Judge the model at --seq-len tokens, before the run, at evaluations and at the end: loss by position, LongPPL,
    generated tasks. A held-out file or directory with documents as long; `reference` is the embedded text."""
    eval_long_sequences: Annotated[int, AtLeast(1)] = 8
    """Sequences of --eval-long for the loss by position and LongPPL."""
    eval_long_samples: Annotated[int, AtLeast(0)] = 1
    """Generated cases for each task, length and depth of --eval-long; 0 leaves the tasks out."""
    eval_long_context: Annotated[Length, AtLeast(1)] = SHORT_CONTEXT
    """The short context of LongPPL, in tokens (arXiv 2410.23771)."""


def extend_mistakes(config: Any) -> Iterator[tuple[Any, str]]:
    """(whether the flags are wrong, message) for each rule. config: all flags of the run."""
    yield (
        config.rope_scaling is not None and config.rope_factor is None,
        f"--rope-scaling {config.rope_scaling} stretches the positions by a factor: add --rope-factor, the new "
        "length divided by the model's own",
    )
    yield (
        config.rope_factor is not None and config.rope_scaling is None,
        f"--rope-factor {config.rope_factor} has no meaning without --rope-scaling: add yarn, linear, llama3 or "
        "dynamic",
    )
    yield (
        config.rope_factor is not None and not config.rope_factor > 1,
        f"--rope-factor {config.rope_factor}: must be above 1, the new length divided by the model's own",
    )
    yield (
        config.rope_theta is not None and config.rope_scaling is not None,
        f"--rope-theta {config.rope_theta:g} and --rope-scaling {config.rope_scaling} stretch the same positions "
        "twice; leave one of them out"
        if config.rope_theta is not None
        else "",
    )
    yield (
        config.rope_theta is not None and not config.rope_theta > 1,
        f"--rope-theta {config.rope_theta}: must be above 1",
    )
    yield config.eval_long == "", f"--eval-long '': name a file or a directory, or `{REFERENCE}`"
    yield (
        config.eval_long is None
        and (config.eval_long_sequences, config.eval_long_samples, config.eval_long_context) != (8, 1, SHORT_CONTEXT),
        "--eval-long-sequences, --eval-long-samples and --eval-long-context say how --eval-long "
        "judges; name its file, or leave them out",
    )
    yield (
        config.eval_long is not None
        and config.eval_long_context != SHORT_CONTEXT
        and config.eval_long_context >= (config.seq_len or math.inf),
        f"--eval-long-context {config.eval_long_context}: LongPPL compares the whole text with a shorter context; "
        f"give fewer tokens than --seq-len {config.seq_len}",
    )
    yield (
        config.eval_long is not None and config.debug_attention_layers is not None,
        "--eval-long judges a model, and --debug-attention-layers leaves most of it out; leave one of them out",
    )
