"""Runs of train.py, in this process or in one of their own, and what they need and leave."""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.hardware import environment

ROOT = pathlib.Path(__file__).parents[1]
SHAPE = dict(
    vocab_size=264,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


def make_hf(directory: pathlib.Path, **changes) -> pathlib.Path:
    """A random Llama with the byte tokenizer, as transformers saves them."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(LlamaConfig(**SHAPE | special | changes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_jsonl(file: pathlib.Path, texts: list[str]) -> pathlib.Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def start(*arguments) -> subprocess.Popen:
    """train.py in a process of its own."""
    command = [sys.executable, "train.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    try:
        stdout, stderr = process.communicate(timeout=300)
        return process.returncode, stdout, stderr
    finally:
        process.kill()


def wait_for_steps(out: pathlib.Path, is_running: Callable[[], bool]) -> None:
    """Until the metrics have three lines, or never will."""
    file = out / "metrics.jsonl"
    while is_running() and not (file.exists() and file.read_text().count("\n") >= 3):
        time.sleep(0.005)


def run_here(*arguments) -> int:
    """The exit code of train.main() in this process, on the eight devices it has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "prepare", lambda *_, **__: None)
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            return train.main()
        except SystemExit as stopped:
            return stopped.code


def metrics(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def files(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different
