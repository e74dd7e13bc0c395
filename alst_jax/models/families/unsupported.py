"""Which family a config.json is of, and refusals of others that say why and which supported family is closest."""

import re
from typing import Any

from alst_jax.config import UserError
from alst_jax.models.families.family import Family

# model_type -> the supported family whose blocks are most alike, or None, and the difference.
CLOSEST = {
    "ministral": ("mistral", "windows in some of its layers"),
    "ministral3": ("mistral", "queries scaled by position"),
    "phi": ("llama", "parallel attention and MLP"),
    "gemma": ("gemma3_text", "one norm less for attention and MLP each"),
    "gemma2": ("gemma3_text", "soft caps of attention scores and no norms of queries and keys"),
    "glm4": ("gemma3_text", "a partial rotary embedding and fused projections"),
    "glm": ("llama", "a partial rotary embedding and fused projections"),
    "olmo": ("llama", "norms without weights"),
    "cohere": ("llama", "parallel attention and MLP"),
    "cohere2": ("llama", "parallel attention and MLP"),
    "starcoder2": ("mistral", "layer norms and an MLP without a gate"),
    "stablelm": ("llama", "layer norms and a partial rotary embedding"),
    "exaone4": ("olmo3", "other norms"),
    "gpt2": ("llama", "learned positions, layer norms and an MLP without a gate"),
    "gpt_neox": ("llama", "layer norms and parallel attention and MLP"),
    "qwen": ("qwen2", "remote code"),
    "nemotron": ("llama", "layer norms and squared ReLU"),
    "internlm2": ("llama", "fused projections"),
    "qwen3_moe": ("qwen3", "routed experts"),
    "qwen2_moe": ("qwen2", "routed experts"),
    "mixtral": ("mistral", "routed experts"),
    "gpt_oss": ("qwen3", "routed experts and attention sinks"),
    "granitemoe": ("granite", "routed experts"),
    "olmoe": ("olmo2", "routed experts"),
    "deepseek_v2": ("llama", "routed experts and latent attention"),
    "llama4": ("llama", "routed experts"),
    "llama4_text": ("llama", "routed experts"),
    "deepseek_v3": ("llama", "routed experts and latent attention"),
    "glm4_moe": ("qwen3", "routed experts"),
    "qwen3_next": ("qwen3", "linear attention and routed experts"),
    "qwen3_5": ("qwen3", "linear attention"),
    "mamba": (None, "a state space"),
    "mamba2": (None, "a state space"),
    "jamba": (None, "a state space and routed experts"),
    "falcon_mamba": (None, "a state space"),
    "t5": (None, "an encoder"),
    "bert": (None, "an encoder"),
}
EXPERTS = re.compile(
    r"(num|n)_(local_|routed_|shared_)?experts(_per_tok)?|moe_.*|.*_moe_.*|router_.*|decoder_sparse_step"
)
LINEAR = re.compile(r"linear_.*|ssm_.*|mamba_.*|conv_kernel_size")


def find_family(raw: dict[str, Any], families: dict[str, Family], where: str) -> Family:
    """The family of a config.json. UserError for an unsupported family, and for quantised weights."""
    kind = raw.get("model_type")
    family = families.get(kind) if isinstance(kind, str) else None
    architectures = raw.get("architectures") or [family.architecture if family else None]
    if family is None or not isinstance(architectures, list) or family.architecture not in architectures:
        raise UserError(
            f"{where}: model_type {kind!r}, architectures {architectures} is not supported"
            f"{_why(raw, families)}; these models are: {supported(families)}"
        )
    if reason := _of_experts_or_linear(raw):
        raise UserError(f"{where}: not implemented: {reason}")
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise UserError(f"{where}: quantization_config is set; training needs unquantised weights (bf16, f16 or f32)")
    return family


def supported(families: dict[str, Family]) -> str:
    return ", ".join(f"{each.architecture} (model_type {each.model_type!r})" for each in families.values())


def _why(raw: dict[str, Any], families: dict[str, Family]) -> str:
    """Facts about an unsupported family: its differences, the closest family."""
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in families:
        return f" (of {kind}, {families[kind].architecture} is)"
    if isinstance(kind, str) and kind in CLOSEST:
        closest, difference = CLOSEST[kind]
        return f": it has {difference}" + (f"; the closest supported family is {closest}" if closest else "")
    if reason := _of_experts_or_linear(raw):
        return f": {reason}"
    if raw.get("auto_map"):
        return ": its code comes with the checkpoint (auto_map), and is never executed"
    close = [
        name
        for name in families
        if isinstance(kind, str) and kind.rstrip("0123456789_.").startswith(name.split("_")[0].rstrip("0123456789"))
    ]
    return f"; the closest supported family is {close[-1]}" if close else ""


def _of_experts_or_linear(raw: dict[str, Any]) -> str | None:
    """The fields of routed experts or of linear attention that are set, or None."""
    for what, pattern in (("routed experts", EXPERTS), ("linear attention", LINEAR)):
        fields = [f"{name}={value!r}" for name, value in raw.items() if pattern.fullmatch(name) and value]
        if fields:
            return f"{what} ({', '.join(fields)})"
    types = raw.get("layer_types")
    if isinstance(types, list) and "linear_attention" in types:
        return "linear attention (in layer_types)"
    return None
