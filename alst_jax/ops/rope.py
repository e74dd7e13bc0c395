"""Rotary position embedding, with the frequency scalings of Hugging Face's `modeling_rope_utils`."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MAX_POSITION = 2**24  # below this, angles are right to 0.003 radians for the frequencies, which are float32
STRIDE = 4096  # positions below this meet their frequency in one product, as in transformers
TURN = 6.28125  # nearly 2 pi, with 8 significant bits


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. Field names and meanings are as in Hugging Face's `rope_parameters`."""

    rope_type: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    max_position_embeddings: int | None = None  # of the model; dynamic
    partial_rotary_factor: float = 1.0  # the part of each head that is turned
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    attention_factor: float | None = None  # yarn, longrope
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] | None = None  # longrope
    long_factor: tuple[float, ...] | None = None  # longrope

    @property
    def needs_length(self) -> bool:
        """Whether the frequencies depend on the length of the batch's longest document."""
        return self.rope_type in ("dynamic", "longrope")


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, length: jax.Array | int | None = None
) -> tuple[np.ndarray | jax.Array, float]:
    """Frequencies float32[R/2] in radians a token, for the R dims of a head that are turned, and the factor that
    multiplies cos and sin (1 except for yarn and longrope).

    length: the highest position + 1, of all tokens of a batch; only dynamic and longrope read it.
    """
    head_dim = int(head_dim * rope.partial_rotary_factor)
    plain = _plain(rope, head_dim)
    if rope.rope_type == "default":
        return plain, 1.0
    if rope.rope_type == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, plain, head_dim), _yarn_attention_factor(rope)
    if rope.rope_type == "dynamic":
        return _dynamic(rope, head_dim, length), 1.0
    if rope.rope_type == "longrope":
        return _by_length(rope, _longrope(rope, head_dim), length), _longrope_attention_factor(rope)
    raise ValueError(f"rope_type {rope.rope_type!r}")


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth mixture between."""
    old_length, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    smooth = (old_length / wavelength - low) / (high - low)
    mixed = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = np.where(wavelength > old_length / low, plain / rope.factor, plain)
    medium = (wavelength >= old_length / high) & (wavelength <= old_length / low)
    return np.where(medium, mixed, scaled).astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071): interpolate dims that turn slowly, keep dims that turn fast, a linear ramp between."""

    def correction_dim(rotations: float) -> float:
        length = rope.original_max_position_embeddings
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast or 32.0), correction_dim(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in the source: a ramp of no width would divide by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (plain / rope.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _exponent(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _plain(rope: RopeConfig, head_dim: int) -> np.ndarray:
    return (1.0 / np.float32(rope.theta) ** _exponent(head_dim)).astype(np.float32)


def _dynamic(rope: RopeConfig, head_dim: int, length: jax.Array | int) -> jax.Array:
    """NTK-aware scaling by the length: past the model's own, theta grows with it."""
    length = jnp.maximum(length, rope.max_position_embeddings).astype(jnp.float32)
    growth = rope.factor * length / rope.max_position_embeddings - (rope.factor - 1)
    return 1.0 / (rope.theta * growth ** (head_dim / (head_dim - 2))) ** _exponent(head_dim)


def _longrope(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The frequencies of short and of long sequences."""
    return tuple(_plain(rope, head_dim) / np.float32(factors) for factors in (rope.short_factor, rope.long_factor))


def _by_length(rope: RopeConfig, short_and_long: tuple, length: jax.Array | int) -> jax.Array:
    short, long = short_and_long
    return jnp.where(length > rope.original_max_position_embeddings, long, short)


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"], length: jax.Array | None = None
) -> tuple[Float[Array, "B T 1 H2"], Float[Array, "B T 1 H2"]]:
    """cos and sin, float32, for the positions of the local tokens (counted from the start of their document).

    length: the highest position of the whole batch + 1; None: of these tokens.
    """
    if length is None and rope.needs_length:
        length = jnp.max(positions) + 1
    frequencies, factor = inverse_frequencies(rope, head_dim, length)
    if rope.rope_type == "longrope":  # two sets of frequencies; the length chooses one
        turned = int(head_dim * rope.partial_rotary_factor)
        coarse = _by_length(rope, tuple(map(_coarse, _longrope(rope, turned))), length)
    else:
        coarse = (_coarse_of_traced if rope.rope_type == "dynamic" else _coarse)(frequencies)
    cos, sin = _cos_sin(positions[:, :, None, None], frequencies, coarse)
    return cos * factor, sin * factor


def _coarse(frequencies: np.ndarray) -> np.ndarray:
    """The angles, modulo a whole turn, of STRIDE positions."""
    return np.remainder(STRIDE * frequencies.astype(np.float64), 2 * math.pi).astype(np.float32)


def _coarse_of_traced(frequencies: jax.Array) -> jax.Array:
    """`_coarse` in float32, of frequencies up to 1. Whole turns are taken away in two parts (Cody and Waite).

    STRIDE is a power of two and TURN has few bits, so that all products but the last are exact.
    """
    angles = STRIDE * frequencies
    turns = jnp.round(angles / (2 * math.pi))
    return (angles - turns * TURN) - turns * (2 * math.pi - TURN)


def _cos_sin(positions, frequencies, coarse):
    """cos and sin of position x frequency. A product in float32 is off by whole radians at millions of tokens, so its
    multiples of STRIDE positions are turned apart, by `coarse`."""
    angle = lambda whole, by: whole.astype(jnp.float32) * jnp.asarray(by)[None, None, None, :]
    fine, far = angle(positions % STRIDE, frequencies), angle(positions // STRIDE, coarse)
    cos, sin, far_cos, far_sin = jnp.cos(fine), jnp.sin(fine), jnp.cos(far), jnp.sin(far)
    return cos * far_cos - sin * far_sin, sin * far_cos + cos * far_sin


def apply_rope(
    x: Float[Array, "*B N H"], cos: Float[Array, "*B 1 H2"], sin: Float[Array, "*B 1 H2"]
) -> Float[Array, "*B N H"]:
    """Turn the pairs (x[i], x[i + H/2]) by the angles, in float32; returned in the dtype of x.

    Where the tables are narrower than H/2, the first dims of a head are turned, and the others stay.
    """
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return jnp.concatenate([apply_rope(x[..., :turned], cos, sin), x[..., turned:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
