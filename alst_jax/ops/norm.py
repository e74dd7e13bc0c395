"""Root-mean-square norm."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """x / rms(x) * scale over the last dim, computed in float32 and returned in the dtype of x."""
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)
