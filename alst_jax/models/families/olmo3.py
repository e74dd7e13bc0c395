"""OLMo 3: an OLMo 2 with a sliding window in three of four layers, and a rotary embedding for each type of layer."""

from typing import Any

from alst_jax.models.config import ModelConfig
from alst_jax.models.families import layer_types, olmo2
from alst_jax.models.families.family import Family

BASE = 500000.0


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    kinds = layer_types.kinds_by_type(raw, where, layer_types.every(4, raw))
    return olmo2.options(raw, where) | {"layer_kinds": kinds}


def ropes(raw: dict[str, Any], where: str) -> list[tuple[Any, Any]]:
    # transformers takes `rope_theta` for full attention alone, without `rope_parameters`.
    return layer_types.ropes(raw, where, (raw.get("rope_theta") or BASE, BASE))


def fields(config: ModelConfig) -> dict[str, Any]:
    return olmo2.fields(config) | layer_types.window_fields(config) | layer_types.rope_fields_by_type(config)


FAMILY = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    frozenset({"attention_bias", "sliding_window", "layer_types"}),
    options,
    fields,
    olmo2.KEYS,
    {"rms_norm_eps": 1e-5},
    ropes,
)
