"""Dtypes in which sums are computed."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which many values of `dtype` are summed: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)
