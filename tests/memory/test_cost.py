# pytest tests/memory/test_cost.py
"""The cost model: beside the compiler and against arithmetic done by hand."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import pytest

from alst_jax.hardware.machines import parse_cluster
from alst_jax.optim.adamw import AdamW
from alst_jax.planning.estimate import estimate
from alst_jax.planning.footprint import layer_work, state_bytes, working_set
from alst_jax.planning.job import Passes
from alst_jax.planning.seconds import collectives, seconds
from alst_jax.profile import DEVICE, HOST, Profile
from benchmarks import plan_accuracy
from benchmarks.shapes import LLAMA_8B, LLAMA_70B, llama_8b
from tests.helpers import job_of, make_step, plan_of, tiny
from tests.memory.machines_and_jobs import H100, job

SMALL = tiny(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    num_layers=6,
    attention_bias=False,
    mlp_bias=False,
)
OFFLOADED = dict(offload_activations=True, offload_weights=True, offload_optimizer=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(sp=4),
        dict(keep_attention_on_device=6),
        dict(segment_layers=(3,), head_chunks=2),
        dict(segment_layers=(1, 2, 3), head_chunks=2, keep_attention_on_device=3),
    ],
)
def test_bytes_are_those_of_the_compiler(changes):
    """On CPUs, where fragments and fusions differ from those on GPUs that the model was fitted to: within 20%."""
    changes = dict(changes)
    sp, length = changes.pop("sp", 1), 8192
    step = make_step(SMALL, 1, sp, Profile(loss_tile=128, mlp_tile=128, **changes), AdamW())
    compiled, estimated = plan_of(step, 1, length), estimate(job_of(step, 1, length))
    temporary = lambda plan: plan.device["working set"] + plan.device["kept activations"]
    assert temporary(estimated) == pytest.approx(temporary(compiled), rel=0.2)
    for part in ("weights", "gradients", "optimizer", "batch"):
        assert estimated.device[part] == pytest.approx(compiled.device[part], rel=1e-4)
    for name, calls in compiled.collectives.items():
        assert (calls["instructions"] > 0) == (estimated.collectives[name]["calls"] > 0) or name == "all-reduce"


def test_bytes_are_those_of_the_compiler_on_gpus():
    """86 programs that were compiled for H100: benchmarks/plan_accuracy.py, which compiles what is not in the file."""
    file = pathlib.Path(plan_accuracy.__file__).parent / "results/2026-11-27-plan-accuracy.jsonl"
    compiled = {row["key"]: row for row in map(json.loads, file.read_text().splitlines())}
    errors = []
    for name, length, dp, sp, changes in plan_accuracy.FITTED + plan_accuracy.HELD_OUT:
        row = compiled.pop(json.dumps(["H100-80", name, length, dp, sp, changes]))
        device, host = plan_accuracy.numbers(estimate(plan_accuracy.bare_job(name, length, dp, sp, changes)))
        errors.append(abs(device / row["device"] - 1))
        assert host == pytest.approx(row["host"], rel=0.01), (name, length, dp, sp, changes)
    assert not compiled and len(errors) == 86
    assert sum(error <= 0.05 for error in errors) >= 83 and max(errors) < 0.13


def test_what_is_kept_is_what_the_compiler_keeps():
    """Attention outputs of two more layers: as many bytes more, in both."""
    step = lambda n: make_step(SMALL, profile=Profile(loss_tile=128, mlp_tile=128, keep_attention_on_device=n))
    plans = [(plan_of(step(n), 1, 8192), estimate(job_of(step(n), 1, 8192))) for n in (2, 4)]
    temporary = lambda plan: plan.device["working set"] + plan.device["kept activations"]
    (compiled, estimated), (compiled_more, estimated_more) = plans
    one_output = 8192 * 256 * 4
    assert estimated_more.device["kept activations"] - estimated.device["kept activations"] == 2 * one_output
    assert temporary(compiled_more) - temporary(compiled) == pytest.approx(2 * one_output, rel=0.05)


def test_kept_bytes_by_hand():
    hidden, output = 131072 * 4096 * 2, 131072 * (4096 * 2 + 32 * 4)
    assert job().kept == {DEVICE: 32 * hidden, HOST: 0}
    assert job(offload_activations=True).kept == {DEVICE: 0, HOST: 32 * hidden}
    assert job(segment_layers=(4,), keep_attention_on_device=3, keep_attention_on_host=5).kept == {
        # a run of a single layer is no loop, and stays on the device; the first segment's input is looked up again
        DEVICE: 7 * hidden + 4 * output,
        HOST: 4 * output,
    }


def test_states_by_hand():
    n = LLAMA_8B.num_params
    assert state_bytes(job()) == (2 * n, 2 * n, 12 * n)
    narrow = dataclasses.replace(job(dp=8), states="int8", master="none", grad_accum=2)
    # Gradients of one batch are added to the float32 sums where they are made: they are not stored.
    assert state_bytes(narrow) == (2 * n / 8, 4 * n / 8, pytest.approx(n / 8 * (2 + 8 / 256), rel=1e-6))


def test_more_length_layers_or_devices():
    profiles = (
        {},
        OFFLOADED,
        OFFLOADED | dict(segment_layers=(4,), head_chunks=8),
        dict(keep_attention_on_device=2, head_chunks=2),
    )
    for changes in profiles:
        plans = [estimate(job(length=n * 1024, **changes), H100) for n in (32, 64, 128, 256, 512, 1024)]
        for smaller, larger in zip(plans, plans[1:]):
            assert smaller.device_bytes < larger.device_bytes and smaller.host_bytes <= larger.host_bytes
            assert smaller.step_seconds < larger.step_seconds
        plans = [estimate(job(model=llama_8b(n), **changes), H100) for n in (4, 8, 16, 32)]
        for smaller, larger in zip(plans, plans[1:]):
            assert smaller.device_bytes <= larger.device_bytes and smaller.step_seconds < larger.step_seconds
            assert smaller.device_bytes + smaller.host_bytes < larger.device_bytes + larger.host_bytes
        plans = [
            estimate(job(sp=n, length=2**19, **changes | dict(head_chunks=1)), parse_cluster(f"{n}xH100"))
            for n in (1, 2, 4, 8)
        ]
        for fewer, more in zip(plans, plans[1:]):
            assert fewer.device_bytes > more.device_bytes and fewer.step_seconds > more.step_seconds


@pytest.mark.parametrize(
    "off,on,least",
    [  # bytes of device memory that a switch must save, at 131,072 tokens
        (dict(loss_tile=None), {}, 0.9 * 131072 * 128256 * 4),
        (dict(mlp_tile=None), {}, 131072 * 14336 * 2),
        (dict(remat=False), {}, 32 * 131072 * 4096 * 2),
        ({}, dict(offload_activations=True), 30 * 131072 * 4096 * 2),
        ({}, dict(offload_weights=True), 3.5 * LLAMA_8B.num_params),
        ({}, dict(offload_optimizer=True), 11.9 * LLAMA_8B.num_params),
        ({}, dict(segment_layers=(8,), head_chunks=2), 10 * 131072 * 4096 * 2),
        (dict(segment_layers=(4,)), dict(segment_layers=(4,), head_chunks=8), 131072 * 4096 * 2),
        (dict(keep_attention_on_device=8), {}, 8 * 131072 * 4096 * 2),
        (dict(keep_attention_on_device=8), dict(keep_attention_on_host=8), 8 * 131072 * 4096 * 2),
        ({}, dict(sp=8), 30 * 2**30),
    ],
)
def test_a_feature_off_shows_the_bytes_it_would_save(off, on, least):
    assert estimate(job(**off)).device_bytes - estimate(job(**on)).device_bytes >= least


def test_the_update_counts_too():
    """Of a layer of the largest parameter, wherever it lives, where a step works on less than that."""
    short = lambda **changes: dataclasses.replace(job(length=1024, **changes), states="int8", master="none")
    assert working_set(short()) > 20 * 4096 * 14336
    assert working_set(short(offload_optimizer=True)) == working_set(short())


def test_the_kernels_workspace():
    with_it = working_set(job(length=524288, head_chunks=8, **OFFLOADED))
    without = working_set(dataclasses.replace(job(length=524288, head_chunks=8, **OFFLOADED), count_workspace=False))
    assert with_it - without == pytest.approx(2 * 2**30, rel=0.1)  # 8 bytes x 524,288 tokens x 4 heads x 128
    assert working_set(job(attention="xla")) < working_set(job())


def test_packed_documents_with_cudnn_have_rates_and_bytes_of_their_own():
    """64 documents of 2,048 tokens: 229 TFLOPS of useful work, and copies of a sequence's q, k, v, o, do, dq, dk, dv."""
    packed = dataclasses.replace(job(), documents=64, attention_share=1 / 64)
    useful = 4 * 32 * 128 * packed.model.causal_pairs(131072) / 64  # of all layers' forward passes
    assert seconds(packed, H100)["attention backward"] == pytest.approx(2.5 * useful / 229e12, rel=0.01)
    slices = lambda job: [term.value for term in layer_work(job) if term.name == "slices of documents"]
    assert slices(packed) == [4 * 131072 * (32 + 8) * 128 * 2] and slices(job()) == [0]
    assert working_set(packed) > working_set(job())


def test_passes_by_hand():
    passes = lambda **changes: job(**changes).passes
    assert passes() == Passes(64, 32 * 4, 64, 64)  # attention again for each layer
    assert passes(keep_attention_on_device=32) == Passes(32, 32 * 3, 64, 64)
    assert passes(segment_layers=(4,)) == Passes(64, 32 * 4, 64 + 24, 64 + 24)  # three of four layers rebuilt
    assert passes(segment_layers=(4,), keep_attention_on_host=8) == Passes(56, 32 * 3 + 24, 88, 88)


def test_collectives_by_hand():
    assert all(calls == {"calls": 0, "bytes": 0} for calls in collectives(job()).values())
    calls = collectives(job(sp=8, length=2**20, keep_attention_on_device=32))
    assert calls["all-to-all"]["calls"] == 12 * 32  # four forward, eight backward
    local = 2**20 // 8 * 128 * 2
    assert calls["all-to-all"]["bytes"] == 32 * 3 * local * (32 + 8 + 8 + 32) * 7 // 8
    again = collectives(job(sp=8, length=2**20))["all-to-all"]
    assert again["calls"] == 16 * 32 and again["bytes"] > calls["all-to-all"]["bytes"]
    # kv heads are repeated
    assert collectives(job(model=LLAMA_70B, sp=64, length=2**20))["all-to-all"]["calls"] == 16 * 80
    layers = LLAMA_8B.num_params - 2 * 128256 * 4096
    assert calls["all-gather"]["bytes"] == pytest.approx((2 * layers + 2 * 128256 * 4096) * 2 * 7 / 8, rel=1e-3)
    assert calls["reduce-scatter"]["bytes"] == pytest.approx(LLAMA_8B.num_params * 4 * 7 / 8, rel=1e-3)


def test_what_limits():
    assert estimate(job(length=8192), H100).limiting_term == "matmuls"
    assert estimate(job(length=524288), H100).limiting_term == "attention backward"
    assert estimate(job(length=1024, **OFFLOADED), H100).limiting_term == "host traffic"
    assert estimate(job(length=131072)).step_seconds is None  # nobody knows a CPU's speed
    slow = estimate(job(sp=8, length=8192), dataclasses.replace(parse_cluster("2x4xH100"), per_host=4))
    assert (
        slow.seconds["collectives"] > estimate(job(sp=8, length=8192), parse_cluster("8xH100")).seconds["collectives"]
    )
    assert jnp.isfinite(slow.step_seconds)


def test_an_update_in_the_backward_pass_stores_no_gradients():
    offloaded = dict(offload_weights=True, offload_optimizer=True, offload_activations=True)
    behind, within = (estimate(job(update_in_backward=on, **offloaded)) for on in (False, True))
    assert behind.host["gradients"] == 2 * LLAMA_8B.num_params and within.host["gradients"] == 0
    assert {**behind.host, "gradients": 0} == within.host and behind.device == within.device
    optimizer = AdamW(clip_norm=0.0)
    steps = (
        make_step(
            SMALL, profile=Profile(loss_tile=128, mlp_tile=128, update_in_backward=on, **offloaded), optimizer=optimizer
        )
        for on in (False, True)
    )
    behind, within = (plan_of(step, 1, 512) for step in steps)
    weights = behind.host["weights"]
    assert behind.host["gradients"] == weights and "gradients" not in within.host
    assert within.host["weights"] == weights and within.host["optimizer"] == behind.host["optimizer"]
