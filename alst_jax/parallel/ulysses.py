"""Ulysses sequence parallelism (arXiv 2309.14509): swap sequence for heads around attention, and back."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from alst_jax.config import UserError


def ulysses_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], attend: Callable, axis: str
) -> Float[Array, "B T N H"]:
    """Attention over the whole sequence, from and to local chunks of it. Runs inside a shard_map over `axis`.

    q[B, S/seq, N, H] -> all-to-all -> q[B, S, N/seq, H] -> attend -> all-to-all -> o[B, S/seq, N, H].
    attend(q, k, v) is any causal attention over whole sequences. kv heads that do not divide over the axis are
    repeated just as often as needed, so that every device has the kv heads its query heads read.
    """
    degree = lax.axis_size(axis)
    if degree == 1:
        return attend(q, k, v)
    check_degree(degree, q.shape[2])
    repeats = degree // math.gcd(degree, k.shape[2])
    if repeats > 1:
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    q, k, v = (lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    return lax.all_to_all(attend(q, k, v), axis, split_axis=1, concat_axis=2, tiled=True)


def check_degree(degree: int, heads: int) -> None:
    """UserError, with the degrees that would work, unless `degree` divides the query heads."""
    if heads % degree:
        works = [str(d) for d in range(1, heads + 1) if heads % d == 0]
        choice = works[0] if len(works) == 1 else ", ".join(works[:-1]) + " or " + works[-1]
        raise UserError(f"sp={degree} must divide {heads} query heads; use {choice} (--sp)")
