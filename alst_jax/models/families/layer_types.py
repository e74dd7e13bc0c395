"""Fields of config.json that say which layers have a sliding window: `layer_types`, `sliding_window` and their like."""

from typing import Any

from alst_jax.config import UserError
from alst_jax.models.config import LayerKind, ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
FIRST_WINDOW_LAYER = 28  # default of max_window_layers
FIELDS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def layer_types(raw: dict[str, Any], where: str, default: list[str]) -> list[str]:
    """For each layer, whether its attention is full or sliding. default: where config.json has no `layer_types`."""
    types, layers = raw.get("layer_types"), raw["num_hidden_layers"]
    if types is None:
        return default
    if not isinstance(types, list) or len(types) != layers:
        raise UserError(f"{where}: layer_types={types!r} must be a list with one type for each of {layers} layers")
    others = sorted({str(kind) for kind in types} - {FULL, SLIDING})
    if others:
        raise UserError(f"{where}: not implemented: layer_types with {', '.join(others)} ({FULL} and {SLIDING} are)")
    return types


def window(raw: dict[str, Any], where: str, default: int | None) -> int | None:
    """`sliding_window`: how many tokens a query reads, itself included."""
    value = raw.get("sliding_window", default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"{where}: sliding_window={value!r} must be a whole number above 0")
    return value


def kinds(types: list[str], window: int | None, where: str) -> tuple[LayerKind, ...]:
    """A kind for each layer; none if no layer has a window."""
    if SLIDING not in types:
        return ()
    if window is None:
        raise UserError(f"{where}: layer_types has {SLIDING}, but sliding_window is null; give its length")
    return tuple(LayerKind(window=window if kind == SLIDING else None) for kind in types)


def switched_windows(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """ModelConfig's `layer_kinds` of the Qwens: `use_sliding_window` switches the windows on, from a layer on."""
    used = raw.get("use_sliding_window")
    if not isinstance(used, bool | None):
        raise UserError(f"{where}: use_sliding_window={used!r} must be true or false")
    length = window(raw, where, 4096) if used else None
    first = raw.get("max_window_layers", FIRST_WINDOW_LAYER)
    if length is not None and (isinstance(first, bool) or not isinstance(first, int)):
        raise UserError(f"{where}: max_window_layers={first!r} must be a whole number")
    late = lambda i: length is not None and i >= first
    default = [SLIDING if late(i) else FULL for i in range(raw["num_hidden_layers"])]
    return {"layer_kinds": kinds(layer_types(raw, where, default), length, where)}


def switched_window_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields that `switched_windows` reads."""
    if not config.layer_kinds:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True} | window_fields(config)


def window_fields(config: ModelConfig) -> dict[str, Any]:
    """`layer_types` and `sliding_window`."""
    windows = [kind.window for kind in config.layer_kinds] or [None] * config.num_layers
    return {"layer_types": [FULL if window is None else SLIDING for window in windows],
            "sliding_window": next((window for window in windows if window is not None), None)}
