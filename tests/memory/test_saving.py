# pytest tests/memory/test_saving.py
"""What a save holds in host memory: bounded, and part of every plan."""

import ctypes
import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from alst_jax.hardware.machines import parse_cluster
from alst_jax.models.block import abstract_params
from alst_jax.optim.adamw import AdamW
from alst_jax.planning.estimate import estimate
from alst_jax.planning.job import Job, parameter_sizes
from alst_jax.planning.process import saving_bytes
from alst_jax.profile import Profile
from alst_jax.storage import saving
from alst_jax.storage.checkpoint import Checkpoints
from benchmarks.shapes import LLAMA_8B, LLAMA_70B
from tests.helpers import TINY, job_of, make_step, plan_of

OFFLOADED = dict(offload_activations=True, offload_weights=True, offload_optimizer=True)
LARGEST = 32 * 4096 * 14336  # elements of the 8B model's largest array


def job(model=LLAMA_8B, dp=1, sp=1, states="float32", master="float32", **changes) -> Job:
    profile = Profile(**dict(attention="cudnn", compute_dtype="bfloat16") | changes)
    return Job(model, profile, dp, 131072, dp, sp, states=states, master=master)


def test_bytes_by_hand():
    held = lambda job, free=0: saving_bytes(job, free)
    assert held(job(**OFFLOADED)) == saving.BUFFERS  # written from where they are
    assert held(job()) == 2 * LARGEST * (2 + 4) + saving.BUFFERS
    assert held(job(offload_optimizer=True)) == 2 * LARGEST * 2 + saving.BUFFERS
    assert (
        held(job(offload_optimizer=True), 10**9) == 2 * LARGEST * 2 - 10**9 + saving.BUFFERS
    )  # the room of activations
    assert held(job(offload_optimizer=True), 10**10) == saving.BUFFERS
    assert held(job(states="int8", master="none")) == 2 * LARGEST * (2 + 1) + saving.BUFFERS
    assert held(job(sp=8)) == (2 * LARGEST * (2 + 4) + saving.BUFFERS) // 8
    # what is not larger than COPIES goes together; and no more is held than there is
    assert held(job(dp=8, sp=8)) == (4 * saving.COPIES + saving.BUFFERS) // 8
    assert held(job(TINY, **OFFLOADED)) == TINY.num_params * (2 + 3 * 4)


@pytest.mark.parametrize("model", [TINY, LLAMA_8B, LLAMA_70B])
def test_the_largest_parameter(model):
    leaves = jax.tree.leaves(abstract_params(model, jnp.float32))
    assert parameter_sizes(model).largest == max(leaf.size for leaf in leaves)


@pytest.mark.parametrize("changes", [{}, OFFLOADED])
def test_it_is_a_line_of_every_plan(changes):
    step = make_step(TINY, 1, 2, Profile(loss_tile=32, mlp_tile=32, **changes), AdamW())
    compiled, estimated = plan_of(step, 1, 256), estimate(job_of(step, 1, 256))
    assert compiled.host["saving"] == estimated.host["saving"] > 0
    assert [line.split()[0] for line in compiled.table().splitlines()].count("saving") == 1


def test_it_can_be_what_a_host_lacks():
    cluster = dataclasses.replace(parse_cluster("8xH100"), pinned=(saving.BUFFERS + 8 * 10**6) // 8)
    assert estimate(job(sp=8), cluster).lacks.keys() == {"host"}


def test_chunks_shrink_with_the_cores(monkeypatch):
    for cores, size in ((1, 2**24), (2, 2**24), (8, 2**24), (16, 2**23), (128, 2**20), (999, 2**20), (None, 2**24)):
        monkeypatch.setattr(saving.os, "cpu_count", lambda: cores)
        assert saving.chunk_bytes() == size, cores


def test_cores_are_those_that_tensorstore_counts():
    """All of the machine: it makes as many threads as C++ says, and C++ does not look at what a process is bound to."""
    cores, allowed = ctypes.CDLL("libstdc++.so.6")["_ZNSt6thread20hardware_concurrencyEv"], os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores() == os.cpu_count()
    finally:
        os.sched_setaffinity(0, allowed)


def test_the_limits_are_set(tmp_path, monkeypatch):
    limits, made = [], ocp.PyTreeCheckpointHandler
    monkeypatch.setattr(ocp, "PyTreeCheckpointHandler", lambda **options: limits.append(options) or made(**options))
    saved, save = [], ocp.CheckpointManager.save
    monkeypatch.setattr(
        ocp.CheckpointManager,
        "save",
        lambda self, step, args, **options: (saved.append(args), save(self, step, args=args, **options)),
    )
    checkpoints = Checkpoints(tmp_path)
    tree = {"a": jnp.ones(4)}
    checkpoints.save(1, tree, tree, {})
    assert (tmp_path / "checkpoints" / "1").is_dir()  # at once, so that no update changes what is being written
    assert [sorted(o for o in options.items() if o[0].endswith("_gb")) for options in limits] == 2 * [
        [("save_concurrent_gb", 0.3), ("save_device_host_concurrent_gb", 1)]
    ]
    assert {saved[0][item].ocdbt_target_data_file_size for item in ("params", "optimizer")} == {saving.DATA_FILE}
    assert {saved[0][item].save_args["a"].chunk_byte_size for item in ("params", "optimizer")} == {saving.chunk_bytes()}


SAVE = """
import functools, pathlib, re, sys
import jax
import orbax.checkpoint as ocp
from alst_jax.storage import checkpoint, orbax_limits, saving

saving.COPIES = 10**8
if sys.argv[2] == "orbax":  # its own order, as it was before
    orbax_limits.CopyWhenWritten.key_priority = lambda self, keypath: orbax_limits.TransferPriority.SYNCHRONOUS
# As on a GPU, where copies are made; of a CPU's arrays, which lie in the host's memory, orbax makes none.
ocp.PyTreeCheckpointHandler = functools.partial(ocp.PyTreeCheckpointHandler, enable_pinned_host_transfer=True)
params = {f"w{i}": {"kernel": jax.random.normal(jax.random.key(i), (1024, 8192))} for i in range(32)}
size = sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(params)))
checkpoints = checkpoint.Checkpoints(sys.argv[1])

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

checkpoints.save(1, {"small": params["w0"]}, None, {})  # what the first save makes once and for all
pathlib.Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM is the peak of the next save alone
before = kilobytes("VmRSS")
checkpoints.save(2, params, None, {})
print((kilobytes("VmHWM") - before) * 1024, size)
"""


def test_copies_of_a_device_are_made_as_they_are_written(tmp_path):
    def peak(how):
        done = subprocess.run(
            [sys.executable, "-c", SAVE, str(tmp_path / how), how],
            capture_output=True,
            text=True,
            cwd=pathlib.Path(__file__).parents[2],
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return map(int, done.stdout.split())

    held, size = peak("ours")
    assert held < 2 * 10**8 + size / 4
    held, _ = peak("orbax")
    assert held > size
