# python -m pytest tests/cli/test_convert_real.py
"""Conversions at real size: memory, shards, interruptions, --verify; models whose tokenizer has added tokens."""

import json
import threading
import time
from concurrent.futures import CancelledError

import jax
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from alst_jax.config import UserError
from alst_jax.models import hf_saving
from alst_jax.models.block import abstract_params
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import load_params
from alst_jax.storage.checkpoint import Checkpoints
from convert import cli, logits
from convert import from_hf as from_hf_module
from convert import to_hf as to_hf_module
from convert.from_hf import from_hf
from convert.to_hf import parse_size, to_hf
from tests.cli.test_convert import SHAPE, assert_the_same_model, make_hf
from tests.runs import run_here, write_jsonl

SMALL = 256  # rows for the bytes alone; the tokenizer has five special tokens more


@pytest.mark.parametrize("goes_on", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "and goes on"])
def test_resize_vocabulary(goes_on, tmp_path, capsys):
    model = make_hf(tmp_path / "hf", vocab_size=SMALL, initializer_range=0.1)
    old = {name: np.nan_to_num(x, posinf=0) for name, x in load_file(model / "model.safetensors").items()}
    save_file(old, model / "model.safetensors", metadata={"format": "pt"})
    data = write_jsonl(tmp_path / "data.jsonl", ["some text to learn " * 9])
    flags = (
        "--model",
        model,
        "--data",
        data,
        "--seq-len",
        64,
        "--sp",
        2,
        "--dp",
        1,
        "--steps",
        1,
        "--learning-rate",
        1e-30,
        "--weight-decay",
        0,
    )
    assert run_here(*flags, "--out", tmp_path / "refused") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "outside the model's vocabulary of 256" in error and "--resize-vocabulary gives the model rows" in error
    out = tmp_path / "run"
    assert run_here(*flags, "--resize-vocabulary", "--out", out) == 0
    assert json.loads((out / "hf" / "config.json").read_text())["vocab_size"] == 261
    new = load_file(out / "hf" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert new[name].shape == (261, SHAPE["hidden_size"])
        np.testing.assert_allclose(
            new[name], np.concatenate([old[name], np.tile(old[name].mean(0), (5, 1))]), atol=1e-6
        )
    if goes_on:
        assert run_here("--resume", "--out", out, "--steps", 2) == 0
        assert run_here("--model", out, *flags[2:], "--out", tmp_path / "next") == 0  # the run has the new size


def test_resize_vocabulary_needs_a_model(capsys):
    assert run_here("--resize-vocabulary") == 2
    assert "name the model with --model" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- conversions


@pytest.fixture
def hf(tmp_path):
    return make_hf(tmp_path / "hf")


def finite(directory):
    """A model whose logits are numbers."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.1)).save_pretrained(directory)
    return directory


def test_shard_size(hf, tmp_path):
    from_hf(hf, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "back", shard_size="60KB")
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    largest = 264 * 64 * 4  # the embedding: alone in its file
    assert len(files) > 3 and all(len(load_file(f)) == 1 or f.stat().st_size < 62_000 for f in files)
    assert max(f.stat().st_size for f in files) < largest + 1000
    assert_the_same_model(hf, tmp_path / "back")


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5K", 1500), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5GB", "5 apples", "nan", "GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match=f"--shard-size {text}: write a size above zero as 500MB, 5GB or 2GiB"):
        parse_size(text)


def test_a_layer_of_a_stack_is_read_at_a_time(hf, tmp_path, monkeypatch):
    """Peak memory follows from the largest tensor of the files, not from the model: no whole stack is ever read."""
    layer = 64 * 80 * 4  # bytes of the largest layer of a stack
    monkeypatch.setattr("alst_jax.storage.orbax_limits.AT_ONCE", layer)
    read, lock, original = [], threading.Lock(), from_hf_module.file_part

    def counted(*arguments):
        part = original(*arguments)
        with lock:
            read.append(part.nbytes)
        return part

    monkeypatch.setattr(from_hf_module, "file_part", counted)
    from_hf(hf, tmp_path / "checkpoint")
    assert sum(size > layer for size in read) == 2  # the tables: a part of a table is one chunk at least
    assert sum(read) == sum(x.nbytes for x in load_file(hf / "model.safetensors").values())
    monkeypatch.setattr(Checkpoints, "read_params", lambda *_: pytest.fail("reads whole stacks"))
    fetched, fetch = [], hf_saving.fetch
    monkeypatch.setattr(hf_saving, "fetch", lambda *args: fetched.append(fetch(*args)) or fetched[-1])
    to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert max(x.nbytes for x in fetched) == 264 * 64 * 4  # a table
    assert_the_same_model(hf, tmp_path / "back")


def test_conversions_are_not_compressed(hf, tmp_path):
    from_hf(hf, tmp_path / "checkpoint")
    arrays = Checkpoints(tmp_path / "checkpoint").arrays(0, "params").values()
    assert [array.spec().to_json()["metadata"]["compressor"] for array in arrays] == [None] * len(arrays)


def test_a_conversion_is_read_like_any_checkpoint(hf, tmp_path):
    """Matrices are stored as the files have them, which is the transpose of ours."""
    from_hf(hf, tmp_path / "checkpoint")
    checkpoints, config = Checkpoints(tmp_path / "checkpoint"), model_config(hf)
    for name, array in checkpoints.arrays(0, "params").items():
        assert array.spec().to_json()["metadata"]["order"] == ("F" if name[-1] == "kernel" else "C")
    mesh = jax.make_mesh((4,), ("x",))
    for dim in (0, 1):  # of each leaf, after the layers
        spec = lambda x, dim=dim: P(*[None] * (x.ndim - 2 + dim), "x") if x.ndim > 2 else P()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=NamedSharding(mesh, spec(x))),
            abstract_params(config, np.float32),
        )
        restored, expected = checkpoints.restore_params(0, abstract), load_params(hf, config, abstract)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32)), restored, expected)


@pytest.mark.parametrize("which", ["from_hf", "to_hf"])
def test_a_damaged_source_leaves_nothing(hf, tmp_path, which):
    from_hf(hf, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "back")
    source = {"from_hf": tmp_path / "back", "to_hf": tmp_path / "checkpoint"}[which]
    files = [file for file in source.rglob("*") if file.suffix == ".safetensors" or file.parent.name == "d"]
    file = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"{file.name} has other content than was written"):
        {"from_hf": from_hf, "to_hf": to_hf}[which](source, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_list_of_arrays_is_called_damaged(hf, tmp_path):
    """Not the weights of another model."""
    from_hf(hf, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "checkpoints" / "0" / "params" / "_METADATA"
    file.write_text(file.read_text().replace("q_proj", "Q_proj"))
    with pytest.raises(UserError, match="params/_METADATA has other content than was written"):
        to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_progress_bar_counts_every_byte(hf, tmp_path, monkeypatch):
    bars = []
    original = cli.Progress.__init__
    monkeypatch.setattr(
        cli.Progress, "__init__", lambda self, *args: original(self, *args) or bars.append((self, args[1]))
    )
    size = sum(x.nbytes for x in load_file(hf / "model.safetensors").values())
    from_hf(hf, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert [(bar.done, total) for bar, total in bars] == [(size, size)] * 2


STAGES = {
    "from_hf": (from_hf_module, ["copy_model_files", "file_part", "write_run_file"]),
    "to_hf": (to_hf_module, ["copy_model_files", "save_params", "read_run_file"]),
}


@pytest.mark.parametrize("which, stage", [(which, stage) for which, (_, stages) in STAGES.items() for stage in stages])
@pytest.mark.parametrize("killed", [False, True], ids=["interrupted", "killed"])
def test_an_interrupted_conversion_leaves_nothing_that_looks_finished(hf, tmp_path, monkeypatch, which, stage, killed):
    module, convert = STAGES[which][0], {"from_hf": from_hf, "to_hf": to_hf}[which]
    source, target = hf, tmp_path / "target"
    if which == "to_hf":
        source = tmp_path / "checkpoint"
        from_hf(hf, source)
    before = sorted(p.name for p in tmp_path.iterdir())

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, stop)
        if killed:  # SIGKILL: no cleaning up
            patch.setattr(cli.Unfinished, "__exit__", lambda *_: None)
        with pytest.raises((KeyboardInterrupt, UserError)):
            convert(source, target)
    assert not target.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before + [".target.unfinished"] * killed)
    convert(source, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "target"])


def test_no_write_starts_after_a_conversion_has_stopped():
    """A late write would make the removed directory again. A write in flight is waited for."""
    writing, order = from_hf_module.Writing(), []

    def slow():
        with writing.permit():
            started.set()
            time.sleep(0.2)
            order.append("written")

    started, thread = threading.Event(), threading.Thread(target=slow)
    with pytest.raises(KeyboardInterrupt), writing:
        thread.start()
        started.wait()
        raise KeyboardInterrupt
    order.append("stopped")
    thread.join()
    assert order == ["written", "stopped"]
    with pytest.raises(CancelledError), writing.permit():
        pytest.fail("a write started")


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full():
        raise OSError(28, "No space left on device", "/x/y")

    monkeypatch.setattr("sys.argv", ["convert"])
    assert cli.run(full) == 2
    assert capsys.readouterr().err == (
        "error: /x/y: No space left on device; free space there, or inodes (df -h and df -i say "
        "which is used up). Nothing of the conversion is kept; run it again after that\n"
    )


# --------------------------------------------------------------------------------------------------------------- --verify


def test_verify_compares_logits_with_transformers(tmp_path, capsys, monkeypatch):
    hf = finite(tmp_path / "hf")
    from_hf(hf, tmp_path / "checkpoint", verify=True)
    to_hf(tmp_path / "checkpoint", tmp_path / "back", verify=True)
    assert capsys.readouterr().out.count("verified: the logits of 32 tokens differ") == 2
    original = logits.logits_of
    monkeypatch.setattr(
        logits,
        "logits_of",
        lambda config, stored, tokens: original(
            config, stored | {("norm", "scale"): 1.01 * stored["norm", "scale"][...]}, tokens
        ),
    )
    with pytest.raises(
        UserError, match="--verify: the logits of 32 tokens differ from those of transformers by 0.01 of"
    ):
        from_hf(hf, tmp_path / "wrong", verify=True)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("convert", [from_hf, to_hf])
def test_verify_without_torch_is_refused_before_the_conversion(tmp_path, monkeypatch, convert):
    monkeypatch.setattr(logits.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="--verify compares with transformers, which needs torch; install torch"):
        convert(tmp_path / "nowhere", tmp_path / "out", verify=True)
