"""Adapters added to the weights that they stand beside, a layer at a time on the host."""

from typing import Any

import jax
import numpy as np

from alst_jax.models.hf_saving import Stored, fetch
from alst_jax.models.lora import DOWN, UP, Lora, adapters_of
from alst_jax.models.tree import names


class Merged:
    """A stacked kernel + scale * lora_A @ lora_B. A number as index computes that layer (`Stored`)."""

    def __init__(self, kernel: jax.Array | np.ndarray | Stored, down: Any, up: Any, scale: float):
        self._parts, self._scale = (kernel, down, up), scale
        self.shape, self.dtype = tuple(kernel.shape), np.dtype(kernel.dtype)

    def __getitem__(self, layer: int) -> np.ndarray:
        kernel, down, up = (fetch(part, layer) for part in self._parts)
        return merge(kernel, down, up, self._scale)


def merge(kernel: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float) -> np.ndarray:
    """kernel[in, out] + scale * down[in, rank] @ up[rank, out], in float32 and rounded once."""
    wide = np.promote_types(np.float32, down.dtype)
    return (kernel.astype(wide) + wide.type(scale) * (down.astype(wide) @ up.astype(wide))).astype(kernel.dtype)


def merged(params: Any, lora: Lora) -> Any:
    """The tree of the base model's parameters, those with adapters merged when they are read."""
    adapters, base = adapters_of(params)
    parts = {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)}

    def one(path, kernel):
        *module, last = names(path)
        down, up = (parts.get((*module, name)) for name in (DOWN, UP))
        return kernel if last != "kernel" or down is None else Merged(kernel, down, up, lora.scale)

    return jax.tree_util.tree_map_with_path(one, base)
