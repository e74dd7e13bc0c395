# pytest tests/unit/test_qwen2_family.py
"""Qwen2: config.json, sliding windows and tensors as transformers has them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from jax.sharding import SingleDeviceSharding
from transformers import Qwen2Config, Qwen2ForCausalLM

from alst_jax.config import UserError
from alst_jax.models.block import abstract_params
from alst_jax.models.config import LayerKind, ModelConfig
from alst_jax.models.hf_config import hf_config_dict, model_config, parse_config
from alst_jax.models.hf_saving import save_params
from alst_jax.models.hf_weights import load_params
from alst_jax.models.tree import as_dict
from alst_jax.ops.rope import RopeConfig
from tests.unit.test_families import BASE, SHAPE

QWEN2 = ModelConfig(96, 64, 80, 3, 8, 2, 8, max_position_embeddings=32768, family="qwen2", qkv_bias=True)


def test_qwen2_as_transformers_saves_it(tmp_path):
    for changes in ({}, dict(tie_word_embeddings=True, dtype="bfloat16")):
        Qwen2Config(**SHAPE | changes).save_pretrained(tmp_path)
        expected = dataclasses.replace(QWEN2, tie_word_embeddings=bool(changes))
        assert model_config(tmp_path) == expected
        assert parse_config(json.loads(json.dumps(hf_config_dict(expected))), "config.json") == expected


def test_qwen2s_defaults_are_those_of_transformers():
    few = {name: BASE[name] for name in BASE if name != "num_key_value_heads"} | {"num_attention_heads": 32}
    ours, theirs = parse_config(few, "config.json"), Qwen2Config.from_dict(dict(few))
    for name, field in (
        ("num_kv_heads", "num_key_value_heads"),
        ("rms_norm_eps", "rms_norm_eps"),
        ("tie_word_embeddings", "tie_word_embeddings"),
        ("initializer_range", "initializer_range"),
        ("max_position_embeddings", "max_position_embeddings"),
    ):
        assert getattr(ours, name) == getattr(theirs, field), name
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert parse_config(BASE | {"num_key_value_heads": None}, "config.json").num_kv_heads == 8


# What transformers makes of Qwen2's fields, and the window of each layer (or why the fields are refused).
NONE, LAST_TWO = (None, None, None), (None, 16, 16)
WINDOWS = {
    "nothing said": ({}, NONE),
    "switched off": (dict(use_sliding_window=False, sliding_window=16, max_window_layers=1), NONE),
    "all layers full": (dict(layer_types=["full_attention"] * 3), NONE),
    "from a layer that is not there": (dict(use_sliding_window=True, sliding_window=16, max_window_layers=3), NONE),
    "no length": (dict(use_sliding_window=True, sliding_window=None, max_window_layers=0), NONE),
    "switched on": (dict(use_sliding_window=True, sliding_window=16, max_window_layers=1), LAST_TWO),
    "default length": (dict(use_sliding_window=True, max_window_layers=0), (4096,) * 3),
    "one layer": (
        dict(
            use_sliding_window=True,
            sliding_window=16,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        (None, 16, None),
    ),
}


@pytest.mark.parametrize("fields,windows", WINDOWS.values(), ids=WINDOWS.keys())
def test_sliding_windows_are_those_of_transformers(fields, windows):
    theirs = Qwen2Config.from_dict(BASE | fields)
    assert (
        tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types) == windows
    )
    kinds = () if windows == NONE else tuple(LayerKind(window=window) for window in windows)
    ours = parse_config(BASE | fields, "config.json")
    assert ours == dataclasses.replace(QWEN2, layer_kinds=kinds)
    assert parse_config(json.loads(json.dumps(hf_config_dict(ours))), "config.json") == ours


@pytest.mark.parametrize("fields", [dict(attention_bias=True), dict(mlp_bias=True)], ids=str)
def test_llamas_options_are_not_qwen2s(fields):
    with pytest.raises(UserError, match=f"not implemented: {next(iter(fields))}=True"):
        parse_config(BASE | fields, "config.json")


@pytest.fixture
def qwen2_tree():
    """Qwen2's parameters, abstract, on one device."""
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: x.update(sharding=sharding), abstract_params(QWEN2, jnp.float32))


def test_the_number_of_qwen2s_parameters(qwen2_tree):
    assert QWEN2.num_params == sum(x.size for x in jax.tree.leaves(qwen2_tree))
    assert QWEN2.num_params == Qwen2ForCausalLM(Qwen2Config(**SHAPE)).num_parameters()


def test_qwen2s_tensors_there_and_back(tmp_path, qwen2_tree):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "in")
    params = load_params(tmp_path / "in", QWEN2, qwen2_tree)
    expected = model.state_dict()
    np.testing.assert_array_equal(
        as_dict(params)["layers"]["self_attn"]["k_proj"]["bias"][1], expected["model.layers.1.self_attn.k_proj.bias"]
    )
    save_params(jax.tree_util.tree_leaves_with_path(params), QWEN2, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(hf_config_dict(QWEN2)))
    back = Qwen2ForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert back.keys() == expected.keys() and all(torch.equal(back[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(drop="model.layers.1.self_attn.q_proj.bias"), r"missing \(1\): model.layers.1.self_attn.q_proj.bias"),
        (dict(add="model.layers.2.self_attn.o_proj.bias"), r"extra \(1\): model.layers.2.self_attn.o_proj.bias"),
    ],
    ids=str,
)
def test_missing_and_extra_biases_are_refused(tmp_path, qwen2_tree, change, message):
    tensors = {name: x.contiguous() for name, x in Qwen2ForCausalLM(Qwen2Config(**SHAPE)).state_dict().items()}
    tensors.pop(change.get("drop"), None)
    tensors |= {change["add"]: torch.zeros(64)} if "add" in change else {}
    safetensors.numpy.save_file({name: x.numpy() for name, x in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_params(tmp_path, QWEN2, qwen2_tree)
