# pytest tests/cli/test_lora_cli.py
"""train.py with adapters: resumed bit for bit beside the base model, with dropout, exported for PEFT, merged; and what
is refused."""

import json
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from convert.merge import merge_adapter
from convert.to_hf import to_hf
from tests.runs import make_hf, run_here, write_jsonl

ADAPTER, WEIGHTS = "adapter", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_hf(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def flags(base, tmp_path_factory):
    texts = [" ".join(f"{i} x {n} is {i * n}." for n in range(4 + 3 * i)) for i in range(1, 8)]
    data = write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", texts)
    return (
        "--model",
        base,
        "--data",
        data,
        "--seq-len",
        128,
        "--dp",
        1,
        "--sp",
        2,
        "--schedule",
        "constant",
        "--learning-rate",
        1e-2,
        "--warmup-steps",
        0,
        "--lora-rank",
        3,
        "--lora-targets",
        "q_proj,down_proj",
        "--lora-dropout",
        0.25,
        "--freeze",
        "proj|embed_tokens|lm_head|layernorm",
    )


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """A run of three steps, its adapter merged."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run_here(*flags, "--steps", 3, "--save-every", 2, "--merge-adapter", "--out", out) == 0
    return out


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 83)[None]).logits


def other_model(directory):
    """A model of the shapes of `base` with other weights."""
    model = AutoModelForCausalLM.from_pretrained(make_hf(directory))
    for parameter in model.parameters():
        parameter.data += 1e-3
    model.save_pretrained(directory)
    return directory


def test_the_exports_compute_the_same(trained, base, tmp_path):
    """PEFT on the adapter, transformers on the merged model, and on that of the converter; another model than before."""
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(trained / ADAPTER)
    want = logits(adapted)
    assert adapted.peft_config["default"].lora_dropout == 0.25
    assert {name for name, _ in adapted.named_parameters() if "modules_to_save" in name} == {
        "base_model.model.model.norm.modules_to_save.default.weight"
    }
    merge_adapter(trained / ADAPTER, base, tmp_path / "merged")
    for merged in (trained / "hf", tmp_path / "merged"):
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), want, rtol=1e-4, atol=1e-5)
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - want).abs().max() > 0.03
    a, b = (load_file(directory / "model.safetensors") for directory in (trained / "hf", tmp_path / "merged"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_holds_no_frozen_weight_and_a_resumed_run_is_bit_identical(trained, flags, base, tmp_path, capsys):
    stored = json.loads((trained / "checkpoints/2/params/_METADATA").read_text())
    keys = {name.split("'")[-2] for name in stored["tree_metadata"]}
    assert keys == {"lora_A", "lora_B", "scale"}
    moved, again = tmp_path / "moved", tmp_path / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoints/3")
    shutil.copytree(base, moved)
    assert run_here("--resume", "--out", again, "--model", moved) == 0
    assert (again / ADAPTER / WEIGHTS).read_bytes() == (trained / ADAPTER / WEIGHTS).read_bytes()
    assert (again / "hf/model.safetensors").read_bytes() == (trained / "hf/model.safetensors").read_bytes()
    shutil.rmtree(again / "checkpoints/3")
    other = other_model(tmp_path / "other")
    capsys.readouterr()
    assert run_here("--resume", "--out", again, "--model", other) == 2
    assert "is not the base model that the adapters were trained beside" in capsys.readouterr().err


def test_an_adapter_goes_on(trained, flags, tmp_path, capsys):
    """Its rank and targets are its own; at a learning rate of almost nothing it stays as it is."""
    start = [
        word
        for pair in zip(flags[::2], flags[1::2])
        for word in pair
        if not str(pair[0]).startswith(("--lora", "--learning"))
    ]
    out = tmp_path / "on"
    assert run_here(*start, "--learning-rate", 1e-30, "--steps", 1, "--adapter", trained / ADAPTER, "--out", out) == 0
    assert (out / ADAPTER / WEIGHTS).read_bytes() == (trained / ADAPTER / WEIGHTS).read_bytes()
    capsys.readouterr()
    for words, message in [
        (("--lora-rank", 4), "--lora-rank 4: the adapter in .* has 3; leave --lora-rank out"),
        (("--model", other_model(tmp_path / "other")), "trained beside .*base, and the weights of --model .*other"),
        (("--rope-theta", 5e4), "trained with the model's own positions, and this run has --rope-theta 50000.0;"),
        (("--freeze", "."), "is of another base model than --model, or trains other modules: model.norm.weight is"),
    ]:
        assert run_here(*start, *words, "--steps", 1, "--adapter", trained / ADAPTER, "--out", tmp_path / "x") == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--lora-rank", 0), "--lora-rank 0: must be at least 1"),
        (
            ("--lora-targets", "q_proj,wq"),
            "--lora-targets q_proj,wq: 'wq' matches no linear layer; use all, or some of q_proj,",
        ),
        (("--lora-targets", ""), "matches no linear layer"),
        (("--lora-dropout", 1), "--lora-dropout 1.0: must be at least 0 and below 1"),
        (("--lora-dropout", -0.1), "--lora-dropout -0.1: must be at least 0 and below 1"),
        (("--lora-alpha", 0), "--lora-alpha 0.0: must be a positive number"),
        (("--freeze", "embed_tokens"), "with adapters: layers.mlp.down_proj has an adapter or is trained in part"),
        (("--resize-vocabulary",), "--resize-vocabulary with adapters"),
        (("--check-numerics",), "--check-numerics compares the layers without adapters"),
        (("--adapter", "nowhere"), "--adapter nowhere: no adapter_config.json there"),
    ],
)
def test_bad_input(flags, tmp_path, capsys, words, message):
    assert run_here(*flags, "--steps", 1, "--out", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_flags_of_adapters_without_adapters(flags, capsys):
    assert run_here("--rslora") == 2
    assert "--rslora is about adapters, and the run has none; add --lora-rank or --adapter" in capsys.readouterr().err


def test_neither_an_adapter_nor_its_run_is_a_model(trained, flags, tmp_path, capsys):
    plain = flags[2:12]
    for model, message in [
        (trained / ADAPTER, "it is an adapter of .*, not a whole model. To train it further, name the base"),
        (trained, "is a run with adapters: its checkpoints do not hold the base model, .*base. Go on with --resume"),
    ]:
        assert run_here("--model", model, *plain, "--steps", 1, "--out", tmp_path / "out") == 2
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(Exception, match="is a run with adapters"):
        to_hf(trained, tmp_path / "hf")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("use_dora", True, "not implemented: use_dora=True"),
        ("peft_type", "LOHA", "peft_type='LOHA'"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern="),
        ("init_lora_weights", "pissa", "changes the base model too"),
        ("bias", "all", "bias='all'"),
        ("r", 5, "adapter_config.json says r=5, and .* have the ranks"),
        ("lora_alpha", "x", "lora_alpha='x' is no value"),
    ],
)
def test_adapters_that_are_not_implemented_are_refused(trained, base, tmp_path, field, value, message):
    changed = tmp_path / "changed"
    shutil.copytree(trained / ADAPTER, changed)
    file = changed / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(Exception, match=message):
        merge_adapter(changed, base, tmp_path / "merged")
