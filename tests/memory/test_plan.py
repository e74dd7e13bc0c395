# pytest tests/memory/test_plan.py
"""The plan: parts that add up, that follow the switches, and that the compiler and the arrays agree with."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from alst_jax.memory.plan import plan_step
from alst_jax.memory.profile import Profile
from alst_jax.optim.adamw import AdamW
from tests.helpers import make_step, tiny

MODEL = tiny(num_heads=8, num_kv_heads=8, attention_bias=False, mlp_bias=False)
TILED = dict(loss_tile=32, mlp_tile=32)


def plan(
    rows=1, length=1024, grad_accum=1, sp=1, dp=1, dtype=jnp.float32, optimizer=AdamW(), model=MODEL, **changes
):
    return plan_step(make_step(model, dp, sp, Profile(**TILED | changes), optimizer, dtype), rows, length, grad_accum)


def temporary(plan):
    return plan.device["working set"] + plan.device["kept activations"]


@pytest.fixture(scope="module")
def base():
    return plan()


def test_parts_are_those_of_the_arrays(base):
    step = make_step(MODEL)
    params = step.init_params(jax.random.key(0), jnp.float32)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert size == 4 * MODEL.num_params
    assert (base.device["weights"], base.device["gradients"]) == (size, size)
    assert base.device["optimizer"] == sum(x.nbytes for x in jax.tree.leaves(step.init_optimizer(params)))
    assert base.device_bytes == sum(base.device.values()) and base.flops == MODEL.flops_per_sequence(1024)


def test_offloading_moves_parts_to_the_host(base):
    moved = plan(offload_weights=True, offload_optimizer=True)
    assert "weights" not in moved.device and moved.host["weights"] == base.device["weights"]
    assert moved.host["gradients"] == base.device["gradients"]
    assert moved.device["optimizer"] == 4  # the count of steps
    assert moved.host["optimizer"] + 4 == base.device["optimizer"]


def test_each_switch_shows_the_bytes_it_saves(base):
    work = lambda **changes: temporary(plan(**changes))
    wide = dict(model=tiny(vocab_size=4096, intermediate_size=4096, num_layers=2))
    assert work(**wide, loss_tile=None) > work(**wide) + 1024 * 4096 * 4  # the logits, at least
    assert work(**wide, mlp_tile=None) > work(**wide) + 1024 * 4096 * 4  # one of the MLP's intermediates, at least
    assert work(remat=False) > 1.2 * temporary(base)
    assert work(length=2048) > 1.5 * temporary(base)
    assert work(sp=4) < 0.6 * temporary(base)  # tiles and gathered weights do not shrink


def test_shards_dtypes_and_accumulation(base):
    assert plan(sp=8).device["weights"] == base.device["weights"] / 8
    assert plan(dtype=jnp.bfloat16, compute_dtype="bfloat16").device["weights"] == base.device["weights"] / 2
    assert plan(grad_accum=2).device["gradients"] == 2 * base.device["gradients"]
    assert plan(grad_accum=2).flops == 2 * base.flops
    narrow = plan(dtype=jnp.bfloat16, compute_dtype="bfloat16", optimizer=AdamW(states="int8", master="none"))
    assert narrow.device["optimizer"] < 0.35 * base.device["optimizer"]
    in_program = lambda p: p.collectives["all-to-all"]["instructions"]
    assert in_program(base) == 0 and in_program(plan(sp=2)) == 12


def test_command_line(tmp_path):
    command = [sys.executable, "train.py", "--plan-only", "--seq-len", "512"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "working set" in table and "device GiB" in table and "12 in the program" in table
    values = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert values["device_bytes"] == sum(values["device"].values()) and set(values["host"]) >= {"kept activations"}
    assert values["flops"] > 0 and values["device_kind"] == "cpu"
