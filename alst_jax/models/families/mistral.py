"""Mistral: a Llama with a sliding window in all layers, or without one."""

from typing import Any

from alst_jax.config import UserError
from alst_jax.models.config import ModelConfig
from alst_jax.models.families import layer_types, llama
from alst_jax.models.families.family import Family

DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8}


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    length, layers = layer_types.window(raw, where, 4096), raw["num_hidden_layers"]
    types = [layer_types.FULL if length is None else layer_types.SLIDING] * layers
    if raw.get("layer_types") not in (None, types):
        raise UserError(
            f"{where}: layer_types={raw['layer_types']!r} contradicts sliding_window={length!r}, which "
            "alone says what transformers' Mistral does; remove layer_types"
        )
    return {"layer_kinds": layer_types.kinds(types, length, where)}


def fields(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": layer_types.window_fields(config)["sliding_window"]}


FAMILY = Family(
    "mistral", "MistralForCausalLM", frozenset({"sliding_window", "layer_types"}), options, fields, llama.KEYS, DEFAULTS
)
