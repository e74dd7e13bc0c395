"""A model whose positions are stretched: the fields of config.json that say so, for training and for the export."""

import json
import pathlib
from typing import Any

from alst_jax.config import TrainConfig, UserError
from alst_jax.models.config import ModelConfig
from alst_jax.models.families import FAMILIES
from alst_jax.models.families.layer_types import FULL, SLIDING
from alst_jax.models.families.unsupported import find_family
from alst_jax.models.hf_config import hf_config_dict, parse_config, read_config
from alst_jax.models.hf_fields import HARMLESS
from alst_jax.models.hf_rope import ORIGINAL
from alst_jax.models.text_config import TEXT, is_wrapped, text_fields

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of Llama 3.1
LOCAL = "rope_local_base_freq"  # Gemma 3's name for the base of its sliding windows
REPLACED = ("rope_theta", "rope_scaling", "rope_parameters", LOCAL)


def is_extended(config: TrainConfig) -> bool:
    """Whether the flags change the positions of the model."""
    return config.rope_scaling is not None or config.rope_theta is not None


def rope_flags(config: TrainConfig) -> dict[str, Any] | None:
    """The flags that change the positions of the model, and the length that they were checked with."""
    names = ("rope_scaling", "rope_factor", "rope_theta", "seq_len")
    return {name: getattr(config, name) for name in names} if is_extended(config) else None


def extend(model: ModelConfig, files: pathlib.Path | None, config: TrainConfig) -> ModelConfig:
    """The model with the positions of --rope-scaling or --rope-theta.

    files: the directory of its config.json; None: it has none. UserError for a length beyond the scaling, for a model
    whose positions are scaled already, and for a family that transformers does not scale.
    """
    if not is_extended(config):
        return model
    raw = hf_config_dict(model) if files is None else read_config(files)
    return parse_config(extended(raw, config), "config.json with the flags of rotary embedding")


def record_extension(model_dir: pathlib.Path, config: TrainConfig) -> None:
    """Write the positions of --rope-scaling or --rope-theta into config.json."""
    if is_extended(config):
        fields = extended(read_config(model_dir), config)
        (model_dir / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def extended(raw: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The fields of config.json with the positions of the flags.

    The settings are written in two forms: `rope_parameters` is read by transformers 5; `rope_scaling` and `rope_theta`
    are read by older ones and by inference engines, of Gemma 3 also `rope_local_base_freq`. A rotary embedding of
    sliding windows is unchanged.
    """
    fields = text_fields(raw, HARMLESS, "config.json")
    family = find_family(fields, FAMILIES, "config.json")
    length = fields.get("max_position_embeddings") or family.defaults.get("max_position_embeddings", 2048)
    own, *others = _settings(fields, family)
    if config.rope_scaling is None:
        new, new_length = own | {"rope_theta": config.rope_theta}, max(length, config.seq_len or 0)
        if own["rope_type"] in ("dynamic", "longrope"):
            new_length = length  # these scalings are computed from it
        elif own["rope_type"] in ("yarn", "llama3"):
            new.setdefault(ORIGINAL, length)  # the value that readers assume where it is missing
    else:
        _check(config, own["rope_type"], family.model_type, length)
        new = {"rope_type": config.rope_scaling, "rope_theta": own["rope_theta"], "factor": config.rope_factor}
        new |= {ORIGINAL: length} if config.rope_scaling in ("yarn", "llama3") else {}
        new |= LLAMA3 if config.rope_scaling == "llama3" else {}
        # From this field transformers counts how the base grows with the length.
        new_length = length if config.rope_scaling == "dynamic" else round(length * config.rope_factor)
    changed: dict[str, Any] = {
        "max_position_embeddings": new_length,
        "rope_parameters": {FULL: new, SLIDING: others[0]} if others else new,
    }
    changed |= _older_form(new, others[0] if others else None, LOCAL in family.implemented)
    kept = {name: value for name, value in (raw[TEXT] if is_wrapped(raw) else raw).items() if name not in REPLACED}
    return raw | {TEXT: kept | changed} if is_wrapped(raw) else kept | changed


def _older_form(own: dict[str, Any], sliding: dict[str, Any] | None, local: bool) -> dict[str, Any]:
    """The settings in the fields of transformers 4: `rope_scaling` is of full attention; sliding windows have no
    scaling, and the base LOCAL where the family knows it (local). Empty if these fields cannot hold the settings."""
    fields: dict[str, Any] = {"rope_theta": own["rope_theta"]}
    if own["rope_type"] != "default":
        fields["rope_scaling"] = {name: value for name, value in own.items() if name != "rope_theta"}
    if sliding is None:
        return fields
    if sliding["rope_type"] != "default" or not local and sliding["rope_theta"] != own["rope_theta"]:
        return {}
    return fields | ({LOCAL: sliding["rope_theta"]} if local else {})


def _settings(fields: dict[str, Any], family: Any) -> list[dict[str, Any]]:
    """The settings of each rotary embedding in the form of `rope_parameters`; full attention first."""
    if family.ropes is None:
        given = [
            (
                fields.get("rope_scaling") or fields.get("rope_parameters") or {},
                fields.get("rope_theta") or family.defaults.get("rope_theta", 10000.0),
            )
        ]
    else:
        given = family.ropes(fields, "config.json")
    return [
        {name: value for name, value in settings.items() if name != "type" and value is not None}
        | {
            "rope_type": settings.get("rope_type") or settings.get("type") or "default",
            "rope_theta": settings.get("rope_theta") or theta,
        }
        for settings, theta in given
    ]


def _check(config: TrainConfig, kind: str, family: str, length: int) -> None:
    """UserError if --rope-scaling cannot be applied to a model made for `length` positions with this kind of rope."""
    given = f"--rope-scaling {config.rope_scaling} --rope-factor {config.rope_factor:g}"
    if family == "phi3":
        raise UserError(
            f"{given}: transformers' Phi-3 has no such scaling, so that it could not read the export; use --rope-theta"
        )
    if kind != "default":
        raise UserError(
            f"{given}: the positions of this model are scaled already (rope_type {kind}, {length:,} "
            "positions), and two scalings contradict each other; use --rope-theta, or remove the scaling "
            "from its config.json"
        )
    if config.seq_len is not None and config.seq_len > length * config.rope_factor:
        raise UserError(
            f"{given}: the model's {length:,} positions become {round(length * config.rope_factor):,}, and "
            f"--seq-len {config.seq_len} is beyond; use --rope-factor {-(-config.seq_len // length)} or "
            "more"
        )


def longest(model: ModelConfig) -> int:
    """The positions that the model was made for, scaling included."""
    grown = max(rope.factor if rope.rope_type == "dynamic" else 1.0 for rope in model.ropes)
    return round(model.max_position_embeddings * grown)
