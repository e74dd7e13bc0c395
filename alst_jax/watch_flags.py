"""The flags of checks before a run and of watching it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class WatchFlags:
    """Checks before a run, and policies for steps that look wrong."""

    check_numerics: bool = False
    """Before the run, compare each kernel, collective and update at the run's own length and devices with an
    independent computation. If one is off, the run does not start."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """Reaction to a loss or gradient that is not finite. stop: save the state before the step and end. skip: leave out
    the batch. rewind: go back to the last checkpoint and leave out the batch."""
    on_spike: Literal["warn", "stop", "skip", "rewind"] = "warn"
    """Reaction to a loss or gradient norm far above those of the last 50 steps. warn: print a line. The others as for
    --on-nonfinite."""
    spike_deviations: float = 8.0
    """How far above their median, in standard deviations, a loss or the logarithm of a gradient norm is a spike."""


def watch_mistakes(config: Any) -> Iterator[tuple[Any, str]]:
    """(whether the flags are wrong, message) for each rule. config: all flags of the run."""
    yield (
        config.check_numerics and config.planning,
        "--check-numerics computes on the devices of a run, and --plan-only and --find-max-seq-len run nothing; "
        "leave one of them out",
    )
    yield (
        config.show_samples is not None and (config.check_numerics or config.debug_attention_layers is not None),
        "--show-samples prints samples and ends: leave out --check-numerics and --debug-attention-layers",
    )
    yield (not config.spike_deviations > 0, f"--spike-deviations {config.spike_deviations}: must be above 0")
    for field in ("on_nonfinite", "on_spike"):
        name, value = f"--{field.replace('_', '-')}", getattr(config, field)
        yield (
            value == "skip" and config.update_in_backward,
            f"{name} skip: with --update-in-backward the step is applied before its loss is known; use {name} rewind",
        )
        yield (
            value == "rewind" and config.save_every is None and not config.planning,
            f"{name} rewind goes back to a checkpoint; say how often one is saved with --save-every",
        )
