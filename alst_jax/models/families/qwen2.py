"""Qwen2 and Qwen2.5: a Llama with biases on the query, key and value projections. Windows if they are switched on."""

from typing import Any

from alst_jax.models.families import layer_types, llama
from alst_jax.models.families.family import Family

DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    return {"qkv_bias": True} | layer_types.switched_windows(raw, where)


FAMILY = Family(
    "qwen2", "Qwen2ForCausalLM", layer_types.FIELDS, options, layer_types.switched_window_fields, llama.KEYS, DEFAULTS
)
