# pytest tests/unit/test_families.py
"""Families of models: config.json and tensor names as transformers has them."""

import json
import random

import pytest
from transformers import AutoConfig

from alst_jax.config import UserError
from alst_jax.models.config import LayerKind
from alst_jax.models.families import FAMILIES
from alst_jax.models.hf_config import hf_config_dict, parse_config

SHAPE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
)
BASE = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], **SHAPE)


def test_the_families():
    assert FAMILIES.keys() == {
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "seed_oss",
        "smollm3",
        "granite",
        "olmo2",
        "olmo3",
        "gemma3_text",
        "phi3",
    }
    for name, family in FAMILIES.items():
        assert family.model_type == name
        theirs = type(AutoConfig.for_model(name)).__name__.removesuffix("Config").removesuffix("Text")
        assert family.architecture == theirs + "ForCausalLM"


def test_what_is_supported_is_said():
    with pytest.raises(
        UserError,
        match=r"model_type 'gpt2', architectures \[None\] is not supported: it has learned "
        r"positions, .*; the closest supported family is llama; these models are: LlamaForCausalLM "
        r"\(model_type 'llama'\), Qwen2ForCausalLM \(model_type 'qwen2'\), .*Phi3ForCausalLM \(model_type 'phi3'\)$",
    ):
        parse_config({"model_type": "gpt2"}, "config.json")
    with pytest.raises(UserError, match="model_type 'qwen2', architectures .*LlamaForCausalLM.* is not supported"):
        parse_config(BASE | {"architectures": ["LlamaForCausalLM"]}, "config.json")


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(layer_types=["sliding_attention"] * 3), "layer_types has sliding_attention.*contradict each other"),
        (dict(layer_types=["full_attention"] * 2), "must be a list with one type for each of 3 layers"),
        (dict(layer_types=["full_attention"] * 2 + ["chunked_attention"]), "layer_types with chunked_attention"),
        (dict(use_sliding_window=True, sliding_window=0), "sliding_window=0 must be a whole number above 0"),
        (dict(use_sliding_window=True, sliding_window=4.5), "sliding_window=4.5 must be"),
        (dict(use_sliding_window=True, max_window_layers="two"), "max_window_layers='two' must be a whole number"),
        (dict(use_sliding_window="yes"), "use_sliding_window='yes' must be true or false"),
        (dict(model_type="mistral", layer_types=["full_attention"] * 3), "contradicts sliding_window=4096"),
        (dict(model_type="smollm3", no_rope_layers=[1, 0]), r"no_rope_layers=\[1, 0\] must be a list"),
        (dict(model_type="smollm3", no_rope_layer_interval=0), "no_rope_layer_interval=0 must be"),
        (dict(model_type="granite", logits_scaling=0), "logits_scaling=0 must be a number above 0"),
        (
            dict(model_type="seed_oss", residual_dropout=0.1),
            r"not implemented: residual_dropout=0.1.*\(a dropout: to train",
        ),
        (
            dict(model_type="olmo3", rope_parameters=dict(rope_type="default")),
            "must have full_attention and sliding_attention",
        ),
        (
            dict(model_type="olmo3", rope_parameters=dict(full_attention="yarn")),
            "RoPE settings 'yarn' must be a JSON object",
        ),
        (
            dict(model_type="phi3", rope_scaling=dict(type="linear", factor=2.0)),
            "RoPE type 'linear': transformers' Phi-3 has",
        ),
        (
            dict(model_type="phi3", partial_rotary_factor=0.4),
            "partial_rotary_factor=0.4 must make an even number of 2 or more",
        ),
        (dict(model_type="phi3", partial_rotary_factor=1.5), "partial_rotary_factor=1.5 must make"),
        (dict(model_type="phi3", resid_pdrop=0.1), "not implemented: resid_pdrop=0.1"),
        (
            dict(model_type="gemma3_text", use_bidirectional_attention=True),
            "not implemented: use_bidirectional_attention",
        ),
        (dict(model_type="gemma3_text", hidden_activation="relu"), "not implemented: hidden_activation='relu'"),
        (
            dict(model_type="gemma3_text", query_pre_attn_scalar=0),
            "query_pre_attn_scalar=0 must be a whole number above 0",
        ),
        (
            dict(model_type="gemma3_text", final_logit_softcapping=-1),
            "final_logit_softcapping=-1 must be a number above 0",
        ),
    ],
    ids=str,
)
def test_wrong_fields_of_families_are_refused(fields, message):
    raw = BASE | {"architectures": [FAMILIES[fields.get("model_type", "qwen2")].architecture]} | fields
    with pytest.raises(UserError, match=f"^config.json: .*{message}"):
        parse_config(raw, "config.json")


SHARED = {  # here: in config.json
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "max_position_embeddings": "max_position_embeddings",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    """A config.json that says little means the same model here and there."""
    few = dict(
        model_type=family,
        architectures=[FAMILIES[family].architecture],
        vocab_size=96,
        hidden_size=128,
        intermediate_size=80,
        num_hidden_layers=8,
        num_attention_heads=32,
    )
    ours, theirs = parse_config(few, "config.json"), AutoConfig.for_model(family).from_dict(dict(few))
    for name, field in SHARED.items():
        expected = getattr(theirs, field, None)
        assert getattr(ours, name) == (128 // 32 if field == "head_dim" and expected is None else expected), name
    types = getattr(theirs, "layer_types", None)
    if types is None:
        types = ["full_attention" if getattr(theirs, "sliding_window", None) is None else "sliding_attention"] * 8
    window = lambda kind: theirs.sliding_window if kind == "sliding_attention" else None
    kinds = ours.layer_kinds or (LayerKind(),) * 8
    assert [kind.window for kind in kinds] == [window(kind) for kind in types]
    ropes = theirs.rope_parameters
    for kind, name in zip(kinds, types):
        assert ours.ropes[kind.table].theta == ropes.get(name, ropes)["rope_theta"]
    if family == "smollm3":
        assert [int(kind.rope) for kind in kinds] == theirs.no_rope_layers
    if family == "gemma3_text":
        assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5
    if family == "seed_oss":
        assert (ours.qkv_bias, ours.o_bias) == (theirs.attention_bias, theirs.attention_out_bias)


# fmt: off
JUNK = [
    None, True, False, 0, -1, 1, 3, 2.5, 1e400, float("nan"), 10**40, "", "silu", [], [1], [None] * 3, {}, {"a": 1},
    ["full_attention"] * 3, ["sliding_attention"] * 3, {"full_attention": {}}, {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": ["yarn"]}, {"full_attention": {"rope_type": {}}}, {"short_factor": "x", "rope_type": "longrope"},
]
# fmt: on


def test_no_config_crashes():
    """10,000 configs with some fields replaced by junk: read, or refused with a UserError."""
    rng = random.Random(0)
    read = 0
    for _ in range(10_000):
        family = rng.choice([*FAMILIES, *FAMILIES, "phi", 3, None, ["llama"]])
        architecture = FAMILIES[family].architecture if isinstance(family, str) and family in FAMILIES else "Other"
        names = sorted(FAMILIES[family].implemented if architecture != "Other" else ()) + [
            *SHAPE,
            "head_dim",
            "rms_norm_eps",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "architectures",
            "auto_map",
            "hidden_act",
            "max_position_embeddings",
            "text_config",
            "quantization_config",
            "layer_types",
            "num_experts",
        ]
        raw = SHAPE | dict(model_type=family, architectures=[architecture])
        raw |= {rng.choice(names): rng.choice(JUNK) for _ in range(rng.randint(0, 3))}
        try:
            config = parse_config(raw, "config.json")
        except UserError as error:
            assert str(error)
        else:
            read += 1
            assert parse_config(json.loads(json.dumps(hf_config_dict(config))), "config.json") == config
    assert 2000 < read < 8000
