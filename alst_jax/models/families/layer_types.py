"""Fields of config.json that say which layers have a sliding window: `layer_types`, `sliding_window` and similar."""

import dataclasses
from typing import Any

from alst_jax.config import UserError
from alst_jax.models.config import LayerKind, ModelConfig
from alst_jax.models.hf_rope import check_base, rope_fields

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


def switched_window(raw: dict[str, Any], where: str, default: int | None) -> int | None:
    """`sliding_window` if `use_sliding_window` is true."""
    used = raw.get("use_sliding_window")
    if not isinstance(used, bool | None):
        raise UserError(f"{where}: use_sliding_window={used!r} must be true or false")
    return window(raw, where, default) if used else None


def kinds(types: list[str], window: int | None, where: str) -> tuple[LayerKind, ...]:
    """A kind for each layer; none if no layer has a window."""
    if SLIDING not in types:
        return ()
    if window is None:
        raise UserError(
            f"{where}: layer_types has {SLIDING}, but sliding_window is null or use_sliding_window false; "
            "the two contradict each other"
        )
    return tuple(LayerKind(window=window if kind == SLIDING else None) for kind in types)


def switched_windows(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """ModelConfig's `layer_kinds` of the Qwens: `use_sliding_window` switches the windows on, from a layer on."""
    length = switched_window(raw, where, 4096)
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
    return {
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
    }


# ---------------------------------------------------------------------- families with a rotary embedding for each type


def every(n: int, raw: dict[str, Any]) -> list[str]:
    """Layer types where every n-th layer is full."""
    return [SLIDING if (i + 1) % n else FULL for i in range(raw["num_hidden_layers"])]


def kinds_by_type(raw: dict[str, Any], where: str, default: list[str]) -> tuple[LayerKind, ...]:
    """Kinds of layers with a window of 4,096 tokens if no length is given; `ropes` has their rotary embeddings."""
    types = layer_types(raw, where, default)
    return tuple(
        dataclasses.replace(kind, table=int(kind.window is not None))
        for kind in kinds(types, window(raw, where, 4096), where)
    )


def ropes(raw: dict[str, Any], where: str, bases: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    """(settings, base) of full attention (`rope_scaling` is its alone), then of sliding attention."""
    nested, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for name, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name}={value!r} must be a JSON object")
    if not set(nested) <= {FULL, SLIDING}:
        raise UserError(f"{where}: rope_parameters={nested!r} must have {FULL} and {SLIDING}, each with its settings")
    full, sliding = (nested.get(kind) or {} for kind in (FULL, SLIDING))
    check_base(raw.get("rope_theta"), full, where)
    return [(full | scaling if isinstance(full, dict) else full, bases[0]), (sliding, bases[1])]


def rope_fields_by_type(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters`."""
    table = {kind.window is None: kind.table for kind in config.kinds}
    settings = lambda full: rope_fields(config.ropes[table.get(full, 0)])
    return {"rope_parameters": {FULL: settings(True), SLIDING: settings(False)}}
