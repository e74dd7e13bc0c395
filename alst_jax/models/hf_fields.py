"""The fields of config.json: those that are implemented in all families, those that do nothing, and their types."""

import math
from typing import Any

from alst_jax.config import UserError
from alst_jax.models.families.family import Family
from alst_jax.models.families.layer_types import FULL

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


def check_fields(raw: dict[str, Any], family: Family, where: str) -> None:
    """UserError that names the fields that would change the model and are not implemented in its family."""
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


def check_types(raw: dict[str, Any], where: str) -> None:
    """UserError for a field that is missing, or no number where one is needed, or a number of no model."""
    if missing := [name for name in NEEDED if raw.get(name) is None]:
        raise UserError(f"{where} lacks {', '.join(missing)}")
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
