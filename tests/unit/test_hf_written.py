# pytest tests/unit/test_hf_written.py
"""Weights written as Hugging Face models, and the memory that loading takes."""

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
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from alst_jax.models.block import abstract_params
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_saving import save_params
from alst_jax.models.hf_weights import load_params
from tests.helpers import leaf
from tests.unit.hf_models import EVERY_BIAS, SHAPE, by_name, make_hf, on_one_device, over_both_axes, place, refuse


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
    assert (
        shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))] and len(shards) > 3
    )
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
        assert (len(files) == 1) == (limit == 2**30) and (out / "model.safetensors.index.json").is_file() == (
            len(files) > 1
        )
        for found in (
            by_name(load_params(out, config, on_one_device(config)), config),
            LlamaForCausalLM.from_pretrained(out).state_dict(),
        ):
            np.testing.assert_array_equal(np.asarray(found["model.norm.weight"]), np.asarray(leaf(new, "norm.scale")))


@pytest.mark.parametrize("limit", [60_000, 2**30], ids=["sharded", "single"])
def test_a_crash_leaves_nothing_that_looks_whole(tmp_path, limit):
    make_hf(tmp_path / "in")
    config = model_config(tmp_path / "in")
    params = load_params(tmp_path / "in", config, on_one_device(config))
    *leaves, (path, last) = leaves_of(params)

    class Crash:
        shape, dtype = last.shape, last.dtype

        def __getitem__(self, _):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_params([*leaves, (path, Crash())], config, tmp_path / "out", limit)
    assert list((tmp_path / "out").glob(".part-*"))
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
        model = LlamaForCausalLM(
            LlamaConfig(
                **SHAPE
                | dict(
                    vocab_size=8192,
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=14,
                    num_attention_heads=8,
                )
            )
        )
    model.to(torch.bfloat16).to_empty(device="cpu").save_pretrained(directory, max_shard_size="50MB")
    assert len(list(directory.glob("*.safetensors"))) > 5
    yield directory
    shutil.rmtree(directory)


def peak_of_loading(directory, how):
    """(peak beyond what the loaded parameters themselves take, their bytes, the largest shard's bytes)."""
    process = subprocess.run(
        [sys.executable, "-c", LOAD, str(directory), how],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
        timeout=300,
    )
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
    assert extra < 2 * shard + 30e6, (
        f"{extra / 1e6:.0f} MB beyond {size / 1e6:.0f} MB; one shard is {shard / 1e6:.0f} MB"
    )
    naive, _, _ = peak_of_loading(large, "naive")
    assert naive > 0.7 * size > 3 * extra, f"naive {naive / 1e6:.0f} MB, ours {extra / 1e6:.0f} MB"
