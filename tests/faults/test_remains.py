# python -m pytest tests/faults/test_remains.py
"""Remains of old checkpoints; memory that must be free again: after a rewind, and after a refused step; the words of an
out of memory."""

import dataclasses
import errno
import os
import shutil
import types
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

import train
from alst_jax import run_state, trainer
from alst_jax.config import TrainConfig, UserError
from alst_jax.planning.job import Job
from alst_jax.profile import Profile
from alst_jax.refused import NotFinite, Refused, Saves, Spike
from alst_jax.storage import run_directory
from alst_jax.storage.checkpoint import Checkpoints
from tests.helpers import TINY

WEIGHTS = {"a": {"kernel": np.ones(8, np.float32)}}


@pytest.fixture
def run_dir(tmp_path):
    """Checkpoints of steps 1, 2 and 3; a rotation was killed while it deleted the first."""
    run_directory.write_run_file(tmp_path, "training", {"flags": {}})
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, WEIGHTS, None, {"step": step})
    checkpoints.close()
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "params")
    return tmp_path


def steps_on_disk(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("keep, left", [(2, [2, 3]), (1, [3]), (3, [1, 2, 3]), (None, [1, 2, 3])])
def test_remains_of_a_rotation_are_removed(run_dir, keep, left):
    checkpoints = Checkpoints(run_dir, keep)
    checkpoints.remove_remains()
    assert steps_on_disk(run_dir) == checkpoints.steps() == left


def refuse(path, *_, **__):
    raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_remains_that_cannot_be_removed_are_a_warning(run_dir, monkeypatch, capsys):
    checkpoints = Checkpoints(run_dir, 1)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    checkpoints.remove_remains()
    lines = capsys.readouterr().err.splitlines()
    assert [
        f"checkpoints/{step}, older than --keep-checkpoints 1, cannot be deleted: " in line
        for step, line in zip((1, 2), lines, strict=True)
    ] == [True, True]
    assert all("Permission denied; give this user the right to it" in line for line in lines)
    assert steps_on_disk(run_dir) == [1, 2, 3]


def test_a_rotation_that_fails_is_an_error_that_names_the_saved_step(run_dir, monkeypatch):
    checkpoints = Checkpoints(run_dir, 1)
    monkeypatch.setattr("orbax.checkpoint._src.path.deleter.PathDeleter.delete", refuse)
    with pytest.raises(
        UserError,
        match="^the checkpoint of step 4 is saved, and an older one cannot be deleted: .*"
        "Permission denied; .*Step 4 is saved in",
    ):
        checkpoints.save(4, WEIGHTS, None, {"step": 4})
    monkeypatch.undo()
    assert Checkpoints(run_dir).restore_loop(4) == {"step": 4}


# -------------------------------------------------------------------------------------------------------------- rewind


def state_of(*values):
    arrays = [jnp.full(4, value) for value in values]
    return trainer.TrainState({"w": arrays[0]}, {"f": arrays[1]}, {"m": arrays[2]}, 7), arrays


def test_a_rewind_frees_the_state_before_it_reads(monkeypatch):
    state, arrays = state_of(1.0, 2.0, 3.0)
    arrays[2].delete()  # as an update that reused it

    def restore(step, data, checkpoints, at, frozen):
        assert at == 5 and frozen is None and all(array.is_deleted() for array in arrays)
        return "restored"

    monkeypatch.setattr(run_state, "restore", restore)
    saved = types.SimpleNamespace(steps=lambda: [2, 5])
    step = types.SimpleNamespace(model=types.SimpleNamespace(lora=None))
    assert run_state.go_back(step, None, saved, state) == "restored"
    state, arrays = state_of(1.0, 2.0, 3.0)
    assert run_state.go_back(step, None, types.SimpleNamespace(steps=list), state) is None
    assert not any(array.is_deleted() for array in arrays)  # the run ends, and saves them


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("problem, flags", [(NotFinite, dict(on_nonfinite="rewind")), (Spike, dict(on_spike="rewind"))])
def test_the_arrays_of_a_refused_step_are_free_when_the_last_checkpoint_is_read(problem, flags, kept, monkeypatch):
    """Those that only its frames hold; and the state that is handed back to be freed is the one that has arrays."""
    before, after, inside = trainer.TrainState(1, 2, 3, 7), trainer.TrainState(4, 5, 6, 7), []

    def optimizer_step(*_):
        arrays = np.ones(4)
        inside.append(weakref.ref(arrays))
        raise problem("bad", after if kept else None)

    def read(state):
        assert inside[0]() is None and state is (after if kept else before)
        return dataclasses.replace(before, step=5)

    monkeypatch.setattr(trainer, "optimizer_step", optimizer_step)
    watch = types.SimpleNamespace(judge=print, begin=lambda step: None, rest=lambda: None)
    state, _, refused = trainer.attempt(None, before, [], 0.0, watch)
    policy = Refused(TrainConfig(save_every=1, **flags), Saves(print, read), print)
    assert policy.go_on(refused, state, {"next_index": 3}).step == 5


# ------------------------------------------------------------------------------------------------------- out of memory


def test_an_out_of_memory_knows_what_auto_chose():
    """With the flags alone it would say --offload-optimizer of a run that has it on."""
    chosen = Profile(offload_optimizer=True, offload_weights=True, head_chunks=4, segment_layers=(2,))
    job = Job(TINY, chosen, 1, 64, states="int8")
    with pytest.raises(UserError) as refused, train.naming_the_profile(TrainConfig(), job):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore")
    assert str(refused.value) == (
        "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes. The step ran with --offload-weights "
        "--offload-optimizer --segment-layers 2 --head-chunks 4 --optimizer-states int8 (--memory auto keeps what is "
        "typed). These need less: --offload-activations, a larger --sp, or a shorter --seq-len. Checkpoints saved "
        "before are complete; go on from them with --resume"
    )
    by_hand = train.out_of_memory(TrainConfig(memory="manual"), "RESOURCE_EXHAUSTED: no")
    assert "The step ran" not in by_hand and "--offload-optimizer, --offload-activations, --offload-weights" in by_hand
    with pytest.raises(RuntimeError, match="other"), train.naming_the_profile(TrainConfig(), job):
        raise RuntimeError("other")
