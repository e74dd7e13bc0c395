# pytest tests/unit/test_checkpoint_files.py
"""Checkpoints as others save them: other names for the same tensors are taken; other kinds of files are named."""

import dataclasses
import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from jax.sharding import SingleDeviceSharding
from transformers import LlamaConfig, LlamaForCausalLM

from alst_jax.config import UserError
from alst_jax.data import tokenizer
from alst_jax.data.tokenizer import byte_tokenizer, load_tokenizer
from alst_jax.models import weight_files
from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import load_params
from alst_jax.models.weight_files import find_tensors
from tests.helpers import leaves

SHAPE = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
QUERY = "model.layers.0.self_attn.q_proj"


def make_model(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes))


def save(directory: pathlib.Path, tensors: dict[str, torch.Tensor], config: LlamaConfig) -> None:
    """One file of these tensors, none of them shared, beside the config."""
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    copies = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(copies, directory / "model.safetensors")


def loaded(directory: pathlib.Path, config: ModelConfig | None = None, **options) -> dict[str, np.ndarray]:
    config = config or model_config(directory)
    place = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract_params(config, jnp.float32)
    )
    return {name: np.asarray(x) for name, x in leaves(load_params(directory, config, abstract, **options)).items()}


@pytest.fixture
def untied(tmp_path):
    """(directory, state dict, config, the parameters of the model as transformers saves it)."""
    return made(tmp_path)


def made(directory, **changes):
    model = make_model(**changes)
    model.save_pretrained(directory / "plain")
    other = directory / "other"
    other.mkdir()
    return other, model.state_dict(), model.config, loaded(directory / "plain")


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() and len(a) > 10
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


# ------------------------------------------------------------------------------------------------ other names are taken


def test_a_tied_model_whose_file_holds_only_the_head(tmp_path):
    """As safetensors' save_model writes it: of two names of one tensor it keeps the first in the alphabet."""
    other, tensors, config, plain = made(tmp_path, tie_word_embeddings=True)
    save(other, {}, config)
    safetensors.torch.save_model(make_model(tie_word_embeddings=True), other / "model.safetensors")
    assert "lm_head.weight" in find_tensors(other) and "model.embed_tokens.weight" not in find_tensors(other)
    assert_same(plain, loaded(other))


def test_a_model_saved_without_its_head_has_no_prefix(tmp_path):
    other, tensors, config, plain = made(tmp_path, tie_word_embeddings=True)
    bare = {name.removeprefix("model."): value for name, value in tensors.items() if name != "lm_head.weight"}
    assert "layers.0.mlp.up_proj.weight" in bare and not any(name.startswith("model.") for name in bare)
    save(other, bare, config)
    assert_same(plain, loaded(other))


def test_without_a_head_an_untied_model_is_refused_with_the_reason(untied):
    other, tensors, config, _ = untied
    save(other, {name.removeprefix("model."): x for name, x in tensors.items() if name != "lm_head.weight"}, config)
    with pytest.raises(
        UserError,
        match=r"missing \(1\): lm_head.weight; a model saved without its head has none to train.*"
        r"\"tie_word_embeddings\": true",
    ):
        loaded(other)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_the_prefixes_of_torchs_wrappers(untied, wrapper):
    other, tensors, config, plain = untied
    save(other, {wrapper + name: value for name, value in tensors.items()}, config)
    assert_same(plain, loaded(other))


def test_rotary_buffers_and_scales_of_a_cache_are_left_out(untied, capsys):
    other, tensors, config, plain = untied
    rotary = {
        f"model.layers.{i}.self_attn.rotary_emb.{name}": torch.ones(4)
        for i in range(2)
        for name in ("inv_freq", "cos_cached", "sin_cached")
    }
    save(other, tensors | rotary, config)
    assert_same(plain, loaded(other))
    assert capsys.readouterr().err == ""
    save(
        other,
        tensors | rotary | {f"model.layers.{i}.self_attn.k_proj.k_scale": torch.ones(1) for i in range(2)},
        config,
    )
    assert_same(plain, loaded(other))
    assert "warning: " in (said := capsys.readouterr().err) and "2 scales of a KV cache are left out" in said


# ------------------------------------------------------------------------------------------------ other kinds are named


@pytest.mark.parametrize(
    "extra, message",
    [
        (
            {f"{QUERY}.weight_scale": torch.ones(1)},
            r"1 tensors \(model.layers.0.self_attn.q_proj.weight_scale\) are those of "
            "quantised weights; use the original model",
        ),
        (
            {f"{QUERY}.qweight": torch.zeros(2, 2, dtype=torch.int32)},
            r"qweight is I32; weights must be one of F32, F16, BF16. "
            "Quantised models cannot be trained",
        ),
        ({f"{QUERY}.weight.absmax": torch.ones(4)}, "of quantised weights"),
        ({f"{QUERY}.lora_A.default.weight": torch.ones(4, 16)}, "are those of an adapter; merge it first"),
    ],
    ids=["fp8", "gptq", "bitsandbytes", "lora"],
)
def test_quantised_weights_and_adapters_are_named(untied, extra, message):
    other, tensors, config, _ = untied
    save(other, tensors | extra, config)
    with pytest.raises(UserError, match=message):
        loaded(other)


@pytest.mark.parametrize("whole", [False, True], ids=["adapter-alone", "beside-a-model"])
def test_a_directory_of_an_adapter_is_named(untied, whole):
    other, tensors, config, _ = untied
    if whole:
        save(other, tensors, config)
    (other / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}))
    (other / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="adapter_config.json: it is an adapter of org/base, .*Merge the two first"):
        loaded(other)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(untied, tmp_path):
    other, tensors, config, plain = untied
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(other)
    torch.save(tensors, other / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin .pickled files, which can execute code.") as refused:
        loaded(other)
    program, option, code = shlex.split(re.search(r"python -c \".*\"", str(refused.value))[0])
    assert (program, option) == ("python", "-c")
    exec(code.replace("NEW_DIR", str(tmp_path / "converted")))
    assert_same(plain, loaded(tmp_path / "converted"))


@pytest.mark.parametrize(
    "file, message",
    [
        ("model-Q4_K_M.gguf", "GGUF files.*gguf_file='model-Q4_K_M.gguf'"),
        ("consolidated.00.pth", "not in Hugging Face's format.*download the Hugging Face version"),
        ("weights.safetensors", "files without an index.*give the only file the name model.safetensors"),
    ],
)
def test_other_files_are_named(untied, file, message):
    other, _, config, _ = untied
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(other)
    (other / file).touch()
    with pytest.raises(
        UserError, match=f"neither model.safetensors nor model.safetensors.index.json, but {file} .*{message}"
    ):
        loaded(other)


def test_a_pointer_of_git_lfs_is_named(untied):
    other, tensors, config, _ = untied
    save(other, tensors, config)
    (other / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="model.safetensors is a pointer of Git LFS.*git lfs pull"):
        loaded(other)


def sharded(directory: pathlib.Path, files: dict[str, list[str]]) -> None:
    model = make_model()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(directory)
    for file, names in files.items():
        safetensors.torch.save_file({name: torch.ones(2) for name in names}, directory / pathlib.PurePath(file).name)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_tensor_in_two_files_is_refused(tmp_path):
    sharded(tmp_path, {"a.safetensors": ["model.norm.weight", "x"], "b.safetensors": ["model.norm.weight"]})
    with pytest.raises(UserError, match="model.norm.weight is in .*a.safetensors and in .*b.safetensors"):
        find_tensors(tmp_path)


def test_an_index_that_leaves_its_directory_is_refused(tmp_path):
    sharded(tmp_path, {"../a.safetensors": ["model.norm.weight"]})
    with pytest.raises(UserError, match="names files outside of its directory: ../a.safetensors"):
        find_tensors(tmp_path)


# -------------------------------------------------------------------------------------------------- tokenizers, added rows


@pytest.mark.parametrize(
    "content, package", [(b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")]
)
def test_the_package_that_reads_tokenizer_model_is_named(tmp_path, monkeypatch, content, package):
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(
        UserError, match=f"only tokenizer is tokenizer.model, which the package {package} reads; install {package}"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("value", ["", {"content": "", "lstrip": False}], ids=["text", "object"])
def test_an_empty_end_token_is_refused(tmp_path, file, value):
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_token == "<|eos|>"
    before = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(before | {"eos_token": value}))
    with pytest.raises(UserError, match=f'{file}: eos_token is "", which is no token.*eos_token is "</s>"'):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("at_once", [2**26, 100], ids=["whole", "some-rows"])
def test_added_rows_are_the_mean_of_the_old(untied, monkeypatch, at_once):
    monkeypatch.setattr(weight_files, "AT_ONCE", at_once)
    other, tensors, config, plain = untied
    save(other, tensors, config)
    larger = dataclasses.replace(model_config(other), vocab_size=SHAPE["vocab_size"] + 3)
    with pytest.raises(UserError, match=r"model.embed_tokens.weight \[40, 16\], not \[43, 16\]"):
        loaded(other, larger)
    params = loaded(other, larger, resize=True)
    for name in ("embed_tokens.embedding", "lm_head.embedding"):
        np.testing.assert_array_equal(params[name][:40], plain[name])
        np.testing.assert_allclose(params[name][40:], np.tile(plain[name].mean(0), (3, 1)), atol=1e-8)
        assert np.abs(plain[name].mean(0)).max() > 1e-4


def test_added_rows_in_parts(tmp_path):
    """As devices read them: rows and columns, of old rows, of new ones, across their border."""
    table = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    safetensors.numpy.save_file({"lm_head.weight": table}, tmp_path / "model.safetensors")
    tensor = weight_files.extended(find_tensors(tmp_path), 6, 9)["lm_head.weight"]
    whole = np.concatenate([table, np.tile(table.mean(0), (3, 1))])
    for rows in (slice(0, 3), slice(5, 8), slice(6, 7), slice(8, 9), slice(None)):
        for columns in (slice(None), slice(1, 3)):
            np.testing.assert_allclose(
                weight_files.read_tensor(tensor, (rows, columns)), whole[rows, columns], atol=1e-7
            )
