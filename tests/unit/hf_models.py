"""Random Hugging Face models."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from transformers import LlamaConfig, LlamaForCausalLM

from alst_jax.config import UserError
from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.hf_config import model_config, parse_config
from alst_jax.models.hf_weights import load_params
from tests.helpers import leaf, leaves

SHAPE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
)
CONFIG = dict(  # a config.json
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
EVERY_BIAS = dict(attention_bias=True, mlp_bias=True)


def make_hf(directory: pathlib.Path, dtype=torch.float32, max_shard_size="5GB", **changes) -> dict[str, torch.Tensor]:
    """Save a random Llama; returns its tensors. Biases and norms are random too, else a mix-up would not show."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return {
        name: value
        for name, value in model.state_dict().items()
        if name != "lm_head.weight" or not changes.get("tie_word_embeddings")
    }


def parse(**fields) -> ModelConfig:
    """The model of CONFIG with other fields."""
    return parse_config(json.loads(json.dumps(CONFIG | fields)), "config.json")


def place(abstract, sharding):
    """The abstract tree with `sharding(path, leaf)` on each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(path, x)), abstract
    )


def on_one_device(config, dtype=jnp.float32):
    return place(abstract_params(config, dtype), lambda *_: SingleDeviceSharding(jax.devices()[0]))


def over_both_axes(memory_kind="device"):
    """Each axis of a (2, 4) mesh on its own dim where the sizes allow it, the layer dim never."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "seq"))

    def sharding(_, x):
        spec = {1: P(("data", "seq")), 2: P("data", "seq"), 3: P(None, "seq", "data")}[x.ndim]
        if x.ndim == 2 and x.shape[0] == SHAPE["num_hidden_layers"]:
            spec = P(None, "seq")  # a stacked vector; over the data axis replicated
        return NamedSharding(mesh, spec, memory_kind=memory_kind)

    return sharding


def by_name(params, config) -> dict[str, np.ndarray]:
    """The tree as Hugging Face names and layouts, spelled out here and not by the key table under test."""
    found = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": leaf(params, "norm.scale"),
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = params["lm_head"]["embedding"]
    for layer in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{norm}.weight"] = leaf(params, f"layers.{norm}.scale")[layer]
        for part, projections in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in (f"{projection}_proj" for projection in projections):
                found[f"model.layers.{layer}.{part}.{name}.weight"] = leaf(params, f"layers.{part}.{name}.kernel")[
                    layer
                ].T
                if f"layers.{part}.{name}.bias" in leaves(params):
                    found[f"model.layers.{layer}.{part}.{name}.bias"] = leaf(params, f"layers.{part}.{name}.bias")[
                        layer
                    ]
    return {name: np.asarray(value) for name, value in found.items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # float32 holds every float16 and bfloat16 exactly; torch has no numpy bfloat16 of its own.
        np.testing.assert_array_equal(found[name].astype(np.float32), value.float().numpy(), err_msg=name)


def refuse(directory, message):
    with pytest.raises(UserError, match=message):
        config = model_config(directory)
        load_params(directory, config, on_one_device(config))
