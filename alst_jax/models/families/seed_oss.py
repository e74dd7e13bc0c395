"""Seed-OSS: a Llama with biases of the query, key and value projections, and a switch for the output's bias."""

from typing import Any

from alst_jax.models.config import ModelConfig
from alst_jax.models.families import llama
from alst_jax.models.families.family import Family

NAMES = {"qkv_bias": "attention_bias", "o_bias": "attention_out_bias", "mlp_bias": "mlp_bias"}  # here, in config.json
DEFAULTS = {"max_position_embeddings": 524288, "head_dim": 128, "num_key_value_heads": 8}


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    return {ours: bool(raw.get(theirs, ours == "qkv_bias")) for ours, theirs in NAMES.items()}


def fields(config: ModelConfig) -> dict[str, Any]:
    # transformers' own defaults are dropouts of 0.1.
    dropouts = {"attention_dropout": 0.0, "residual_dropout": 0.0}
    return {theirs: getattr(config, ours) for ours, theirs in NAMES.items()} | dropouts


FAMILY = Family("seed_oss", "SeedOssForCausalLM", frozenset(NAMES.values()), options, fields, llama.KEYS, DEFAULTS)
