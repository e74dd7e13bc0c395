# pytest tests/unit/test_checkpoint.py
"""Checkpoints come back bit for bit, on any mesh, or are refused by name; what was cut off or damaged is never used."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from alst_jax.config import UserError
from alst_jax.data.batches import TrainingBatches
from alst_jax.data.documents import Sequence
from alst_jax.models.tree import names
from alst_jax.profile import Profile
from alst_jax.storage import checkpoint as ckpt
from alst_jax.storage import run_directory
from alst_jax.xla import arrays as loading
from tests.helpers import PLAIN, TINY, initial, leaf, make_step, tiny, to_numpy
from tests.unit.saves import LOOP, assert_identical, assert_placed, filled, saved

ON_HOST = Profile(offload_activations=True, offload_weights=True, offload_optimizer=True)


# ------------------------------------------------------------------------------------------------------------ contents


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_bit_survives_meshes_and_memory_kinds(tmp_path, dtype):
    steps = [make_step(dp=8, dtype=dtype), make_step(dp=2, sp=4, dtype=dtype, profile=ON_HOST), make_step(dtype=dtype)]
    params, optimizer = filled(steps[0].params), filled(steps[0].optimizer_state, seed=1)
    assert ("master" in optimizer) == (dtype == "bfloat16")
    original = to_numpy((params, optimizer))
    for i in range(len(steps)):
        checkpoints = ckpt.Checkpoints(tmp_path / str(i))
        checkpoints.save(3, params, optimizer, LOOP)
        checkpoints.close()
        checkpoints = ckpt.Checkpoints(tmp_path / str(i))
        assert checkpoints.restore_loop(3) == LOOP
        onto = steps[min(i + 1, 2)]
        params = checkpoints.restore_params(3, onto.params)
        optimizer = checkpoints.restore_optimizer(3, onto.optimizer_state)
        assert_identical((params, optimizer), original)
        assert_placed((params, optimizer), (onto.params, onto.optimizer_state))
        checkpoints.close()


def test_weights_come_in_the_dtype_asked_for(tmp_path):
    params, _ = saved(tmp_path, 1)
    step = make_step(dtype="bfloat16")
    narrow = ckpt.Checkpoints(tmp_path).restore_params(1, step.params)
    assert_placed(narrow, step.params)
    for x, y in zip(jax.tree.leaves(narrow), jax.tree.leaves(params), strict=True):
        rounded = np.asarray(y).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(x).astype(np.float32), rounded.astype(np.float32))


@pytest.mark.parametrize("profile", [PLAIN, ON_HOST], ids=["device", "host"])
def test_large_arrays_are_restored_some_rows_at_a_time(tmp_path, monkeypatch, profile):
    """There is no room for a second copy of a stack beside the pinned memory of a long run."""
    params, optimizer = saved(tmp_path, 1, made=make_step(dp=2, sp=2, dtype="bfloat16"))
    reads, original = [], ckpt.read_part
    monkeypatch.setattr(ckpt, "read_part", lambda *where: reads.append(original(*where)) or reads[-1])
    onto = make_step(sp=2, dtype="bfloat16", profile=profile)
    back = lambda: (
        ckpt.Checkpoints(tmp_path).restore_params(1, onto.params),
        ckpt.Checkpoints(tmp_path).restore_optimizer(1, onto.optimizer_state),
    )
    back()
    whole, number = max(x.nbytes for x in reads), len(reads)
    reads.clear()
    monkeypatch.setattr(loading, "AT_ONCE", 1000)
    assert_identical(back(), (params, optimizer))
    a_layer = whole // TINY.num_layers
    assert max(x.nbytes for x in reads) == a_layer > 1000 and len(reads) > 2 * number


def test_an_optimizer_of_another_kind_is_refused(tmp_path):
    saved(tmp_path, 1, made=make_step(dtype="bfloat16"))
    wanted = make_step(dtype="bfloat16").optimizer_state
    less = {name: part for name, part in wanted.items() if name != "master"}
    with pytest.raises(
        UserError,
        match=r"checkpoints/1 has the optimizer of another model or optimizer: "
        r"master\.\S+ is \(.*\) floats there and none here.*\. Use the model and the flags it was made with$",
    ):
        ckpt.Checkpoints(tmp_path).restore_optimizer(1, less)
    with pytest.raises(UserError, match=r"low\.\S+ is none there and \(.*\) floats here"):
        ckpt.Checkpoints(tmp_path).restore_optimizer(1, wanted | {"low": wanted["master"]})
    as_bits = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.uint16, sharding=x.sharding), wanted["master"])
    with pytest.raises(UserError, match=r"master\.\S+ is \(.*\) floats there and \(.*\) uint16 here"):  # low bits
        ckpt.Checkpoints(tmp_path).restore_optimizer(1, wanted | {"master": as_bits})


def test_weights_read_one_by_one(tmp_path):
    params, _ = saved(tmp_path, 1, made=make_step(dp=2, sp=2, dtype="bfloat16"))
    read = dict(ckpt.Checkpoints(tmp_path).read_params(1))
    expected = {names(path): array for path, array in jax.tree_util.tree_leaves_with_path(params)}
    assert read.keys() == expected.keys()
    for path, array in read.items():
        assert isinstance(array, np.ndarray)
        assert_identical(array, expected[path])


def test_a_conversion_has_no_optimizer(tmp_path):
    step = make_step()
    params = filled(step.params)
    checkpoints = ckpt.Checkpoints(tmp_path)
    checkpoints.save(0, params, None, {})
    assert_identical(checkpoints.restore_params(0, step.params), params)
    with pytest.raises(UserError, match=f"checkpoint {tmp_path}/checkpoints/0 cannot be read: optimizer.*not found"):
        checkpoints.restore_optimizer(0, step.optimizer_state)


def test_the_position_in_the_data_is_restored(tmp_path):
    sequences = [Sequence(np.full(4, i, np.int32), np.full(4, i, np.int32)) for i in range(7)]
    make = lambda: TrainingBatches(sequences, 4, 2, 1, seed=0, pad_token=0)
    data = make()
    for _ in range(5):
        next(data)
    checkpoints = ckpt.Checkpoints(tmp_path)
    checkpoints.save(5, filled(make_step().params), None, {"data": data.get_state()})
    expected = [next(data)["tokens"].tolist() for _ in range(6)]
    resumed = make()
    resumed.set_state(checkpoints.restore_loop(5)["data"])
    assert [next(resumed)["tokens"].tolist() for _ in range(6)] == expected


@pytest.mark.parametrize("profile", [PLAIN, ON_HOST], ids=["device", "host"])
def test_a_save_is_not_reached_by_the_updates_that_follow(tmp_path, profile):
    """The next update reuses the very buffers that were saved."""
    model = tiny(vocab_size=4096, hidden_size=128, intermediate_size=1024)
    step = make_step(model, dp=2, sp=4, profile=profile)
    params = initial(step)
    state = step.init_optimizer(params)
    gradients = jax.device_put(jax.tree.map(lambda p: p + 0.01, params), step.param_shardings)
    update = lambda params, state: step.update(params, gradients, state, jnp.float32(1), jnp.float32(1e-2))
    first = params
    params, state = update(params, state)  # now it is compiled, and the moments are not zero
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    before = jax.tree.map(lambda x: np.array(x, copy=True), (params, state))
    checkpoints = ckpt.Checkpoints(tmp_path)
    checkpoints.save(1, params, state, LOOP)
    for _ in range(3):
        params, state = update(params, state)
    jax.block_until_ready((params, state))
    restored = checkpoints.restore_params(1, step.params), checkpoints.restore_optimizer(1, step.optimizer_state)
    assert_identical(restored, before)
    assert not np.array_equal(np.asarray(leaf(params, "norm.scale")), leaf(before[0], "norm.scale"))


# --------------------------------------------------------------------------------------------------- several, cut off


@pytest.mark.parametrize("keep, left", [(1, [9]), (2, [5, 9]), (None, [1, 3, 5, 9])])
def test_old_checkpoints_make_room(tmp_path, keep, left):
    saved(tmp_path, 1, 3, 5, 9, keep=keep)
    assert sorted(int(p.name) for p in (tmp_path / run_directory.CHECKPOINTS).iterdir()) == left
    assert ckpt.Checkpoints(tmp_path, keep).steps() == left
    assert run_directory.find_checkpoint(tmp_path) == (tmp_path, 9)
    step = make_step()
    for at in left:
        assert ckpt.Checkpoints(tmp_path).restore_loop(at)["step"] == at
        ckpt.Checkpoints(tmp_path).restore_params(at, step.params)


CUT_OFF = """
import os, sys, threading
import jax, jax.numpy as jnp
from alst_jax.storage.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"a": {"kernel": jnp.ones(4)}}, None, {"step": 1})
large = jax.random.normal(jax.random.key(0), (6000, 6000))

def kill():
    while sum("2" in name for name in os.listdir(checkpoints.directory)) == 0:
        pass
    os._exit(9)  # as a kill would, while the files are being written

threading.Thread(target=kill).start()
checkpoints.save(2, {"a": {"kernel": large}}, None, {"step": 2})
"""


def test_a_save_that_was_cut_off_is_never_found(tmp_path):
    run_directory.write_run_file(tmp_path, "training", {})
    killed = subprocess.run(
        [sys.executable, "-c", CUT_OFF, str(tmp_path)],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == 9, killed.stderr
    left = [p.name for p in (tmp_path / run_directory.CHECKPOINTS).iterdir()]
    assert len(left) == 2 and "2" not in left, left  # the remains of the second are there, under another name
    assert run_directory.find_checkpoint(tmp_path) == (tmp_path, 1)
    checkpoints = ckpt.Checkpoints(tmp_path)
    assert checkpoints.steps() == [1] and checkpoints.restore_loop(1) == {"step": 1}
    checkpoints.save(2, {"a": {"kernel": jnp.zeros(4)}}, None, {"step": 2})  # the resumed run gets there again
    checkpoints.close()
    assert run_directory.find_checkpoint(tmp_path) == (tmp_path, 2)
