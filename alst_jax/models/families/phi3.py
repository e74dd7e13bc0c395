"""Phi-3 and Phi-4: a Llama whose files hold projections fused. A part of each head is turned, in long-context models by
two lists of factors (longrope)."""

from typing import Any

from alst_jax.config import UserError
from alst_jax.models.config import ModelConfig
from alst_jax.models.families import layer_types, llama
from alst_jax.models.families.family import Family
from alst_jax.models.hf_rope import ORIGINAL

# The last two are in published files, and transformers reads neither.
FIELDS = frozenset({"sliding_window", "partial_rotary_factor", ORIGINAL, "full_attn_mod", "interpolate_factor"})
LAYER = "model.layers.{}."
FUSED = {
    f"{LAYER}self_attn.qkv_proj.weight": tuple(f"{LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
    f"{LAYER}mlp.gate_up_proj.weight": tuple(f"{LAYER}mlp.{x}_proj.weight" for x in ("gate", "up")),
}
DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    length = layer_types.window(raw, where, None)
    types = [layer_types.FULL if length is None else layer_types.SLIDING] * raw["num_hidden_layers"]
    return {"layer_kinds": layer_types.kinds(types, length, where)}


def ropes(raw: dict[str, Any], where: str) -> list[tuple[Any, Any]]:
    """The settings, with the fields that stand beside them in config.json."""
    given, theta = raw.get("rope_scaling") or raw.get("rope_parameters") or {}, raw.get("rope_theta") or 1e4
    if not isinstance(given, dict):
        return [(given, theta)]
    renamed = lambda name, x: "longrope" if name in ("type", "rope_type") and x in ("su", "yarn") else x
    given = {name: renamed(name, x) for name, x in given.items()}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "longrope"):
        raise UserError(f"{where}: RoPE type {kind!r}: transformers' Phi-3 has default and longrope")
    if kind == "longrope":  # the outer field counts, whatever the settings say
        given[ORIGINAL] = raw.get(ORIGINAL) or 4096
    given.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor"))
    return [(given, theta)]


def fields(config: ModelConfig) -> dict[str, Any]:
    original = config.rope.original_max_position_embeddings
    return {"sliding_window": layer_types.window_fields(config)["sliding_window"]} | (
        {} if original is None else {ORIGINAL: original}
    )


FAMILY = Family(
    "phi3", "Phi3ForCausalLM", FIELDS, options, fields, llama.KEYS, DEFAULTS, ropes, FUSED, partial_rope=True
)
