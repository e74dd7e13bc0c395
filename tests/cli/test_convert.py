# python -m pytest tests/cli/test_convert.py
"""convert.from_hf and convert.to_hf: there and back bit for bit; what is refused leaves nothing behind."""

import itertools
import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alst_jax.config import UserError
from alst_jax.data.tokenizer import byte_tokenizer
from convert.from_hf import from_hf
from convert.to_hf import to_hf

ROOT = pathlib.Path(__file__).parents[2]
SHAPE = dict(
    vocab_size=264,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SPECIAL = [-0.0, float("inf"), float("nan"), 1e-40, 6e-8]  # the last two: subnormal in bfloat16 and float32, in float16


def make_hf(directory: pathlib.Path, dtype=torch.float32, max_shard_size="5GB", **changes) -> pathlib.Path:
    """A random Llama with values that a detour through another dtype would change, and a tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
            parameter.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(directory)
    return directory


def tensors(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in directory.glob("*.safetensors")
        for name, value in safetensors.torch.load_file(file).items()
    }


def other_files(directory: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if "safetensors" not in p.name}


def assert_the_same_model(a: pathlib.Path, b: pathlib.Path) -> None:
    before, after = tensors(a), tensors(b)
    assert before and before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        bits = INTEGERS[value.dtype]
        assert torch.equal(after[name].view(bits), value.view(bits)), name
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= other_files(a).keys()
    assert other_files(b) == other_files(a)


@pytest.fixture
def hf(tmp_path):
    return make_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    "dtype, shard_size, tied",
    [
        pytest.param(dtype, size, tied, id=f"{name}-{kind}-{'tied' if tied else 'untied'}")
        for (name, dtype), (kind, size), tied in itertools.product(
            DTYPES.items(), {"single": "5GB", "sharded": "60KB"}.items(), (False, True)
        )
    ],
)
def test_there_and_back_bit_for_bit(tmp_path, dtype, shard_size, tied):
    source = make_hf(tmp_path / "hf", dtype, shard_size, tie_word_embeddings=tied)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard_size != "5GB")
    assert {value.dtype for value in tensors(source).values()} == {dtype}
    assert ("lm_head.weight" in tensors(source)) == (not tied)
    size = sum(value.nbytes for value in tensors(source).values())
    assert from_hf(source, tmp_path / "checkpoint") == (len(tensors(source)), size)
    assert to_hf(tmp_path / "checkpoint", tmp_path / "back") == (len(tensors(source)), size)
    assert_the_same_model(source, tmp_path / "back")


def test_each_weight_keeps_its_own_dtype_and_biases_are_kept(tmp_path):
    source = make_hf(tmp_path / "hf", torch.bfloat16, attention_bias=True, mlp_bias=True)
    mixed = {name: value.float() if "norm" in name else value for name, value in tensors(source).items()}
    safetensors.torch.save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    from_hf(source, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_the_same_model(source, tmp_path / "back")


def test_the_command_lines(hf, tmp_path, monkeypatch, capsys):
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    size = sum(value.nbytes for value in tensors(hf).values()) / 1e9
    for arguments in (["convert.from_hf", hf, checkpoint], ["convert.to_hf", checkpoint, back]):
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        monkeypatch.delitem(sys.modules, arguments[0])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(arguments[0], run_name="__main__")
        assert not stopped.value.code
        assert f"{len(tensors(hf))} tensors, {size:.3f} GB in " in capsys.readouterr().out
    assert_the_same_model(hf, back)


def test_the_command_line_refuses_with_exit_code_2(hf, tmp_path):
    spoil(hf, drop="model.norm.weight")
    command = [sys.executable, "-m", "convert.from_hf", str(hf), str(tmp_path / "checkpoint")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: {hf}: the weights are not those config.json describes. missing (1): model.norm.weight"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def spoil(directory: pathlib.Path, drop: str | None = None, **changed: torch.Tensor) -> None:
    """Leave a tensor out of the weights, or put others in."""
    file = directory / "model.safetensors"
    kept = {name: value for name, value in safetensors.torch.load_file(file).items() if name != drop}
    safetensors.torch.save_file(kept | changed, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(drop="model.layers.1.mlp.up_proj.weight"), r"missing \(1\): model.layers.1.mlp.up_proj.weight"),
        ({"model.layers.3.mlp.up_proj.weight": torch.zeros(80, 64)}, r"extra \(1\): model.layers.3.mlp.up_proj.weight"),
        (
            {"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 80)},
            r"of another shape \(1\): model.layers.2.mlp.up_proj.weight \[64, 80\], not \[80, 64\]",
        ),
    ],
    ids=["missing", "extra", "mis-shaped"],
)
def test_weights_that_are_not_the_models_are_refused(hf, tmp_path, change, message):
    spoil(hf, **change)
    with pytest.raises(UserError, match=message):
        from_hf(hf, tmp_path / "checkpoint")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_target_that_exists_is_kept(hf, tmp_path):
    from_hf(hf, tmp_path / "checkpoint")
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    for convert, source in ((from_hf, hf), (to_hf, tmp_path / "checkpoint")):
        with pytest.raises(UserError, match=f"{target} exists and is not empty"):
            convert(source, target)
        assert {p.name: p.read_text() for p in target.iterdir()} == {"thesis.tex": "years of work"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "hf", "target"]


def test_sources_that_are_no_checkpoint_are_refused(hf, tmp_path):
    from_hf(hf, tmp_path / "checkpoint")
    before = sorted(p.name for p in tmp_path.iterdir())
    for source, message in (
        (hf, "no checkpoint there"),
        (tmp_path / "nowhere", "no checkpoint there"),
        (tmp_path / "checkpoint" / "checkpoints" / "7", "no such step; there are 0"),
    ):
        with pytest.raises(UserError, match=message):
            to_hf(source, tmp_path / "back")
    shutil.rmtree(tmp_path / "checkpoint" / "checkpoints" / "0" / "params")
    with pytest.raises(UserError, match="cannot be read"):
        to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
