# pytest tests/unit/test_tree_names.py
"""A leaf has the same name in nested dicts and in Flax modules."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.tree_util import FlattenedIndexKey

from alst_jax.models.block import abstract_params
from alst_jax.models.tree import as_dict, dotted, is_stacked, names
from tests.helpers import TINY


class Linear(nnx.Module):
    def __init__(self, size, bias=False):
        self.kernel = nnx.Param(jnp.arange(2.0 * size).reshape(2, size))
        self.bias = nnx.Param(jnp.zeros(size)) if bias else None


class Attention(nnx.Module):
    def __init__(self):
        self.q_proj, self.o_proj, self.head_dim = Linear(3, bias=True), Linear(2), 4


class Block(nnx.Module):
    def __init__(self):
        self.self_attn = Attention()
        self.experts = nnx.List([Linear(5), Linear(6)])


def modules():
    return {"embed_tokens": {"embedding": jnp.ones((4, 2))}, "layers": Block(), "value": {"value": jnp.ones(1)}}


def test_names_of_modules_and_dicts():
    found = {names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(modules())}
    assert found == {
        ("embed_tokens", "embedding"): (4, 2),
        ("layers", "self_attn", "q_proj", "kernel"): (2, 3),
        ("layers", "self_attn", "q_proj", "bias"): (3,),
        ("layers", "self_attn", "o_proj", "kernel"): (2, 2),
        ("layers", "experts", "0", "kernel"): (2, 5),
        ("layers", "experts", "1", "kernel"): (2, 6),
        ("value", "value"): (1,),
    }  # a key of a dict may be called so
    for name in found:
        assert names(name) == name


def test_a_state_inside_of_a_variable_has_no_value_in_its_name():
    state = jax.tree.map(lambda x: {"code": x, "scale": x}, {"mu": modules()["layers"].self_attn.o_proj})
    assert [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)] == [
        "mu.kernel.code",
        "mu.kernel.scale",
    ]


def test_stacked_leaves():
    assert {dotted(path): is_stacked(path) for path, _ in jax.tree_util.tree_leaves_with_path(modules())} == {
        "embed_tokens.embedding": False,
        "layers.self_attn.q_proj.kernel": True,
        "layers.self_attn.q_proj.bias": True,
        "layers.self_attn.o_proj.kernel": True,
        "layers.experts.0.kernel": True,
        "layers.experts.1.kernel": True,
        "value.value": False,
    }
    assert is_stacked(("layers", "kernel")) and not is_stacked(("norm", "scale"))


def test_as_dict_of_modules():
    made = as_dict(modules())
    assert made.keys() == {"embed_tokens", "layers", "value"}
    assert made["layers"]["self_attn"].keys() == {"q_proj", "o_proj"}
    assert made["layers"]["self_attn"]["q_proj"]["kernel"].shape == (2, 3)
    assert made["layers"]["experts"]["1"]["kernel"].shape == (2, 6)
    assert made["layers"]["self_attn"]["o_proj"].keys() == {"kernel"}  # no bias: None is no leaf


def test_as_dict_of_a_dict_is_the_dict():
    params = {"embed_tokens": {"embedding": 1.0}, "norm": {"scale": 2}}
    assert as_dict(params) == params
    assert as_dict({"a": {"b": None, "c": 1}}) == {"a": {"c": 1}}
    model = abstract_params(TINY, jnp.float32)
    assert [dotted(p) for p, _ in jax.tree_util.tree_leaves_with_path(as_dict(model))] == [
        dotted(p) for p, _ in jax.tree_util.tree_leaves_with_path(model)
    ]


def test_other_nodes_have_no_names():
    with pytest.raises(TypeError, match="dicts, modules and sequences only"):
        names((FlattenedIndexKey(0),))
