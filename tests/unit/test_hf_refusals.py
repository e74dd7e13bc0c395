# pytest tests/unit/test_hf_refusals.py
"""Weights of Hugging Face models that are refused before anything is read."""

import pytest
import safetensors.torch
import torch
from transformers import LlamaForCausalLM

from alst_jax.config import UserError
from alst_jax.models import hf_weights
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import file_dtypes, load_params
from tests.unit.hf_models import assert_equal, by_name, make_hf, on_one_device, refuse


@pytest.fixture
def hf(tmp_path):
    """(directory, tensors) of a saved model whose single file can be rewritten with other tensors."""
    return tmp_path, make_hf(tmp_path)


def rewrite(directory, tensors, name="model.safetensors"):
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in tensors.items()}, directory / name)


def test_missing_extra_and_misshaped_tensors_are_listed_before_anything_is_read(hf, monkeypatch):
    directory, tensors = hf
    monkeypatch.setattr(hf_weights, "read_tensor", lambda *_: pytest.fail("read before it was checked"))
    for i in range(3):
        for name in ("gate_proj", "up_proj", "down_proj", "norm_x"):
            tensors.pop(f"model.layers.{i}.mlp.{name}.weight", None)
    tensors.pop("model.norm.weight"), tensors.pop("lm_head.weight")
    tensors["adapter.weight"] = torch.zeros(2)
    tensors["model.embed_tokens.weight"] = torch.zeros(96, 32)
    rewrite(directory, tensors)
    refuse(
        directory,
        r"missing \(11\): .*, \.\.\.; extra \(1\): adapter.weight; of another shape \(1\): "
        r"model.embed_tokens.weight \[96, 32\], not \[96, 64\]",
    )


def test_derived_buffers_are_left_out(hf):
    directory, tensors = hf
    rewrite(
        directory,
        tensors
        | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "model.rotary_emb.inv_freq": torch.zeros(8)},
    )
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
    one = torch.zeros(())  # a tensor without a dimension
    rewrite(tmp_path, tensors | {"lm_head.weight": one})
    refuse(tmp_path, "tie_word_embeddings is true, yet lm_head.weight differs from model.embed_tokens.weight")
    rewrite(tmp_path, tensors | {"lm_head.weight": one, "model.embed_tokens.weight": one})
    refuse(tmp_path, r"of another shape \(1\): model.embed_tokens.weight \[\], not \[96, 64\]")


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
