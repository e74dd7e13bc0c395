"""SmolLM3: a Llama without rotary embedding in every fourth layer, which may have a sliding window instead."""

from typing import Any

from alst_jax.config import UserError
from alst_jax.models.config import LayerKind, ModelConfig
from alst_jax.models.families import layer_types, llama
from alst_jax.models.families.family import Family

FIELDS = frozenset(
    {
        "no_rope_layers",
        "no_rope_layer_interval",
        "use_sliding_window",
        "sliding_window",
        "layer_types",
        "max_window_layers",
    }
)  # the last is in published files, and nothing reads it
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True}


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    ropes, length = _ropes(raw, where), layer_types.switched_window(raw, where, None)
    default = [layer_types.FULL if rope or length is None else layer_types.SLIDING for rope in ropes]
    types = layer_types.layer_types(raw, where, default)
    kinds = layer_types.kinds(types, length, where) or (LayerKind(),) * len(ropes)
    kinds = tuple(LayerKind(rope, kind.window) for rope, kind in zip(ropes, kinds))
    return llama.options(raw, where) | {"layer_kinds": () if set(kinds) == {LayerKind()} else kinds}


def _ropes(raw: dict[str, Any], where: str) -> list[bool]:
    """For each layer, whether it turns queries and keys. `no_rope_layers` has a 1 for each layer that does."""
    given, layers, every = raw.get("no_rope_layers"), raw["num_hidden_layers"], raw.get("no_rope_layer_interval", 4)
    if given is None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UserError(f"{where}: no_rope_layer_interval={every!r} must be a whole number above 0")
        return [(i + 1) % every != 0 for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers or not all(rope in (0, 1) for rope in given):
        raise UserError(
            f"{where}: no_rope_layers={given!r} must be a list with 1 (rope) or 0 (none) for each of {layers} layers"
        )
    return [bool(rope) for rope in given[:layers]]


def fields(config: ModelConfig) -> dict[str, Any]:
    kinds = config.layer_kinds or (LayerKind(),) * config.num_layers
    windows = layer_types.window_fields(config)
    return (
        llama.fields(config)
        | windows
        | {
            "no_rope_layers": [int(kind.rope) for kind in kinds],
            "use_sliding_window": windows["sliding_window"] is not None,
        }
    )


FAMILY = Family(
    "smollm3", "SmolLM3ForCausalLM", FIELDS | frozenset(llama.BIASES), options, fields, llama.KEYS, DEFAULTS
)
