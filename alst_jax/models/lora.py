"""Low-rank adapters of the linear layers of a block (LoRA, arXiv 2106.09685), beside weights that are frozen.

A linear layer with an adapter computes x @ kernel + scale * (x @ lora_A) @ lora_B. Names and conventions are PEFT's;
lora_A [in, rank] and lora_B [rank, out] are the transposes of its tensors. Adapters are float32 whatever the weights
are. No family knows of them: targets are the names of linear layers.
"""

import dataclasses
import re
from typing import Any

from alst_jax.models.tree import PyTree, dotted, names, partition

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a block, in its order
DOWN, UP = "lora_A", "lora_B"


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model: which linear layers have one, and how their output is scaled.

    targets: of LINEARS. rslora: scale is alpha / sqrt(rank) (arXiv 2312.03732). dropout: in training, the part of an
    adapter's inputs that is set to zero; seed: of its masks (ops/dropout.py).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = LINEARS
    rslora: bool = False
    dropout: float = 0.0
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def is_adapter(path: tuple) -> bool:
    """Whether the leaf at this path, or with these names, is a part of an adapter."""
    return names(path)[-1] in (DOWN, UP)


def is_trained(path: tuple, freeze: str | None, lora: Lora | None) -> bool:
    """Whether a parameter is trained. freeze: pattern of the dotted names that are not, None for none; beside adapters,
    which are always trained, None is for all."""
    if is_adapter(path):
        return True
    return lora is None if freeze is None else not re.search(freeze, dotted(path))


def adapters_of(params: PyTree) -> tuple[PyTree, PyTree]:
    """(the adapters, the parameters of the base model) of a tree, with None in each other's places."""
    return partition(params, is_adapter)


def adapted(block: Any, lora: Lora | None) -> list[tuple[int, Any]]:
    """The linear layers of a block that have adapters, each with its number in LINEARS."""
    targets = () if lora is None else [(n, name) for n, name in enumerate(LINEARS) if name in lora.targets]
    return [
        (n, getattr(part, name)) for n, name in targets for part in (block.self_attn, block.mlp) if hasattr(part, name)
    ]
