"""Checkpoints of text and images, whose config.json has the fields of the language model in `text_config`.

The language model is trained. The other weights are copied unchanged (other_weights.py).
"""

from typing import Any, NamedTuple

from alst_jax.config import UserError

TEXT = "text_config"


class Wrapper(NamedTuple):
    """A model around a language model. text: its model_type if text_config has none. defaults: of text_config."""

    architecture: str
    text: str
    defaults: dict[str, Any]


WRAPPERS = {
    "gemma3": Wrapper(
        "Gemma3ForConditionalGeneration", "gemma3_text", {"vocab_size": 262208, "num_attention_heads": 8}
    ),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", "mistral", {}),
}
# Fields beside `text_config` that say nothing of how text alone is computed.
BESIDE = {
    TEXT,
    "vision_config",
    "image_token_index",
    "image_token_id",
    "boi_token_index",
    "boi_token_id",
    "eoi_token_index",
    "eoi_token_id",
    "mm_tokens_per_image",
    "projector_hidden_act",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "spatial_merge_size",
    "initializer_range",
    "tie_word_embeddings",
    "vocab_size",
    "processor_class",
}


def is_wrapped(raw: dict[str, Any]) -> bool:
    """Whether a config.json has a language model among others."""
    return isinstance(raw.get(TEXT), dict)


def text_fields(raw: dict[str, Any], harmless: set[str], where: str) -> dict[str, Any]:
    """The fields of the language model: `raw` itself, or its `text_config`. UserError if the model around it is another
    than WRAPPERS has, or has fields that are neither in BESIDE nor harmless."""
    if not is_wrapped(raw):
        return raw
    kind, architectures = raw.get("model_type"), raw.get("architectures")
    wrapper = WRAPPERS.get(kind) if isinstance(kind, str) else None
    if wrapper is None or architectures is not None and architectures != [wrapper.architecture]:
        these = ", ".join(f"{each.architecture} (model_type {name!r})" for name, each in WRAPPERS.items())
        raise UserError(
            f"{where}: text_config: this checkpoint (model_type {kind!r}, architectures {architectures}) holds more "
            f"than a language model. Language models are trained inside of {these}. Of others, save the language model "
            "alone: with transformers, make AutoModelForCausalLM.from_config(config.text_config), load into it the "
            "weights of the checkpoint's `language_model` and `lm_head`, and save_pretrained it"
        )
    unknown = [
        f"{name}={value!r}"
        for name, value in raw.items()
        if name not in BESIDE | harmless and value is not None and value is not False
    ]
    if unknown:
        raise UserError(f"{where}: not implemented beside text_config: {', '.join(unknown)}")
    given = {name: value for name, value in raw[TEXT].items() if name != "architectures"}
    fields = {"model_type": wrapper.text} | wrapper.defaults | given
    if raw.get("tie_word_embeddings") is not None:  # transformers reads the outer one
        fields["tie_word_embeddings"] = raw["tie_word_embeddings"]
    return fields


def with_text_field(raw: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A config.json with another value of a field of the language model."""
    return raw | {TEXT: raw[TEXT] | {name: value}} if is_wrapped(raw) else raw | {name: value}
