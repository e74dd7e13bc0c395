"""Hugging Face's config.json <-> ModelConfig. A field that changes the result is implemented or refused, never dropped.

Fields that families share are read here; a family's own fields are read by its file in models/families."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from alst_jax.config import UserError
from alst_jax.models.config import LayerKind, ModelConfig
from alst_jax.models.families import FAMILIES
from alst_jax.models.families.family import Family
from alst_jax.models.families.layer_types import FULL
from alst_jax.models.families.unsupported import find_family
from alst_jax.models.hf_rope import read_rope, rope_fields
from alst_jax.models.text_config import text_fields, with_text_field
from alst_jax.models.weight_files import refuse_adapter
from alst_jax.ops.rope import RopeConfig

# Fields that do not change the numbers that the model computes from tokens.
HARMLESS = {
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_llama_config",
    "label2id",
    "model_type",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "rope_interleaved",
    "keys_to_ignore_at_inference",
    "task_specific_params",
    "transformers.js_config",
    "max_length",
    "default_theta",
    "_attn_implementation_autoset",
    "unsloth_fixed",
    "unsloth_version",
    "unk_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "decoder_start_token_id",
    "tokenizer_class",
    "model_max_length",
    "max_sequence_length",
    "_commit_hash",
    "_attn_implementation",
    "attn_implementation",
    "use_flash_attn",
    "use_flash_attention_2",
    "pretraining_tp",  # transformers 5 reads this no more; its results differed by rounding
    # Sampling, which training never does.
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "typical_p",
    "max_new_tokens",
    "min_length",
    "repetition_penalty",
    "length_penalty",
    "num_beams",
    "num_return_sequences",
    "num_beam_groups",
    "diversity_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "output_scores",
    "return_dict_in_generate",
    "early_stopping",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "prefix",
    "cache_implementation",
    "auto_map",  # the names of remote code, which is never loaded: the architecture decides
}
# Fields that transformers reads in some families alone, and these values do nothing in the others.
WINDOW_FIELDS = {"sliding_window", "use_sliding_window", "max_window_layers"}
# Fields of every family.
IMPLEMENTED = {
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}
# Fields that are not implemented, with the values at which they do nothing; any unknown field may be null or false.
NEUTRAL = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1.0, None),
    "chunk_size_feed_forward": (0, None),
    "is_decoder": (True, False),
    "return_dict": (True,),
    "num_labels": (2,),
    "hidden_dropout": (0, None),
    "residual_dropout": (0, None),
    "embd_pdrop": (0, None),
    "problem_type": (None,),
    "resid_pdrop": (0, None),
    "output_hidden_states": (True, False),
    "output_attentions": (False,),
    "use_return_dict": (True,),
}
WHOLE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
NUMBERS = ("rms_norm_eps", "initializer_range", "rope_theta")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
MOST = {"num_hidden_layers": 10_000}  # larger numbers are mistakes, and some would fill the memory
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


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
    _check_fields(raw, family, where)
    missing = [name for name in NEEDED if raw.get(name) is None]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    _check_types(raw, where)
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


def _check_types(raw: dict[str, Any], where: str) -> None:
    for name in WHOLE + NUMBERS:
        value, kinds = raw.get(name), (int,) if name in WHOLE else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise UserError(f"{where}: {name}={value!r} must be a {'whole ' if name in WHOLE else ''}number")
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{where}: {name}={value!r} must be above 0")
        if value is not None and name in WHOLE and value > MOST.get(name, 2**40):
            raise UserError(f"{where}: {name}={value!r} must be at most {MOST.get(name, 2**40)}: no model is larger")
    for name in FLAGS:
        if not isinstance(raw.get(name, False), bool | None):
            raise UserError(f"{where}: {name}={raw[name]!r} must be true or false")


def _check_fields(raw: dict[str, Any], family: Family, where: str) -> None:
    unknown, known = [], HARMLESS | IMPLEMENTED | family.implemented
    if "layer_types" not in family.implemented:
        known = known | WINDOW_FIELDS  # transformers reads no window in this family
        types = raw.get("layer_types")
        full = isinstance(types, list) and all(kind == FULL for kind in types)
        if full and len(types) == raw.get("num_hidden_layers"):
            known = known | {"layer_types"}
    for name, value in raw.items():
        if name in known or value is None or value is False:
            continue
        if name not in NEUTRAL or value not in NEUTRAL[name]:
            unknown.append(f"{name}={value!r}")
    if "hidden_act" not in family.implemented and raw.get("hidden_act", "silu") not in ("silu", "swish"):
        unknown.append(f"hidden_act={raw['hidden_act']!r} (silu is)")
    if raw.get("rope_interleaved"):
        unknown.append("rope_interleaved=True")
    if unknown:
        raise UserError(
            f"{where}: not implemented: {', '.join(unknown)}. Training without would silently give another "
            "model; remove the field only if it has no effect on this one (a dropout: to train without it)"
        )


def _ropes(raw: dict[str, Any], family: Family, head_dim: int, max_positions: int, where: str) -> list[RopeConfig]:
    """The rotary embeddings, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    read = lambda given, theta: read_rope(given, theta, head_dim, max_positions, where, family.partial_rope)
    if family.ropes is not None:
        return [read(given, theta) for given, theta in family.ropes(raw, where)]
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # the order in which transformers looks
    return [read(given, raw.get("rope_theta") or family.defaults.get("rope_theta", 10000.0))]


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
