"""Qwen3: queries and keys of each head are normed before they are turned. Windows if they are switched on."""

from typing import Any

from alst_jax.models.config import ModelConfig
from alst_jax.models.families import layer_types, llama
from alst_jax.models.families.family import Family

DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    return {"qk_norm": "head", "attention_bias": bool(raw.get("attention_bias", False))} | layer_types.switched_windows(
        raw, where
    )


def fields(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias} | layer_types.switched_window_fields(config)


FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    layer_types.FIELDS | {"attention_bias"},
    options,
    fields,
    llama.KEYS | llama.QK_NORMS,
    DEFAULTS,
)
