# pytest tests/memory/test_levels.py
"""Save levels in the plan: bytes, the compiler's bytes, seconds, and what --memory auto does with free memory."""

import dataclasses

import pytest

from alst_jax.hardware.machines import parse_cluster
from alst_jax.optim.adamw import AdamW
from alst_jax.planning.candidates import Search, segments_within
from alst_jax.planning.estimate import estimate
from alst_jax.planning.job import Job, Passes
from alst_jax.planning.search import choose
from alst_jax.profile import DEVICE, HOST, Profile
from benchmarks.shapes import LLAMA_8B
from tests.helpers import job_of, make_step, plan_of, tiny

H100 = parse_cluster("H100-80", 125)
LENGTH = 131072
OUTPUT, QKV, GATED = LENGTH * (4096 * 2 + 32 * 4), LENGTH * 2 * (4096 + 2 * 1024), LENGTH * 2 * 2 * 14336


def levels(device, qkv, mlp=0, host=0):
    return dict(
        keep_attention_on_device=device, keep_attention_on_host=host, keep_qkv_on_device=qkv, keep_mlp_on_device=mlp
    )


def job(length=LENGTH, grad_accum=1, **changes) -> Job:
    return Job(
        LLAMA_8B,
        Profile(attention="flash", compute_dtype="bfloat16", **changes),
        1,
        length,
        grad_accum=grad_accum,
        states="int8",
        master="none",
    )


def test_bytes_of_each_level_by_hand():
    kept = lambda **changes: job(offload_activations=True, **changes).kept[DEVICE]
    assert kept(**levels(8, 0, host=4)) == 8 * OUTPUT
    assert kept(**levels(8, 5, host=4)) == 8 * OUTPUT + 5 * QKV
    assert kept(**levels(8, 5, 3, host=4)) == 8 * OUTPUT + 5 * QKV + 3 * GATED
    assert job(offload_activations=True, **levels(8, 5, 3, host=4)).kept[HOST] == 32 * LENGTH * 8192 + 4 * OUTPUT
    # A segment that the backward pass reaches later finds the arrays of later segments freed.
    work = lambda **changes: estimate(job(segment_layers=(16,), **changes)).device_bytes
    assert work(**levels(8, 8)) - work(**levels(8, 0)) == pytest.approx(8 * QKV, rel=0.02)


def test_products_of_each_level_by_hand():
    passes = lambda **changes: job(**changes).passes
    assert passes(**levels(32, 0)) == Passes(32, 3 * 32, 64, 64)
    assert passes(**levels(32, 8, 4)) == Passes(32, 3 * 32 - 8, 64, 64, gate_and_up_known=4)
    # Of the last segment of 4 layers, all but the last are rebuilt, with the gate and up that are known.
    assert passes(segment_layers=(4,), **levels(32, 8, 4)).gate_and_up_known == 4 + 3


def test_seconds_that_each_level_spares():
    """The products at 650 TFLOPS, less four times the bytes of what is kept at the rate of device memory."""
    seconds = lambda **changes: estimate(job(**changes), H100).seconds["matmuls"]
    flops = 2 * LENGTH * 4096
    qkv = flops * (4096 + 2 * 1024) / 650e12 - 4 * QKV / H100.machine.bandwidth
    gated = flops * 2 * 14336 / 650e12 - 4 * GATED / H100.machine.bandwidth
    assert seconds(**levels(32, 0)) - seconds(**levels(32, 3)) == pytest.approx(3 * qkv, rel=1e-3)
    assert seconds(**levels(32, 3)) - seconds(**levels(32, 3, 2)) == pytest.approx(2 * gated, rel=1e-3)
    assert 0.004 < qkv / (QKV / 2**30) < 0.007  # by GiB; an attention output spares about 0.2 s


SMALL = tiny(
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_layers=4,
    attention_bias=False,
    mlp_bias=False,
)


def test_the_compiler_keeps_as_many_bytes_more():
    """Compiled for a CPU: as many bytes more as planned, and not one layer's beside them."""
    plans = []
    for changes in (levels(4, 0), levels(4, 2, 2)):  # a run of one layer is no loop, and needs copies
        step = make_step(SMALL, 1, 1, Profile(loss_tile=128, mlp_tile=128, **changes), AdamW())
        plans.append((plan_of(step, 1, 8192), estimate(job_of(step, 1, 8192))))
    temporary = lambda plan: plan.device["working set"] + plan.device["kept activations"]
    compiled, planned = (temporary(more) - temporary(none) for none, more in zip(*plans))
    expected = 8192 * 4 * 2 * (128 + 2 * 64 + 2 * 256)
    assert planned == pytest.approx(expected, rel=0.02)
    assert compiled == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("length,grad_accum,machine", [(32768, 12, "H100-80"), (65536, 1, "H200-141")])
def test_auto_fills_free_memory(length, grad_accum, machine):
    """With the levels fixed at none, memory stays free and the step is slower."""
    cluster = parse_cluster(machine, 125)
    asked = job(length, grad_accum)
    none = choose(asked, Search(cluster, frozenset({"keep_qkv_on_device", "keep_mlp_on_device"})))
    free = choose(asked, Search(cluster))
    profile = free.job.profile
    assert profile.keep_qkv_on_device > 0 == none.job.profile.keep_qkv_on_device
    assert free.plan.step_seconds < none.plan.step_seconds and free.plan.device_bytes > none.plan.device_bytes
    assert profile.keep_mlp_on_device <= profile.keep_qkv_on_device <= profile.keep_attention_on_device
    all_qkv = profile.keep_qkv_on_device == profile.keep_attention_on_device
    name = "keep_mlp_on_device" if all_qkv else "keep_qkv_on_device"
    if getattr(profile, name) < 30:  # two more do not fit; one alone would be no loop
        more = free.job.changed(**{name: getattr(profile, name) + 2})
        assert Search(cluster).lacks(more)
    if grad_accum > 1:
        assert f"The next faster choice, with --keep-qkv-on-device {profile.keep_qkv_on_device + 1}" in free.explain()


def test_typed_levels_stay():
    typed = levels(32, 7, 2)
    chosen = choose(job(32768, **typed), Search(H100, frozenset(typed))).job.profile
    assert (chosen.keep_qkv_on_device, chosen.keep_mlp_on_device) == (7, 2)


def test_segments_leave_room_for_kept_arrays():
    long = job(262144, offload_activations=True, offload_weights=True, offload_optimizer=True, head_chunks=8)
    search = Search(H100)
    without, with_them = (
        segments_within(
            dataclasses.replace(long, profile=dataclasses.replace(long.profile, **levels(8, n))), search, 1.0
        )
        for n in (0, 8)
    )
    assert with_them[-1] < without[-1]
