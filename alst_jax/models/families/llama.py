"""Llama. Biases are options: of all four attention projections, and of the MLP."""

from typing import Any

from alst_jax.models.config import ModelConfig
from alst_jax.models.families.family import Family

BIASES = ("attention_bias", "mlp_bias")
LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
LEAVES = (("kernel", "weight"), ("bias", "bias"))  # here, in Hugging Face
NORMS = ("input_layernorm", "post_attention_layernorm")


def norm_keys(*names: str) -> dict[tuple[str, ...], str]:
    """Keys of a block's norms."""
    return {(*name.split("."), "scale"): f"model.layers.{{}}.{name}.weight" for name in names}


QK_NORMS = norm_keys("self_attn.q_norm", "self_attn.k_norm")  # of other families
LINEAR_KEYS = {
    (part, linear, ours): f"model.layers.{{}}.{part}.{linear}.{theirs}"
    for part, linears in LINEARS.items()
    for linear in linears
    for ours, theirs in LEAVES
}
KEYS = norm_keys(*NORMS) | LINEAR_KEYS


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    return {name: bool(raw.get(name, False)) for name in BIASES}


def fields(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in BIASES}


FAMILY = Family("llama", "LlamaForCausalLM", frozenset(BIASES), options, fields, KEYS)
