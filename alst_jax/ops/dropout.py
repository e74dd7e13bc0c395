"""Dropout whose masks do not depend on how a step is computed.

Each token has a key, made of the run's seed, the step and the token's number in the step. An element's bits are the
Threefry hash of its token's key, the layer, the module and the feature's number: a tile, a shard, a head chunk or a
recomputed layer draws the same bits.

B leading dims, D features.
"""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float, UInt32

STEPS = 2**16  # each element has 16 random bits: rates are rounded to 1 / STEPS


def token_keys(seed: int, step: UInt32[Array, ""], numbers: UInt32[Array, "*B"]) -> UInt32[Array, "*B 2"]:
    """A key for each token. numbers: of the tokens in the optimizer step, below 2**32."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    fold = lambda number: jax.random.key_data(jax.random.fold_in(key, number))
    return jax.vmap(fold)(numbers.reshape(-1)).reshape(*numbers.shape, 2)


def fold_in(keys: UInt32[Array, "*B 2"], number: Array | int) -> UInt32[Array, "*B 2"]:
    """The tokens' keys for a layer or a module of this number."""
    fold = lambda key: threefry_2x32(key, jnp.stack([jnp.uint32(0), jnp.asarray(number, jnp.uint32)]))
    return jax.vmap(fold)(keys.reshape(-1, 2)).reshape(keys.shape)


def kept(keys: UInt32[Array, "*B 2"], features: int, rate: float) -> Bool[Array, "*B D"]:
    """Whether dropout keeps an element, for each feature of the tokens."""
    words = jnp.arange(-(-features // 2), dtype=jnp.uint32)  # each makes the bits of two features
    drawn = jax.vmap(lambda key: threefry_2x32(key, words))(keys.reshape(-1, 2))
    bits = jax.lax.bitcast_convert_type(drawn, jnp.uint16).reshape(*keys.shape[:-1], -1)[..., :features]
    return bits >= dropped_of_steps(rate)


def dropout(x: Float[Array, "*B D"], keys: UInt32[Array, "*B 2"], rate: float) -> Float[Array, "*B D"]:
    """x with a part `rate` of its elements set to zero, the others divided by 1 - rate."""
    scale = STEPS / (STEPS - dropped_of_steps(rate))  # of the rounded rate: the mean over masks is x
    scaled = (x.astype(jnp.float32) * scale).astype(x.dtype)  # in bfloat16 the scale alone would be rounded
    return jnp.where(kept(keys, x.shape[-1], rate), scaled, jnp.zeros((), x.dtype))


def dropped_of_steps(rate: float) -> int:
    """Of STEPS equally likely values of an element's bits, the number that drop it."""
    return min(round(rate * STEPS), STEPS - 1)
