# pytest tests/memory/test_runs_on_record.py
"""The cost model beside runs on record."""

import dataclasses

import pytest

from alst_jax.ops.attention.costs import RATES
from alst_jax.planning.estimate import estimate
from benchmarks.shapes import llama_8b
from tests.memory.machines_and_jobs import H100, job

OFFLOADED = dict(offload_activations=True, offload_weights=True, offload_optimizer=True)
# TFLOPS of the attention kernels of the runs of 2026-11-24 with attention "recorded": tokamax forward, cuDNN backward.
RECORDED = {"forward": {32768: 645, 131072: 652, 524288: 646}, "backward": {32768: 529, 131072: 513, 524288: 550}}
LARGER_TILES = dict(attention="recorded", mlp_tile=16384, loss_tile=8192)


# benchmarks/results/2026-11-24-h200.md: forward + backward
# fmt: off
@pytest.mark.parametrize("layers,length,changes,measured", [
    (4, 65536, dict(keep_attention_on_device=4), 1.999),
    (4, 65536, {}, 2.232),
    (4, 131072, dict(keep_attention_on_device=4), 5.890),
    (4, 131072, {}, 6.905),
    (32, 131072, OFFLOADED | dict(segment_layers=(4,), keep_attention_on_device=16, keep_attention_on_host=16), 48.8),
    # 2026-11-24-h100.md
    (4, 65536, LARGER_TILES | dict(keep_attention_on_device=4), 1.940),
    (4, 131072, LARGER_TILES | dict(keep_attention_on_device=4), 5.670),
    (32, 524288, OFFLOADED | dict(
        segment_layers=(7, 7, 8, 6, 3, 1), keep_attention_on_device=11, keep_attention_on_host=10, head_chunks=8,
        attention="recorded"), 559.2),
])
# fmt: on
def test_seconds_of_runs_on_record(layers, length, changes, measured, monkeypatch):
    monkeypatch.setitem(RATES, "recorded", RECORDED)
    predicted = estimate(
        dataclasses.replace(job(llama_8b(layers), length, **changes), states="int8", master="low-bits"), H100
    )
    assert predicted.step_seconds == pytest.approx(measured, rel=0.15)


# benchmarks/results/2026-11-24-h100.md and 2026-11-27-flash.md: whole steps
# fmt: off
@pytest.mark.parametrize("layers,length,changes,seconds,gibibytes", [
    (32, 131072, OFFLOADED | dict(keep_attention_on_device=32), 44.64, 45.34),
    (32, 524288, OFFLOADED | dict(
        segment_layers=(5, 12, 8, 4, 2, 1), keep_attention_on_device=12, keep_attention_on_host=15, head_chunks=8,
        update_in_backward=True), 534.85, 75.35),
    (32, 131072, dict(
        attention="flash", offload_activations=True, keep_attention_on_device=21, keep_attention_on_host=11,
        head_chunks=4), 38.95, 74.6),
    (32, 524288, OFFLOADED | dict(
        attention="flash", segment_layers=(3, 6, 8, 8, 4, 2, 1), keep_attention_on_device=11, keep_attention_on_host=9,
        head_chunks=8), 510.3, 71.4),
])
# fmt: on
def test_steps_on_record(layers, length, changes, seconds, gibibytes, monkeypatch):
    monkeypatch.setitem(RATES, "recorded", RECORDED)
    changed = job(llama_8b(layers), length, **LARGER_TILES | changes)
    predicted = estimate(dataclasses.replace(changed, states="int8", master="none"), H100)
    assert predicted.step_seconds == pytest.approx(seconds, rel=0.05)
    assert predicted.device_bytes == pytest.approx(gibibytes * 2**30, rel=0.05)
