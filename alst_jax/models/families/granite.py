"""Granite: a Llama with four scalars: of embeddings, attention scores, residual additions and logits."""

from typing import Any

from alst_jax.config import UserError
from alst_jax.models.config import ModelConfig
from alst_jax.models.families import llama
from alst_jax.models.families.family import Family

SCALARS = {
    "embedding_multiplier": "embedding_multiplier",
    "attention_scale": "attention_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logits_divisor": "logits_scaling",
}  # here, in config.json


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    return llama.options(raw, where) | {ours: number(raw, theirs, 1.0, where) for ours, theirs in SCALARS.items()}


def number(raw: dict[str, Any], name: str, default: float | None, where: str) -> float | None:
    """A field above 0. UserError for another value; `default` without one."""
    value = default if raw.get(name) is None else raw[name]
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30):
        raise UserError(f"{where}: {name}={value!r} must be a number above 0")
    return None if value is None else float(value)


def fields(config: ModelConfig) -> dict[str, Any]:
    return llama.fields(config) | {theirs: getattr(config, ours) for ours, theirs in SCALARS.items()}


FAMILY = Family(
    "granite", "GraniteForCausalLM", frozenset(llama.BIASES) | frozenset(SCALARS.values()), options, fields, llama.KEYS
)
