"""Gated activations of the MLP."""

import jax
from jaxtyping import Array, Float

from alst_jax.xla.dtypes import accumulation_dtype


@jax.custom_vjp
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up, in float32 or wider inside, returned in the dtype of gate.

    Its two gradients are one expression of the same three arrays, so that a compiler makes both in one pass over them.
    """
    return _wide(lambda gate, up: gate * jax.nn.sigmoid(gate) * up, gate, up).astype(gate.dtype)


def _wide(fn, *arrays):
    return fn(*(x.astype(accumulation_dtype(x.dtype)) for x in arrays))


def _bwd(residuals, dy):
    def gradients(gate, up, dy):
        sigmoid = jax.nn.sigmoid(gate)
        return dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid

    return tuple(d.astype(x.dtype) for d, x in zip(_wide(gradients, *residuals, dy), residuals))


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _bwd)


def geglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """gelu(gate) * up with the tanh approximation, in float32 or wider inside, returned in the dtype of gate."""
    return _wide(lambda gate, up: jax.nn.gelu(gate, approximate=True) * up, gate, up).astype(gate.dtype)


GATED = {"silu": swiglu, "gelu_tanh": geglu}  # by `ModelConfig.activation`
