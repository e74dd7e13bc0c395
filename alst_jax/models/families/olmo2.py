"""OLMo 2: norms after attention and MLP instead of before, and norms of queries and keys over all heads."""

from typing import Any

from alst_jax.models.config import ModelConfig
from alst_jax.models.families import llama
from alst_jax.models.families.family import Family

NORMS = llama.norm_keys("post_attention_layernorm", "post_feedforward_layernorm") | llama.QK_NORMS
KEYS = llama.LINEAR_KEYS | NORMS


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    return {"norms": "after", "qk_norm": "all heads", "attention_bias": bool(raw.get("attention_bias", False))}


def fields(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias}


FAMILY = Family(
    "olmo2", "Olmo2ForCausalLM", frozenset({"attention_bias"}), options, fields, KEYS, {"rms_norm_eps": 1e-5}
)
