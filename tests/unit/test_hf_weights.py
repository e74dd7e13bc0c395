# pytest tests/unit/test_hf_weights.py
"""safetensors <-> the tree: every tensor, by target shard, within the memory of about one shard; broken files
refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alst_jax.models import hf_weights
from alst_jax.models.block import abstract_params
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import file_dtypes, load_params
from alst_jax.xla import arrays as loading
from tests.helpers import leaf
from tests.unit.hf_models import EVERY_BIAS, assert_equal, by_name, make_hf, on_one_device, over_both_axes, place


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), EVERY_BIAS], ids=["untied", "tied", "biases"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_tensor_is_loaded(tmp_path, dtype, max_shard_size, changes):
    expected = make_hf(tmp_path, dtype, max_shard_size, **changes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "40KB")
    config = model_config(tmp_path)
    dtypes = file_dtypes(tmp_path, config)
    assert {str(d) for d in jax.tree.leaves(dtypes)} == {str(dtype).removeprefix("torch.")}
    abstract = jax.tree.map(
        lambda x, d: jax.ShapeDtypeStruct(x.shape, d, sharding=x.sharding), on_one_device(config), dtypes
    )
    params = load_params(tmp_path, config, abstract)
    assert all(x.dtype == d for x, d in zip(jax.tree.leaves(params), jax.tree.leaves(dtypes), strict=True))
    assert_equal(by_name(params, config), expected)


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
def test_shards_over_both_mesh_axes_equal_the_whole(tmp_path, memory_kind):
    expected = make_hf(tmp_path, torch.bfloat16, "40KB", **EVERY_BIAS)
    config = model_config(tmp_path)
    abstract = place(abstract_params(config, jnp.bfloat16), over_both_axes(memory_kind))
    params = load_params(tmp_path, config, abstract)
    for x, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert x.sharding == wanted.sharding and x.sharding.memory_kind == memory_kind
        assert {s.data.sharding.memory_kind for s in x.addressable_shards} == {memory_kind}
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(x)[shard.index])
    kernel = leaf(params, "layers.mlp.gate_proj.kernel")
    assert kernel.addressable_shards[0].data.shape == (3, 64 // 4, 80 // 2)
    assert_equal(by_name(jax.tree.map(np.asarray, params), config), expected)


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
def test_large_parts_are_read_some_rows_at_a_time(tmp_path, monkeypatch, memory_kind):
    """As the weights of an 8B model are, whose stacks of 3.5 GiB had no room beside the pinned memory of a long run."""
    expected = make_hf(tmp_path, torch.bfloat16, **EVERY_BIAS)
    config = model_config(tmp_path)
    abstract = place(abstract_params(config, jnp.bfloat16), over_both_axes(memory_kind))
    reads, original = [], hf_weights.read_part
    monkeypatch.setattr(hf_weights, "read_part", lambda out, *rest: reads.append(out.nbytes) or original(out, *rest))
    load_params(tmp_path, config, abstract)
    at_once, reads[:] = max(reads), []
    monkeypatch.setattr(loading, "AT_ONCE", 1000)
    params = load_params(tmp_path, config, abstract)
    a_layer = (
        2 * 64 // 4 * 128 // 2
    )  # bytes of the largest kernel's layer, a device's part of it; embedding rows are smaller
    assert max(reads) == a_layer and at_once == 3 * a_layer
    for x, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert x.sharding == wanted.sharding and x.dtype == wanted.dtype
    assert_equal(by_name(jax.tree.map(np.asarray, params), config), expected)


def test_a_stack_may_be_sharded_over_its_layers(tmp_path):
    expected = make_hf(tmp_path, num_hidden_layers=4)
    config = model_config(tmp_path)
    mesh = Mesh(np.array(jax.devices()[:4]), ("seq",))
    params = load_params(
        tmp_path,
        config,
        place(
            abstract_params(config, jnp.float32),
            lambda path, _: NamedSharding(mesh, P("seq") if path[0].key == "layers" else P()),
        ),
    )
    assert leaf(params, "layers.mlp.up_proj.kernel").addressable_shards[2].data.shape == (1, 64, 80)
    assert_equal(by_name(jax.tree.map(np.asarray, params), config), expected)


def test_cast_to_the_dtype_asked_for(tmp_path):
    expected = make_hf(tmp_path)
    config = model_config(tmp_path)
    params = load_params(tmp_path, config, on_one_device(config, jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_equal(by_name(params, config), {name: value.bfloat16() for name, value in expected.items()})


def test_devices_with_the_same_part_share_the_read(tmp_path, monkeypatch):
    make_hf(tmp_path)
    config = model_config(tmp_path)
    reads = []
    original = hf_weights.read_tensor
    monkeypatch.setattr(
        hf_weights, "read_tensor", lambda tensor, index: reads.append(tensor.key) or original(tensor, index)
    )
    mesh = Mesh(np.array(jax.devices()), ("data",))
    load_params(tmp_path, config, place(abstract_params(config, jnp.float32), lambda *_: NamedSharding(mesh, P())))
    assert len(reads) == len(set(reads)) == 3 + 9 * config.num_layers
