"""Sums of weight gradients over tiles, in float32."""

from typing import Any

import jax

from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.order import zeros_after

PyTree = Any


def widen(weights: PyTree) -> PyTree:
    """The weights in the dtype of their sums."""
    return jax.tree.map(lambda w: w.astype(accumulation_dtype(w.dtype)), weights)


def zero_sums(array: jax.Array, weights: PyTree) -> PyTree:
    """Zeros shaped like the weights, made after `array`."""
    return jax.tree.map(lambda w: zeros_after(array, w.shape, accumulation_dtype(w.dtype), w), weights)


def add_parts(sums: PyTree, parts: PyTree) -> PyTree:
    """The sums plus the gradients of one tile."""
    return jax.tree.map(lambda s, d: s + d.astype(s.dtype), sums, parts)
