"""The flags of adapters (LoRA)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

from alst_jax.declare import AtLeast, default


@dataclasses.dataclass(frozen=True)
class LoraFlags:
    """Adapters beside frozen weights, in PEFT's format."""

    lora_rank: Annotated[int | None, AtLeast(1), default("no adapters: the weights are trained")] = None
    """Freeze the model and train low-rank adapters of this rank beside its linear layers. The run ends with
    OUT/adapter, which PEFT loads. Parameters outside of these layers that --freeze does not match are trained too."""
    lora_alpha: Annotated[float | None, default("the rank")] = None
    """The adapters' output is scaled by this / rank."""
    lora_targets: str = "all"
    """Linear layers that get adapters: all, or names as in q_proj,v_proj."""
    lora_dropout: Annotated[float | None, default("0; with --adapter, its own")] = None
    """In training, the part of an adapter's inputs that is set to zero, drawn anew in each step; 0: no dropout."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    adapter: Annotated[str | None, default("new adapters")] = None
    """Continue this adapter, a directory in PEFT's format. It sets rank, alpha, targets and rslora, and the dropout
    unless --lora-dropout is typed."""
    merge_adapter: bool = False
    """Also write OUT/hf at the end: the model with its adapters merged into the weights."""


def lora_mistakes(config: Any) -> Iterator[tuple[Any, str]]:
    """(whether the flags are wrong, message) for each rule. config: all flags of the run."""
    adapters = config.lora_rank is not None or config.adapter is not None
    for field in ("lora_alpha", "lora_targets", "lora_dropout", "rslora", "merge_adapter"):
        yield (
            not adapters and getattr(config, field) != getattr(LoraFlags, field),
            f"--{field.replace('_', '-')} is about adapters, and the run has none; add --lora-rank or --adapter",
        )
    alpha = config.lora_alpha
    yield alpha is not None and not alpha > 0, f"--lora-alpha {alpha}: must be a positive number"
    yield (
        config.lora_dropout is not None and not 0 <= config.lora_dropout < 1,
        f"--lora-dropout {config.lora_dropout}: must be at least 0 and below 1, the part of an adapter's inputs "
        "that is set to zero",
    )
    yield (
        config.merge_adapter and not config.export,
        "--merge-adapter with --no-export: merged weights are an export; leave one of them out",
    )
    yield (
        adapters and config.resize_vocabulary,
        "--resize-vocabulary with adapters: they would have no rows for the new tokens; add the rows in a run "
        "without --lora-rank first, or leave --resize-vocabulary out",
    )
    yield (
        adapters and config.check_numerics,
        "--check-numerics compares the layers without adapters; check the base model in a run without --lora-rank "
        "and --adapter",
    )
