"""Attention sinks: a learned score a head that takes part in each softmax and has no value (gpt-oss, StreamingLLM).

A kernel computes o and the log-sum-exp l of the scores without the sink s. With it, the log-sum-exp is
l' = log(exp l + exp s) and the output o' = exp(l - l') o. A kernel's backward pass recomputes its weights from the
log-sum-exp, so from o' and l' it gives the gradients of q, k and v with the sink. The gradient of s is
-sum over queries of exp(s - l') (do . o').

B rows, S tokens, N query heads, H head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alst_jax.xla.dtypes import accumulation_dtype


def add_sinks(
    o: Float[Array, "B S N H"], lse: Float[Array, "B N S"], sinks: Float[Array, "N"]
) -> tuple[Float[Array, "B S N H"], Float[Array, "B N S"]]:
    """(o, log-sum-exp) with the sinks, from those without."""
    with_sinks = jnp.logaddexp(lse, sinks.astype(lse.dtype)[None, :, None])
    kept = jnp.moveaxis(jnp.exp(lse - with_sinks), 1, 2)[..., None]
    return (o.astype(accumulation_dtype(o.dtype)) * kept).astype(o.dtype), with_sinks


def gradient_of_sinks(
    sinks: Float[Array, "N"], o: Float[Array, "B S N H"], lse: Float[Array, "B N S"], do: Float[Array, "B S N H"]
) -> Float[Array, "N"]:
    """From the results with the sinks and the gradient of o."""
    wide = accumulation_dtype(o.dtype)
    delta = jnp.einsum("bsnh,bsnh->bns", o.astype(wide), do.astype(wide))
    weights = jnp.exp(sinks.astype(lse.dtype)[None, :, None] - lse)
    return -(weights * delta).sum((0, 2)).astype(sinks.dtype)
