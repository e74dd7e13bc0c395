"""Gemma 3, text alone: scaled embeddings, norms by 1 + w on both sides of attention and MLP and of queries and keys, a
sliding window in most layers, a rotary embedding for each type of layer, gelu, and a soft cap of the logits.

transformers 5.24 reads `attn_logit_softcapping`, and applies it nowhere in Gemma 3. It is ignored here too.
"""

from typing import Any

from alst_jax.config import UserError
from alst_jax.models.config import ModelConfig
from alst_jax.models.families import layer_types, llama
from alst_jax.models.families.family import Family
from alst_jax.models.families.granite import number

FIELDS = frozenset(
    {
        "attention_bias",
        "layer_types",
        "sliding_window",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "query_pre_attn_scalar",
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "hidden_activation",
        "hidden_act",
        "rope_local_base_freq",
        "use_bidirectional_attention",
    }
)
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
GLOBAL, LOCAL = 1e6, 1e4  # bases of the rotary embeddings
GELU = "gelu_pytorch_tanh"


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    activation = raw.get("hidden_activation", GELU)
    if activation not in (GELU, "gelu_new"):
        raise UserError(f"{where}: not implemented: hidden_activation={activation!r} ({GELU} is)")
    if raw.get("use_bidirectional_attention"):
        raise UserError(f"{where}: not implemented: use_bidirectional_attention=True (attention is causal)")
    every = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise UserError(f"{where}: sliding_window_pattern={every!r} must be a whole number above 0")
    scalar = raw.get("query_pre_attn_scalar", 256)
    if isinstance(scalar, bool) or not isinstance(scalar, int) or scalar < 1:
        raise UserError(f"{where}: query_pre_attn_scalar={scalar!r} must be a whole number above 0")
    return {
        "layer_kinds": layer_types.kinds_by_type(raw, where, layer_types.every(every, raw)),
        "attention_bias": bool(raw.get("attention_bias", False)),
        "qk_norm": "head",
        "norms": "both",
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "embedding_multiplier": raw["hidden_size"] ** 0.5,
        "attention_scale": scalar**-0.5,
        "logits_soft_cap": number(raw, "final_logit_softcapping", None, where),
    }


def ropes(raw: dict[str, Any], where: str) -> list[tuple[Any, Any]]:
    bases = raw.get("rope_theta") or GLOBAL, raw.get("rope_local_base_freq") or LOCAL
    return layer_types.ropes(raw, where, bases)


def fields(config: ModelConfig) -> dict[str, Any]:
    return (
        layer_types.window_fields(config)
        | layer_types.rope_fields_by_type(config)
        | {
            "attention_bias": config.attention_bias,
            "hidden_activation": GELU,
            "query_pre_attn_scalar": round(config.attention_scale**-2),
            "final_logit_softcapping": config.logits_soft_cap,
        }
    )


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    FIELDS,
    options,
    fields,
    llama.LINEAR_KEYS | llama.norm_keys(*NORMS) | llama.QK_NORMS,
    DEFAULTS,
    ropes,
)
