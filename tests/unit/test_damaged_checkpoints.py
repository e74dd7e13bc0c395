# pytest tests/unit/test_damaged_checkpoints.py
"""Damaged checkpoints, and those of another model, are refused by name."""

import os
import re
import shutil
import subprocess

import jax
import pytest
import tensorstore as ts

from alst_jax.config import UserError
from alst_jax.storage import checkpoint as ckpt
from alst_jax.storage import run_directory
from tests.helpers import make_step, tiny
from tests.unit.saves import saved


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def overwrite(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 4 : len(content) // 2] = b"\xa5" * (len(content) // 2 - len(content) // 4)
    file.write_bytes(content)


def drop_a_chunk(item):
    """Of one array, which then has no data there: zarr's readers would make zeros of it."""
    database = ts.KvStore.open({"driver": "ocdbt", "base": item.as_uri()}).result()
    chunks = [key for key in database.list().result() if re.search(rb"mlp.up_proj.kernel/[\d.]+$", key)]
    database.write(chunks[-1], None).result()


DAMAGES = {
    "a chunk of weights missing": ("params", drop_a_chunk),
    "weights cut short": ("params", lambda item: halve(largest_file(item))),
    "weights overwritten": ("params", lambda item: overwrite(largest_file(item))),
    "weights' data missing": ("params", lambda item: largest_file(item).unlink()),
    "weights' manifest missing": ("params", lambda item: (item / "manifest.ocdbt").unlink()),
    "weights' metadata emptied": ("params", lambda item: os.truncate(item / "_METADATA", 0)),
    "weights missing": ("params", shutil.rmtree),
    "optimizer cut short": ("optimizer", lambda item: halve(largest_file(item))),
    "optimizer missing": ("optimizer", shutil.rmtree),
    "loop cut short": ("loop", lambda item: halve(item / "metadata")),
    "loop missing": ("loop", shutil.rmtree),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("intact")
    saved(run_dir, 3)
    return run_dir


def restore(run_dir, step, item):
    made, checkpoints = make_step(dp=2, sp=2), ckpt.Checkpoints(run_dir)
    if item == "loop":
        return checkpoints.restore_loop(step)
    if item == "params":
        return checkpoints.restore_params(step, made.params)
    return checkpoints.restore_optimizer(step, made.optimizer_state)


@pytest.mark.parametrize("item, damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, intact, item, damage):
    run_dir = tmp_path / "run"
    shutil.copytree(intact, run_dir)
    at = run_dir / run_directory.CHECKPOINTS / "3"
    damage(at / item)
    with pytest.raises(UserError, match=f"^checkpoint {at} cannot be read: .+; there is no other step in this dir"):
        restore(run_dir, 3, item)
    if item == "params":
        with pytest.raises(UserError, match=f"^checkpoint {at} cannot be read: "):
            list(ckpt.Checkpoints(run_dir).read_params(3))
    for other in {"loop", "params", "optimizer"} - {item}:
        restore(run_dir, 3, other)


def test_the_refusal_says_how_to_go_on(tmp_path):
    saved(tmp_path, 2, 4, 6)
    halve(largest_file(tmp_path / run_directory.CHECKPOINTS / "6" / "params"))
    halve(largest_file(tmp_path / run_directory.CHECKPOINTS / "4" / "optimizer"))
    with pytest.raises(
        UserError,
        match="cannot be read: params/.* bytes and was written with .*; step 2 was verified. To "
        "go on from it: mv .* && python train.py --resume --out ",
    ) as refusal:
        restore(tmp_path, 6, "params")
    subprocess.run(re.search("mv (.*?) &&", str(refusal.value))[0].removesuffix(" &&"), shell=True, check=True)
    shutil.rmtree(tmp_path / run_directory.CHECKPOINTS / "4")
    assert run_directory.find_checkpoint(tmp_path) == (tmp_path, 2)
    restore(tmp_path, 2, "params")


def test_a_checkpoint_is_not_to_blame_for_a_lack_of_memory(intact, monkeypatch):
    """Or a user is told to delete it."""

    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ckpt, "load_array", too_large)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        restore(intact, 3, "params")


@pytest.mark.parametrize(
    "changes", [dict(num_layers=2), dict(vocab_size=104), dict(mlp_bias=False), dict(tie_word_embeddings=True)]
)
def test_weights_of_another_model_are_refused(intact, changes):
    with pytest.raises(UserError, match=f"^checkpoint {intact}/checkpoints/3 has the params of another model"):
        ckpt.Checkpoints(intact).restore_params(3, make_step(tiny(**changes)).params)
