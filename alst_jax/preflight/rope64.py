"""Rotary embedding in float64 numpy, from its definitions, for the checks. Shares no code with ops/rope.py."""

import numpy as np

from alst_jax.ops.rope import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Radians a token, float64[R/2], R the dims of a head that turn. length: the highest position + 1."""
    head_dim = int(head_dim * rope.partial_rotary_factor)
    power = np.arange(head_dim // 2, dtype=np.float64) * 2 / head_dim
    base = np.float64(rope.theta) ** -power
    match rope.rope_type:
        case "default":
            return base
        case "linear":
            return base / rope.factor
        case "llama3":
            return _llama3(rope, base)
        case "yarn":
            return _yarn(rope, base, head_dim)
        case "dynamic":
            known = rope.max_position_embeddings
            growth = rope.factor * max(length, known) / known - (rope.factor - 1)
            return (rope.theta * growth ** (head_dim / (head_dim - 2))) ** -power
        case "longrope":
            long = length > rope.original_max_position_embeddings
            return base / np.asarray(rope.long_factor if long else rope.short_factor, np.float64)


def _llama3(rope, base):
    turns = rope.original_max_position_embeddings * base / (2 * np.pi)  # in the old length
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return base * kept + base / rope.factor * (1 - kept)


def _yarn(rope, base, head_dim):
    def dim(turns):
        return head_dim / 2 * np.log(rope.original_max_position_embeddings / (2 * np.pi * turns)) / np.log(rope.theta)

    low, high = dim(rope.beta_fast or 32), dim(rope.beta_slow or 1)
    if rope.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    slow = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    return base * (1 - slow) + base / rope.factor * slow


def factor(rope: RopeConfig) -> float:
    """The factor of cos and sin."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    if rope.rope_type == "longrope":
        return float(np.sqrt(1 + np.log(rope.factor) / np.log(rope.original_max_position_embeddings)))
    grow = lambda weight: 0.1 * weight * np.log(rope.factor) + 1
    if rope.mscale and rope.mscale_all_dim:
        return float(grow(rope.mscale) / grow(rope.mscale_all_dim))
    return float(grow(1.0))


def cos_sin(rope: RopeConfig, angles_a_token: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64[P, H/2] each, of positions[P]."""
    angles = positions.astype(np.float64)[:, None] * angles_a_token.astype(np.float64)[None]
    return np.cos(angles) * factor(rope), np.sin(angles) * factor(rope)
