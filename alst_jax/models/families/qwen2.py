"""Qwen2 and Qwen2.5: a Llama with biases on the query, key and value projections. Sliding windows are refused."""

from typing import Any

from alst_jax.config import UserError
from alst_jax.models.config import ModelConfig
from alst_jax.models.families import llama
from alst_jax.models.families.family import Family

WINDOW_FIELDS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
FIRST_WINDOW_LAYER = 28  # default of max_window_layers
FULL = "full_attention"


def options(raw: dict[str, Any], where: str) -> dict[str, Any]:
    kinds = raw.get("layer_types")
    if kinds is not None:
        others = sorted({str(kind) for kind in kinds} - {FULL}) if isinstance(kinds, list) else [repr(kinds)]
        if others:
            raise UserError(f"{where}: not implemented: layer_types with {', '.join(others)} ({FULL} is)")
    elif raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None:
        first = raw.get("max_window_layers", FIRST_WINDOW_LAYER)
        if not isinstance(first, int) or first < raw["num_hidden_layers"]:
            raise UserError(f"{where}: not implemented: use_sliding_window=True, with which layers from "
                            f"max_window_layers={first!r} on attend to a window only; set it to false only if the "
                            "model was trained without windows")
    return {"qkv_bias": True}


def fields(config: ModelConfig) -> dict[str, Any]:
    return {"use_sliding_window": False}


FAMILY = Family("qwen2", "Qwen2ForCausalLM", WINDOW_FIELDS, options, fields, llama.KEYS, DEFAULTS)
