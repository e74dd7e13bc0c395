# python -m pytest tests/unit/test_hf_weights.py
"""safetensors <-> the tree: every tensor, by target shard, within the memory of about one shard; broken files
refused."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from alst_jax.config import UserError
from alst_jax.models import hf_weights
from alst_jax.models.block import abstract_params
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import file_dtypes, load_params, save_params
from alst_jax.xla import arrays as loading
from tests.helpers import leaf, leaves

SHAPE = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=8,
             num_key_value_heads=2, head_dim=16)
EVERY_BIAS = dict(attention_bias=True, mlp_bias=True)


def make_hf(directory: pathlib.Path, dtype=torch.float32, max_shard_size="5GB", **changes) -> dict[str, torch.Tensor]:
    """Save a random Llama; returns its tensors. Biases and norms are random too, else a mix-up would not show."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return {name: value for name, value in model.state_dict().items()
            if name != "lm_head.weight" or not changes.get("tie_word_embeddings")}


def place(abstract, sharding):
    """The abstract tree with `sharding(path, leaf)` on each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(path, x)), abstract)


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
    found = {"model.embed_tokens.weight": params["embed_tokens"]["embedding"], "model.norm.weight": leaf(params, "norm.scale")}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = params["lm_head"]["embedding"]
    for layer in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{norm}.weight"] = leaf(params, f"layers.{norm}.scale")[layer]
        for part, projections in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in (f"{projection}_proj" for projection in projections):
                found[f"model.layers.{layer}.{part}.{name}.weight"] = leaf(params, f"layers.{part}.{name}.kernel")[layer].T
                if f"layers.{part}.{name}.bias" in leaves(params):
                    found[f"model.layers.{layer}.{part}.{name}.bias"] = leaf(params, f"layers.{part}.{name}.bias")[layer]
    return {name: np.asarray(value) for name, value in found.items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # float32 holds every float16 and bfloat16 exactly; torch has no numpy bfloat16 of its own.
        np.testing.assert_array_equal(found[name].astype(np.float32), value.float().numpy(), err_msg=name)


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), EVERY_BIAS], ids=["untied", "tied", "biases"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_tensor_is_loaded(tmp_path, dtype, max_shard_size, changes):
    expected = make_hf(tmp_path, dtype, max_shard_size, **changes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "40KB")
    config = model_config(tmp_path)
    dtypes = file_dtypes(tmp_path, config)
    assert {str(d) for d in jax.tree.leaves(dtypes)} == {str(dtype).removeprefix("torch.")}
    abstract = jax.tree.map(lambda x, d: jax.ShapeDtypeStruct(x.shape, d, sharding=x.sharding), on_one_device(config), dtypes)
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
    a_layer = 2 * 64 // 4 * 128 // 2  # bytes of the largest kernel's layer, a device's part of it; embedding rows are smaller
    assert max(reads) == a_layer and at_once == 3 * a_layer
    for x, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert x.sharding == wanted.sharding and x.dtype == wanted.dtype
    assert_equal(by_name(jax.tree.map(np.asarray, params), config), expected)


def test_a_stack_may_be_sharded_over_its_layers(tmp_path):
    expected = make_hf(tmp_path, num_hidden_layers=4)
    config = model_config(tmp_path)
    mesh = Mesh(np.array(jax.devices()[:4]), ("seq",))
    params = load_params(tmp_path, config, place(
        abstract_params(config, jnp.float32),
        lambda path, _: NamedSharding(mesh, P("seq") if path[0].key == "layers" else P())))
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
    original = hf_weights._read
    monkeypatch.setattr(hf_weights, "_read", lambda tensor, name, index: reads.append(name) or original(tensor, name, index))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    load_params(tmp_path, config, place(abstract_params(config, jnp.float32), lambda *_: NamedSharding(mesh, P())))
    assert len(reads) == len(set(reads)) == 3 + 9 * config.num_layers


# ------------------------------------------------------------------------------------------------ what is wrong in files


@pytest.fixture
def hf(tmp_path):
    """(directory, tensors) of a saved model whose single file can be rewritten with other tensors."""
    return tmp_path, make_hf(tmp_path)


def refuse(directory, message):
    with pytest.raises(UserError, match=message):
        config = model_config(directory)
        load_params(directory, config, on_one_device(config))


def rewrite(directory, tensors, name="model.safetensors"):
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in tensors.items()}, directory / name)


def test_missing_extra_and_misshaped_tensors_are_listed_before_anything_is_read(hf, monkeypatch):
    directory, tensors = hf
    monkeypatch.setattr(hf_weights, "_read", lambda *_: pytest.fail("read before it was checked"))
    for i in range(3):
        for name in ("gate_proj", "up_proj", "down_proj", "norm_x"):
            tensors.pop(f"model.layers.{i}.mlp.{name}.weight", None)
    tensors.pop("model.norm.weight"), tensors.pop("lm_head.weight")
    tensors["adapter.weight"] = torch.zeros(2)
    tensors["model.embed_tokens.weight"] = torch.zeros(96, 32)
    rewrite(directory, tensors)
    refuse(directory, r"missing \(11\): .*, \.\.\.; extra \(1\): adapter.weight; of another shape \(1\): "
                      r"model.embed_tokens.weight \[96, 32\], not \[96, 64\]")


def test_derived_buffers_are_left_out(hf):
    directory, tensors = hf
    rewrite(directory, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
                                  "model.rotary_emb.inv_freq": torch.zeros(8)})
    config = model_config(directory)
    assert_equal(by_name(load_params(directory, config, on_one_device(config)), config), tensors)


def test_a_head_beside_tied_embeddings_must_be_the_embedding(tmp_path):
    tensors = make_hf(tmp_path, tie_word_embeddings=True)
    table = tensors["model.embed_tokens.weight"]
    rewrite(tmp_path, tensors | {"lm_head.weight": table})
    config = model_config(tmp_path)
    assert "lm_head" not in load_params(tmp_path, config, on_one_device(config))
    changed = table.clone()
    changed[0, 0] += 1
    rewrite(tmp_path, tensors | {"lm_head.weight": changed})
    refuse(tmp_path, "tie_word_embeddings is true, yet lm_head.weight differs from model.embed_tokens.weight")


def test_a_file_cut_short_is_named(hf):
    directory, _ = hf
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 100, 20, 4, 0):
        file.write_bytes(whole[:size])
        refuse(directory, "model.safetensors is corrupt or cut short: .+")


def test_missing_shards_are_named(tmp_path):
    make_hf(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    refuse(tmp_path, f"names files that are not there: {shards[1].name}")


def test_a_broken_index(tmp_path):
    make_hf(tmp_path, max_shard_size="40KB")
    for text in ("{", "{}", "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        refuse(tmp_path, "model.safetensors.index.json is not a safetensors index")


def test_the_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    """Both are there when a model was saved again over an older one: which of them counts must not depend on us."""
    make_hf(tmp_path, max_shard_size="40KB")
    other = tmp_path / "other"
    expected = {k: v + 1 for k, v in make_hf(other).items()}
    rewrite(tmp_path, expected)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    torch.testing.assert_close(loaded["model.norm.weight"], expected["model.norm.weight"])
    config = model_config(tmp_path)
    assert_equal(by_name(load_params(tmp_path, config, on_one_device(config)), config), expected)


def test_weights_that_are_not_safetensors(hf):
    directory, _ = hf
    (directory / "model.safetensors").unlink()
    refuse(directory, "holds no weights: neither model.safetensors nor model.safetensors.index.json")
    (directory / "pytorch_model.bin").touch()
    refuse(directory, r"but pytorch_model.bin .*save_pretrained\('NEW_DIR'\)")


def test_dtypes_we_do_not_know_are_named(hf):
    directory, tensors = hf
    rewrite(directory, tensors | {"model.norm.weight": tensors["model.norm.weight"].double()})
    refuse(directory, "model.norm.weight is F64; weights must be one of F32, F16, BF16")


def test_one_stack_with_two_dtypes_is_refused_unless_cast(hf):
    directory, tensors = hf
    name = "model.layers.1.mlp.up_proj.weight"
    mixed = tensors | {name: tensors[name].bfloat16()}
    rewrite(directory, mixed)
    config = model_config(directory)
    with pytest.raises(UserError, match=r"layers.0.mlp.up_proj.weight .*different dtypes \(bfloat16, float32\)"):
        file_dtypes(directory, config)
    assert_equal(by_name(load_params(directory, config, on_one_device(config)), config), mixed)


# ------------------------------------------------------------------------------------------------------------- writing


def leaves_of(params):
    return jax.tree_util.tree_leaves_with_path(params)


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_written_as_it_was_read(tmp_path, dtype, memory_kind):
    expected = make_hf(tmp_path / "in", dtype, **EVERY_BIAS)
    config = model_config(tmp_path / "in")
    abstract = place(abstract_params(config, jnp.dtype(str(dtype).removeprefix("torch."))), over_both_axes(memory_kind))
    params = load_params(tmp_path / "in", config, abstract)
    count, size = save_params(leaves_of(params), config, tmp_path / "out")
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert (count, size) == (len(expected), sum(v.numel() * v.element_size() for v in expected.values()))
    assert written.keys() == expected.keys()
    assert all(written[k].dtype == v.dtype and torch.equal(written[k], v) for k, v in expected.items())
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_sharded_output_is_named_as_hugging_face_names_it(tmp_path):
    expected = make_hf(tmp_path / "in")
    config = model_config(tmp_path / "in")
    params = load_params(tmp_path / "in", config, on_one_device(config))
    limit = 60_000
    _, size = save_params(leaves_of(params), config, tmp_path / "out", limit)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = [f for f in files if f.endswith(".safetensors")]
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))] and len(shards) > 3
    assert files == sorted([*shards, "model.safetensors.index.json"])  # and no temporary names
    assert index["metadata"]["total_size"] == size and index["weight_map"].keys() == expected.keys()
    for shard in shards:
        tensors = safetensors.torch.load_file(tmp_path / "out" / shard)
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= limit
        assert all(index["weight_map"][name] == shard for name in tensors)
    shutil.copy(tmp_path / "in" / "config.json", tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_weights_that_were_there_before_are_not_taken_for_the_new_ones(tmp_path):
    """Readers take one file before an index; a run that is resumed exports again."""
    make_hf(tmp_path / "in")
    config = model_config(tmp_path / "in")
    params = load_params(tmp_path / "in", config, on_one_device(config))
    out = tmp_path / "out"
    for number, limit in enumerate((2**30, 10**5, 2 * 10**5, 2**30)):
        new = jax.tree.map(lambda x: x + number, params)
        save_params(leaves_of(new), config, out, limit)
        shutil.copy(tmp_path / "in" / "config.json", out)
        files = list(out.glob("*.safetensors"))
        assert (len(files) == 1) == (limit == 2**30) and (out / "model.safetensors.index.json").is_file() == (len(files) > 1)
        for found in (by_name(load_params(out, config, on_one_device(config)), config),
                      LlamaForCausalLM.from_pretrained(out).state_dict()):
            np.testing.assert_array_equal(np.asarray(found["model.norm.weight"]), np.asarray(leaf(new, "norm.scale")))


@pytest.mark.parametrize("limit", [60_000, 2**30], ids=["sharded", "single"])
def test_a_crash_leaves_nothing_that_looks_whole(tmp_path, limit):
    make_hf(tmp_path / "in")
    config = model_config(tmp_path / "in")
    params = load_params(tmp_path / "in", config, on_one_device(config))
    leaves = leaves_of(params)

    def crash_at_the_last():
        yield from leaves[:-1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_params(crash_at_the_last(), config, tmp_path / "out", limit)
    assert not [p for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")]
    shutil.copy(tmp_path / "in" / "config.json", tmp_path / "out")
    refuse(tmp_path / "out", "holds no weights")


# -------------------------------------------------------------------------------------------------------------- memory

LOAD = """
import pathlib, re, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import leaf_names, load_params
from alst_jax.models.block import abstract_params
from alst_jax.models.tree import names

directory, how = pathlib.Path(sys.argv[1]), sys.argv[2]
config = model_config(directory)
mesh = Mesh(np.array(jax.devices()), ("seq",))
place = lambda x: NamedSharding(mesh, P(None, "seq") if x.ndim > 1 else P("seq"))
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)),
                        abstract_params(config, jnp.bfloat16))

def naive():
    whole = {}
    for file in sorted(directory.glob("*.safetensors")):
        whole |= load_file(file)
    def leaf(path, x):
        tensors = [whole[name].T if names(path)[-1] == "kernel" else whole[name] for name in leaf_names(path, config)]
        stacked = np.stack(tensors) if names(path)[0] == "layers" else tensors[0]
        return jax.device_put(stacked.astype(x.dtype), x.sharding)
    return jax.tree_util.tree_map_with_path(leaf, abstract)

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

# What the first load makes once and for all (the backend, lazy imports) is no part of the question.
jax.block_until_ready(load_params(directory, config, {"norm": abstract["norm"]}))
pathlib.Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM is the peak of the loading alone
before = kilobytes("VmRSS")
params = jax.block_until_ready(load_params(directory, config, abstract) if how == "ours" else naive())
size = sum(x.nbytes for x in jax.tree.leaves(params))
shard = max(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
print((kilobytes("VmHWM") - before) * 1024, size, shard)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 400 MB of bfloat16 in files of 50 MB."""
    directory = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | dict(
            vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=14, num_attention_heads=8)))
    model.to(torch.bfloat16).to_empty(device="cpu").save_pretrained(directory, max_shard_size="50MB")
    assert len(list(directory.glob("*.safetensors"))) > 5
    yield directory
    shutil.rmtree(directory)


def peak_of_loading(directory, how):
    """(peak beyond what the loaded parameters themselves take, their bytes, the largest shard's bytes)."""
    process = subprocess.run([sys.executable, "-c", LOAD, str(directory), how], capture_output=True, text=True,
                             cwd=pathlib.Path(__file__).parents[2], timeout=300)
    assert process.returncode == 0, process.stderr
    peak, size, shard = map(int, process.stdout.split())
    return peak - size, size, shard


def test_loading_takes_the_memory_of_about_one_shard(large):
    """The simulated devices' memory is host memory too: what counts is the kernel's peak less the parameters' bytes.

    A part on its way to a device lies in memory twice (numpy's and the device's), and a slice of one layer on top.
    The naive twin, which reads every file and then shards, is measured likewise: the measurement can tell.
    """
    extra, size, shard = peak_of_loading(large, "ours")
    assert size > 350e6 and shard < size / 12
    assert extra < 2 * shard + 30e6, f"{extra / 1e6:.0f} MB beyond {size / 1e6:.0f} MB; one shard is {shard / 1e6:.0f} MB"
    naive, _, _ = peak_of_loading(large, "naive")
    assert naive > 0.7 * size > 3 * extra, f"naive {naive / 1e6:.0f} MB, ours {extra / 1e6:.0f} MB"
