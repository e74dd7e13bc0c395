"""RoPE settings of config.json <-> RopeConfig."""

import math
from typing import Any

from alst_jax.config import UserError
from alst_jax.ops.rope import RopeConfig

ORIGINAL = "original_max_position_embeddings"
FIELDS = {  # of rope_parameters, by type: (required fields, optional fields)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
    "yarn": (
        ("factor",),
        (ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor"), (ORIGINAL, "factor", "attention_factor")),
}
IGNORED = {"yarn": ("finetuned",)}  # a note of its authors: transformers does not read it
LISTS = ("short_factor", "long_factor")
TYPES = {ORIGINAL: int, "truncate": bool}  # the others are float


def read_rope(
    given: Any, theta: Any, head_dim: int, max_positions: int, where: str, partial_rope: bool = False
) -> RopeConfig:
    """The settings of one rotary embedding.

    given: `rope_parameters` (transformers 5) or `rope_scaling` (before). theta: the base if `given` has none.
    partial_rope: `partial_rotary_factor` is implemented.
    UserError, which begins with `where`, for a setting that is wrong or not implemented.
    """
    if not isinstance(given, dict):
        raise UserError(f"{where}: RoPE settings {given!r} must be a JSON object with rope_type and its fields")
    given = dict(given)
    own = given.pop("rope_theta", None)
    theta = theta if own is None else own
    old, kind = given.pop("type", None), given.pop("rope_type", None)
    if old is not None and kind is not None and old != kind:
        raise UserError(f"{where}: RoPE settings contradict each other: rope_type={kind!r}, type={old!r}; remove one")
    kind = kind or old or "default"
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
        raise UserError(f"{where}: rope_theta={theta!r} must be a number")
    if not 1 < theta < math.inf:
        raise UserError(f"{where}: rope_theta={theta!r} must be above 1")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise UserError(f"{where}: RoPE type {kind!r} is not implemented; these are: {', '.join(FIELDS)}")
    partial = _partial(given.pop("partial_rotary_factor", None), head_dim, partial_rope, where)
    fields = _fields(kind, given, where)
    if ORIGINAL in FIELDS[kind][1]:
        fields.setdefault(ORIGINAL, max_positions)  # as transformers does
    _check_values(kind, fields, int(head_dim * partial), where)
    if kind == "longrope":
        fields.setdefault("factor", max_positions / fields[ORIGINAL])
    if kind == "dynamic":
        fields["max_position_embeddings"] = max_positions
    return RopeConfig(rope_type=kind, theta=float(theta), partial_rotary_factor=partial, **fields)


def given_rope(raw: dict[str, Any], theta: float, where: str) -> tuple[Any, Any]:
    """(settings, base) of the only rotary embedding, as `read_rope` takes them, from the fields of a config.json.

    They are in `rope_parameters` (transformers 5), or in `rope_theta` and `rope_scaling` (before). theta: the base
    without any. UserError if both are given and differ.
    """
    older, newer = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if older and newer and _alike(older) != _alike(newer):
        raise UserError(
            f"{where}: RoPE settings contradict each other: rope_scaling={older!r}, rope_parameters={newer!r}; "
            "remove one"
        )
    given, outer = older or newer, raw.get("rope_theta")  # the order in which transformers looks
    theta = theta if outer is None else outer
    check_base(outer, given, where)
    check_base(base_of(given, theta), newer, where)
    return given, theta


def base_of(given: Any, theta: Any = None) -> Any:
    """The base in rope settings, or `theta`."""
    own = given.get("rope_theta") if isinstance(given, dict) else None
    return theta if own is None else own


def check_base(outer: Any, given: Any, where: str) -> None:
    """UserError if `rope_theta` of config.json differs from that of its rope settings."""
    inner = base_of(given)
    if outer is not None and inner is not None and outer != inner:
        raise UserError(
            f"{where}: RoPE settings contradict each other: rope_theta={outer!r}, and {inner!r} in rope_parameters; "
            "remove one"
        )


def _alike(given: Any) -> Any:
    """RoPE settings without the differences between their two forms."""
    if not isinstance(given, dict):
        return given
    kind = given.get("rope_type") or given.get("type") or "default"
    apart = ("type", "rope_theta", "partial_rotary_factor")
    rest = {name: value for name, value in given.items() if value is not None and name not in apart}
    return rest | {"rope_type": kind}


def _partial(value: Any, head_dim: int, implemented: bool, where: str) -> float:
    """The part of each head that is turned."""
    if value in (1.0, None) and not isinstance(value, bool):
        return 1.0
    if not implemented:
        raise UserError(f"{where}: partial_rotary_factor is not implemented")
    whole = not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value <= 1
    if not whole or int(head_dim * value) < 2 or int(head_dim * value) % 2:
        raise UserError(
            f"{where}: partial_rotary_factor={value!r} must make an even number of 2 or more of head_dim={head_dim}"
        )
    return float(value)


def _fields(kind: str, given: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of this type of RoPE, as RopeConfig has them."""
    needed, optional = FIELDS[kind]
    if kind == "yarn" and "truncate" in given:
        given["truncate"] = bool(given["truncate"])  # an explicit null switches it off in transformers
    missing = [name for name in needed if given.get(name) is None]
    known = needed + optional + IGNORED.get(kind, ())
    unknown = [name for name, value in given.items() if name not in known and value is not None]
    if kind == "default":
        unknown = [name for name in unknown if name not in ("factor", ORIGINAL)]
    if missing or unknown:
        kinds = (("lacks", missing), ("has unknown", unknown))
        problems = [f"{verb} {', '.join(found)}" for verb, found in kinds if found]
        raise UserError(f"{where}: RoPE of type {kind!r} {' and '.join(problems)}")
    one = lambda name, value: tuple(map(float, value)) if name in LISTS else TYPES.get(name, float)(value)
    try:
        return {name: one(name, given[name]) for name in needed + optional if given.get(name) is not None}
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: RoPE of type {kind!r}: {error}") from error


def _check_values(kind: str, fields: dict[str, Any], head_dim: int, where: str) -> None:
    start = f"{where}: RoPE of type {kind!r}: "
    above_0 = lambda value: all(0 < x < math.inf for x in (value if isinstance(value, tuple) else (value,)))
    wrong = [f"{name}={value}" for name, value in fields.items() if name != "truncate" and not above_0(value)]
    if wrong:
        raise UserError(f"{start}{', '.join(wrong)} must be above 0")
    if kind in ("dynamic", "longrope") and fields.get("factor", 1) < 1:
        raise UserError(f"{start}factor={fields['factor']} must be at least 1")
    if kind == "dynamic" and head_dim < 4:
        raise UserError(f"{start}head_dim={head_dim} must be at least 4")
    if kind == "llama3" and fields["low_freq_factor"] >= fields["high_freq_factor"]:
        raise UserError(f"{start}low_freq_factor must be below high_freq_factor")
    if kind == "yarn" and fields.get("beta_fast", 32) < fields.get("beta_slow", 1):
        raise UserError(f"{start}beta_fast must not be below beta_slow")
    for name in LISTS:
        if name in fields and len(fields[name]) != head_dim // 2:
            raise UserError(
                f"{start}{name} has {len(fields[name])} numbers, where a rotation of {head_dim} dims of a "
                f"head needs {head_dim // 2}"
            )


def rope_fields(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` of config.json. `read_rope` reads them back unchanged."""
    fields = {"rope_type": rope.rope_type, "rope_theta": rope.theta}
    if rope.partial_rotary_factor != 1:
        fields["partial_rotary_factor"] = rope.partial_rotary_factor
    for name in sum(FIELDS[rope.rope_type], ()):
        if getattr(rope, name) is not None:
            fields[name] = list(getattr(rope, name)) if name in LISTS else getattr(rope, name)
    return fields
