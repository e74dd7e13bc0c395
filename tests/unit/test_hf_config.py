# python -m pytest tests/unit/test_hf_config.py
"""config.json <-> ModelConfig: read as transformers reads it, and every field that is not implemented is refused by
name."""

import pytest
from transformers import LlamaConfig

from alst_jax.config import UserError
from alst_jax.models.config import ModelConfig
from alst_jax.models.hf_config import model_config, parse_config
from alst_jax.ops.rope import RopeConfig
from tests.unit.hf_models import CONFIG, parse


def test_what_transformers_saves_is_read(tmp_path):
    for changes in ({}, dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, dtype="bfloat16")):
        LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"} | changes).save_pretrained(tmp_path)
        config = model_config(tmp_path)
        assert config == ModelConfig(
            96,
            64,
            96,
            2,
            4,
            2,
            16,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            tie_word_embeddings=bool(changes),
            attention_bias=bool(changes),
            mlp_bias=bool(changes),
        )


def test_defaults_are_those_of_transformers():
    few = {
        k: CONFIG[k]
        for k in (
            "model_type",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    }
    ours, theirs = parse_config(few, "config.json"), LlamaConfig.from_dict(dict(few))
    for name, field in (
        ("num_kv_heads", "num_key_value_heads"),
        ("head_dim", "head_dim"),
        ("rms_norm_eps", "rms_norm_eps"),
        ("tie_word_embeddings", "tie_word_embeddings"),
        ("attention_bias", "attention_bias"),
        ("mlp_bias", "mlp_bias"),
        ("initializer_range", "initializer_range"),
        ("max_position_embeddings", "max_position_embeddings"),
    ):
        assert getattr(ours, name) == getattr(theirs, field), name
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(model_type="glm4", architectures=["Glm4ForCausalLM"]),
            "model_type 'glm4'.*Glm4ForCausalLM.*not supp.*: it has "
            "a partial rotary embedding and fused projections; the closest supported family is gemma3_text; these models are",
        ),
        (dict(model_type="qwen3_moe"), "it has routed experts; the closest supported family is qwen3;"),
        (
            dict(model_type="qwen3_next"),
            "it has linear attention and routed experts; the closest supported family is qwen3;",
        ),
        (dict(model_type="mystery", n_routed_experts=64), r"routed experts \(n_routed_experts=64\)"),
        (dict(model_type="mystery", auto_map={"AutoModelForCausalLM": "modeling.Mystery"}), "auto_map.*never executed"),
        (dict(model_type="llama9"), "the closest supported family is llama;"),
        (dict(num_local_experts=8), r"not implemented: routed experts \(num_local_experts=8\)"),
        (dict(layer_types=["linear_attention", "full_attention"]), "linear attention"),
        (
            dict(text_config=dict(model_type="llama"), model_type="llava"),
            "text_config: this checkpoint .model_type 'llava'",
        ),
        (dict(model_type="qwen2"), "model_type 'qwen2'"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification.*not supported"),
        (dict(quantization_config=dict(quant_method="gptq")), "quantization_config is set; training needs unquantised"),
        (dict(hidden_act="gelu"), "not implemented: hidden_act='gelu'"),
        (dict(attention_dropout=0.1), "not implemented: attention_dropout=0.1"),
        (dict(layer_types=["sliding_attention", "full_attention"]), "not implemented: layer_types="),
        (dict(partial_rotary_factor=0.5), "not implemented: partial_rotary_factor=0.5"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=4.0, magic=True)), "'yarn' has unknown magic"),
        (dict(some_new_field=3), "not implemented: some_new_field=3"),
        (dict(original_max_position_embeddings=1024), "not implemented: original_max_position_embeddings=1024"),
        (dict(rope_interleaved=True), "rope_interleaved=True"),
        (dict(vocab_size=None), "lacks vocab_size"),
        (dict(vocab_size="96"), "vocab_size='96' must be a whole number"),
        (dict(hidden_size=64.0), "hidden_size=64.0 must be a whole number"),
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps='1e-5' must be a number"),
        (dict(num_key_value_heads=3), "num_key_value_heads=3 must divide num_attention_heads=4"),
        (dict(hidden_size=63, head_dim=None), "hidden_size=63 is not a multiple of num_attention_heads=4"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        parse(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(attention_dropout=0.0),
        dict(pretraining_tp=1),
        dict(hidden_act="silu"),
        dict(partial_rotary_factor=1.0),
        dict(sliding_window=None),
        dict(sliding_window=4096),
        dict(layer_types=["full_attention"] * 2),
        dict(pretraining_tp=2),
        dict(pretraining_tp=4),
        dict(max_sequence_length=2048),
        dict(_commit_hash="e1"),
        dict(do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=9),
        dict(tokenizer_class="LlamaTokenizer", model_max_length=4096),
        dict(_attn_implementation="sdpa", use_flash_attn=True),
        dict(auto_map={"AutoModel": "modeling_llama.LlamaModel"}),
        dict(some_switch=False),
        dict(use_cache=True),
        dict(torch_dtype="bfloat16"),
        dict(max_position_embeddings=None) | dict(rms_norm_eps=1e-5),
        dict(initializer_range=None),
    ],
)
def test_neutral_values_are_accepted(fields):
    assert parse(**fields).hidden_size == 64


def test_errors_of_the_directory(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        model_config(tmp_path / "nowhere")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(
        UserError, match=r"not a Hugging Face model directory: it has no config.json \(it has: weights.bin\)"
    ):
        model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        model_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        model_config(tmp_path)
