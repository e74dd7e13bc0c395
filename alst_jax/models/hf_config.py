"""Hugging Face's config.json <-> ModelConfig. A field that changes the result is implemented or refused, never dropped.

Fields that families share are read here; a family's own fields are read by its file in models/families."""

import dataclasses
import json
import pathlib
from typing import Any

from alst_jax.config import UserError
from alst_jax.models.config import LayerKind, ModelConfig
from alst_jax.models.families import FAMILIES
from alst_jax.models.families.family import Family
from alst_jax.models.families.unsupported import find_family
from alst_jax.models.hf_fields import HARMLESS, check_fields, check_types
from alst_jax.models.hf_rope import given_rope, read_rope, rope_fields
from alst_jax.models.text_config import text_fields, with_text_field
from alst_jax.models.weight_files import refuse_adapter
from alst_jax.ops.rope import RopeConfig


def read_config(hf_dir: str | pathlib.Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory. UserError without such a directory, a config.json, or JSON in it."""
    path = pathlib.Path(hf_dir)
    if not path.is_dir():
        raise UserError(
            f"{path}: {'it is a file' if path.is_file() else 'no such directory'}; --model takes a Hugging "
            "Face model directory, a hub name that can be reached, or a checkpoint"
        )
    file = path / "config.json"
    if not file.is_file():
        refuse_adapter(path)
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{path} is not a Hugging Face model directory: it has no config.json (it has: {inside})")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no JSON object")
    return config


def model_config(hf_dir: str | pathlib.Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory. UserError names each field that is wrong or not implemented."""
    return parse_config(read_config(hf_dir), str(pathlib.Path(hf_dir) / "config.json"))


def parse_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """A ModelConfig from the fields of a config.json; `where` names it in errors."""
    raw = text_fields(raw, HARMLESS, where)
    family = find_family(raw, FAMILIES, where)
    check_fields(raw, family, where)
    check_types(raw, where)
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads", family.defaults.get("num_key_value_heads"))
    head_dim = raw.get("head_dim", family.defaults.get("head_dim"))
    if head_dim is None and raw["hidden_size"] % heads:
        raise UserError(
            f"{where}: hidden_size={raw['hidden_size']} is not a multiple of num_attention_heads={heads}, "
            "and there is no head_dim"
        )
    max_positions = _or_default(raw, "max_position_embeddings", family.defaults.get("max_position_embeddings", 2048))
    head_dim = head_dim or raw["hidden_size"] // heads
    options = family.options(raw, where)
    ropes, kinds = _used(_ropes(raw, family, head_dim, max_positions, where), options.pop("layer_kinds", ()))
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=head_dim,
        rms_norm_eps=float(_or_default(raw, "rms_norm_eps", family.defaults.get("rms_norm_eps", 1e-6))),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings", False))),
        initializer_range=float(_or_default(raw, "initializer_range", 0.02)),
        max_position_embeddings=max_positions,
        rope=ropes[0],
        more_ropes=ropes[1:],
        layer_kinds=kinds,
        family=family.model_type,
        **options,
    )


def _or_default(raw: dict[str, Any], name: str, default: Any) -> Any:
    return default if raw.get(name) is None else raw[name]


def _ropes(raw: dict[str, Any], family: Family, head_dim: int, max_positions: int, where: str) -> list[RopeConfig]:
    """The rotary embeddings, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    read = lambda given, theta: read_rope(given, theta, head_dim, max_positions, where, family.partial_rope)
    if family.ropes is not None:
        return [read(given, theta) for given, theta in family.ropes(raw, where)]
    return [read(*given_rope(raw, family.defaults.get("rope_theta", 10000.0), where))]


def _used(
    ropes: list[RopeConfig], kinds: tuple[LayerKind, ...]
) -> tuple[tuple[RopeConfig, ...], tuple[LayerKind, ...]]:
    """The rotary embeddings that layers use, each once, and the kinds of layers with their numbers among these."""
    used = tuple(dict.fromkeys(ropes[kind.table] for kind in kinds or (LayerKind(),)))
    return used, tuple(dataclasses.replace(kind, table=used.index(ropes[kind.table])) for kind in kinds)


def record_dtype(hf_dir: str | pathlib.Path, dtype: str) -> None:
    """Write the dtype of the weights into config.json: transformers loads them in the dtype it names."""
    raw = read_config(hf_dir)
    named = raw.get("dtype") or raw.get("torch_dtype")
    if named not in (None, dtype):
        raw = {name: value for name, value in raw.items() if name != "torch_dtype"} | {"dtype": dtype}
        (pathlib.Path(hf_dir) / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def record_vocabulary(hf_dir: str | pathlib.Path, size: int) -> None:
    """Write the number of rows of the embedding into config.json, if it has another one."""
    raw = read_config(hf_dir)
    if text_fields(raw, HARMLESS, str(hf_dir)).get("vocab_size") != size:
        (pathlib.Path(hf_dir) / "config.json").write_text(
            json.dumps(with_text_field(raw, "vocab_size", size), indent=2) + "\n", encoding="utf-8"
        )


def hf_config_dict(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields for a model that is not from Hugging Face. `model_config` reads them back unchanged."""
    family = FAMILIES[config.family]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **({} if "hidden_act" in family.implemented else {"hidden_act": "silu"}),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope_fields(config.rope),
        **family.fields(config),
    }
