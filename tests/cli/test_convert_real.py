# python -m pytest tests/cli/test_convert_real.py
"""Conversions at real size: memory, shards, interruptions, --verify; models whose tokenizer has added tokens."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.test_convert import SHAPE, make_hf
from tests.cli.test_train_cli import run_here, write_jsonl

SMALL = 256  # rows for the bytes alone; the tokenizer has five special tokens more


def test_resize_vocabulary(tmp_path, capsys):
    model = make_hf(tmp_path / "hf", vocab_size=SMALL, initializer_range=0.1)
    old = {name: np.nan_to_num(x, posinf=0) for name, x in load_file(model / "model.safetensors").items()}
    save_file(old, model / "model.safetensors", metadata={"format": "pt"})
    data = write_jsonl(tmp_path / "data.jsonl", ["some text to learn " * 9])
    flags = ("--model", model, "--data", data, "--seq-len", 64, "--sp", 2, "--dp", 1, "--steps", 1, "--learning-rate", 1e-30,
             "--weight-decay", 0)
    assert run_here(*flags, "--out", tmp_path / "refused") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "outside the model's vocabulary of 256" in error and "--resize-vocabulary gives the model rows" in error
    out = tmp_path / "run"
    assert run_here(*flags, "--resize-vocabulary", "--out", out) == 0
    assert json.loads((out / "hf" / "config.json").read_text())["vocab_size"] == 261
    new = load_file(out / "hf" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert new[name].shape == (261, SHAPE["hidden_size"])
        np.testing.assert_allclose(new[name], np.concatenate([old[name], np.tile(old[name].mean(0), (5, 1))]), atol=1e-6)
    assert run_here("--resume", "--out", out, "--steps", 2) == 0
    assert run_here("--model", out, *flags[2:], "--out", tmp_path / "next") == 0  # the run has the new size


def test_resize_vocabulary_needs_a_model(capsys):
    assert run_here("--resize-vocabulary") == 2
    assert "name the model with --model" in capsys.readouterr().err
