"""How optimizer state is stored: float32, bfloat16, or 8 bits with a scale a block; and how float32 becomes bfloat16.

Narrow formats are rounded stochastically: to one of the two neighbours, with the probabilities that make the mean
exact. Rounding to the nearest would lose the addition of one step to an exponential average with beta2 = 0.999.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

BLOCKS = (256, 128, 64, 32)  # values that share a scale: the largest of these that divides the last dim
WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1, "low-bits": 2, "none": 0}  # bytes of a moment's or master's element


@dataclasses.dataclass(frozen=True)
class Plain:
    """An array of another dtype: float32 unchanged, bfloat16 rounded stochastically."""

    dtype: str

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return jnp.zeros(shape, self.dtype)

    def encode(self, x: Array, key: Array) -> Array:
        return round_to_bfloat16(x, key) if self.dtype == "bfloat16" else x.astype(self.dtype)

    def decode(self, stored: Array, dtype: DTypeLike) -> Array:
        return stored.astype(dtype)

    def specs(self, spec: Any) -> Any:
        return spec


@dataclasses.dataclass(frozen=True)
class Log8:
    """8 bits a value, logarithmic, relative to the largest of its block along the last dim.

    Code 0 is 0; code c is scale * 2^((c - top) / steps). Signed: 127 magnitudes 12% apart over 21 octaves; unsigned:
    255, 9% apart over 32 octaves. So a small value beside a large one keeps its relative precision, which AdamW's
    quotient of two such averages needs.
    """

    signed: bool
    block: int

    @property
    def _top_and_steps(self) -> tuple[int, int]:
        return (127, 6) if self.signed else (255, 8)

    def zeros(self, shape: tuple[int, ...]) -> dict[str, Array]:
        """Encoded zeros; a compiler would spend a minute on `encode`."""
        scale = jnp.zeros((*shape[:-1], shape[-1] // self.block), jnp.float32)
        return {"code": jnp.zeros(shape, jnp.int8 if self.signed else jnp.uint8), "scale": scale}

    def encode(self, x: Float[Array, "*B D"], key: Array) -> dict[str, Array]:
        top, steps = self._top_and_steps
        blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, self.block)
        scale = jnp.max(jnp.abs(blocks), axis=-1)
        ratio = jnp.abs(blocks) / jnp.where(scale > 0, scale, 1)[..., None]
        below = jnp.clip(jnp.floor(jnp.log2(jnp.maximum(ratio, 1e-30)) * steps) + top, 0, top - 1)
        low, high = self._magnitude(below), self._magnitude(below + 1)
        chance = (ratio - low) / (high - low)
        draw = jax.random.bits(key, blocks.shape, jnp.uint16).astype(jnp.float32) * 2.0**-16
        code = below + (draw < chance)
        code = (jnp.sign(blocks) * code).astype(jnp.int8) if self.signed else code.astype(jnp.uint8)
        return {"code": code.reshape(x.shape), "scale": scale}

    def decode(self, stored: dict[str, Array], dtype: DTypeLike) -> Array:
        code = stored["code"].reshape(*stored["scale"].shape, self.block).astype(jnp.float32)
        values = jnp.sign(code) * self._magnitude(jnp.abs(code)) * stored["scale"][..., None]
        return values.reshape(stored["code"].shape).astype(dtype)

    def _magnitude(self, code):
        top, steps = self._top_and_steps
        return jnp.where(code > 0, jnp.exp2((code - top) / steps), 0.0)

    def specs(self, spec: Any) -> Any:
        return {"code": spec, "scale": spec}  # the last dim is not sharded, see `block_of`


def moment_bytes(states: str) -> float:
    """Bytes of an element of a moment, with its part of a float32 scale."""
    return WIDTHS[states] + 4 / BLOCKS[0] * (states == "int8")


def block_of(shape: tuple[int, ...], sharded_dim: int | None) -> int | None:
    """Values a scale for an array of this shape, or None if it is stored plain: a vector, or no even blocks."""
    if len(shape) < 2 or sharded_dim == len(shape) - 1:
        return None
    return next((size for size in BLOCKS if shape[-1] % size == 0), None)


def round_to_bfloat16(x: Array, key: Array) -> Array:
    """float32 -> bfloat16, up or down by chance, so that the mean is x."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def split_float32(x: Array) -> tuple[Array, Array]:
    """float32 -> (bfloat16, the low 16 bits of x as uint16); `join_float32` gives x back, bit for bit."""
    # Not with `bits & 0xFFFF`: inside a larger kernel jax 0.11.2 makes 1 of that on a GPU whenever it is not 0
    # (measured).
    low, high = _halves(x)
    high = high + (low >> 15)  # to the nearest: one more than the high bits of x where the low ones are above half
    return jax.lax.bitcast_convert_type(high, jnp.bfloat16), low


def join_float32(high: Array, low: Array) -> Array:
    """The float32 that `split_float32` split."""
    high = jax.lax.bitcast_convert_type(high, jnp.uint16) - (low >> 15)
    return jax.lax.bitcast_convert_type(jnp.stack([low, high], axis=-1), jnp.float32)


def _halves(x):
    halves = jax.lax.bitcast_convert_type(x, jnp.uint16)  # [..., 2], the low half first
    return halves[..., 0], halves[..., 1]
