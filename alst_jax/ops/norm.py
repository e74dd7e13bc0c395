"""Root-mean-square norm."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, "D"],
    eps: float,
    offset: float = 0.0,
    square: Float[Array, "*B 1"] | None = None,
) -> Float[Array, "*B D"]:
    """x / rms(x) * (scale + offset) over the last dim, computed in float32 and returned in the dtype of x.

    square: the mean square of more than these columns of x, where x is a part.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt((mean_square(x) if square is None else square) + eps)
    factor = scale.astype(jnp.float32) + offset if offset else scale.astype(jnp.float32)
    return (normed * jnp.broadcast_to(factor, x.shape)).astype(x.dtype)


def mean_square(x: Float[Array, "*B D"]) -> Float[Array, "*B 1"]:
    """The mean of x^2 over the last dim, float32."""
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
