"""Matrix products whose weight gradients keep the precision of the weight they are handed.

Weights reach the ops as *carriers*: float32 values that hold, say, bfloat16 numbers. The product runs in the dtype of
the activations; the compiler removes the conversion to float32 and back. The gradient of the weight leaves the matrix
product in float32. It is summed over tiles and over devices before anything rounds it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from alst_jax.xla.order import zeros_after


@jax.custom_vjp
def linear(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """x @ kernel in the dtype of x; the kernel's gradient has the kernel's dtype and is not rounded to x's."""
    return x @ kernel.astype(x.dtype)


def _linear_fwd(x, kernel):
    trained = kernel.perturbed  # a frozen kernel has no gradient: not even a product that the compiler must remove
    return linear(x.value, kernel.value), (x.value if trained else None, kernel.value)


def _linear_bwd(residuals, dy):
    x, kernel = residuals
    dx = jax.lax.dot_general(dy, kernel.astype(dy.dtype), (((dy.ndim - 1,), (1,)), ((), ())))
    if x is None:
        return dx, None
    tokens = tuple(range(x.ndim - 1))
    return dx, jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())), preferred_element_type=kernel.dtype)


linear.defvjp(_linear_fwd, _linear_bwd, symbolic_zeros=True)


@jax.custom_vjp
def instead(known: Array, made: Array) -> Array:
    """`known`, the value of `made`, with the gradient of `made`. The operations that compute `made` are not
    needed then."""
    return known


instead.defvjp(lambda known, made: (known, None), lambda _, dy: (None, dy))


def low_rank(
    x: Float[Array, "*B D"], down: Float[Array, "D R"], up: Float[Array, "R F"], scale: float
) -> Float[Array, "*B F"]:
    """scale x (x @ down @ up), the term that an adapter adds to a linear layer (LoRA, arXiv 2106.09685)."""
    return linear(linear(x, down) * jnp.asarray(scale, x.dtype), up)


def add_bias(x: Float[Array, "*B F"], bias: Float[Array, "F"]) -> Float[Array, "*B F"]:
    """x + bias, added and summed in the wider of the two dtypes, returned in x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, bias.dtype))
    return (wide + jnp.broadcast_to(bias, x.shape)).astype(x.dtype)


def embed(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    """Rows of the table in `dtype`; gradients of equal tokens are summed in the table's dtype."""
    return _rows(jnp.dtype(dtype), table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(dtype, table, tokens):
    return table.astype(dtype)[tokens]


def _rows_fwd(dtype, table, tokens):
    kept = (table.value, tokens.value) if table.perturbed else None
    return _rows(dtype, table.value, tokens.value), kept


def _rows_bwd(dtype, residuals, dy):
    if residuals is None:
        return None, None
    table, tokens = residuals
    zeros = zeros_after(dy, table.shape, table.dtype, table)
    return zeros.at[tokens].add(dy.astype(table.dtype)), None


_rows.defvjp(_rows_fwd, _rows_bwd, symbolic_zeros=True)
