"""The limit of each error, from dtypes and lengths. No limit is fitted to a measurement.

A result that passes n operations in a row is off by at most n unit roundoffs u, to first order; where n is large, by at
most LAMBDA sqrt(n) of them, but for a chance of 2 exp(-LAMBDA^2 / 2), 7e-4 (Higham and Mary, SIAM J. Sci. Comput. 41,
2019). The same holds for the terms of a sum, whose unit is float32's.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

LAMBDA = 4.0
FLOAT32 = 2.0**-24
TENSOR_FLOAT32 = 2.0**-11  # GPUs round float32 factors to this, unless jax_default_matmul_precision forbids it


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: `error` must be at most `limit`. reason: of the limit."""

    name: str
    error: float
    limit: float
    reason: str

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.limit)  # not a number is no pass


def unit(dtype: str) -> float:
    """The unit roundoff of products of this dtype on the devices at hand."""
    if dtype == "float32":
        exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
        return TENSOR_FLOAT32 if jax.default_backend() == "gpu" and not exact else FLOAT32
    return float(jnp.finfo(dtype).eps) / 2


def row(name: str, error: Any, dtype: str, roundings: int, terms: int) -> Row:
    """A row whose limit allows `roundings` operations of this dtype, each a float32 sum of at most `terms`
    terms."""
    many = lambda n: min(n, LAMBDA * math.sqrt(n))
    limit = many(roundings) * (unit(dtype) + many(terms) * FLOAT32)
    return Row(name, float(error), limit, f"{roundings} roundings to {dtype}, sums of {terms:,} terms in float32")


def exact(name: str, error: Any) -> Row:
    """A row that allows no error: numbers are moved, not computed."""
    return Row(name, float(error), 0.0, "moved, not computed")
