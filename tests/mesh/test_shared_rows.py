# pytest tests/mesh/test_shared_rows.py
"""Inputs of segments in the memory of gradients: equal to separate arrays, and really there."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.config import TrainConfig, UserError
from alst_jax.hardware.machines import parse_cluster
from alst_jax.planning import planner
from alst_jax.planning.job import Job
from alst_jax.profile import Profile
from alst_jax.segments import segment_inputs, shared_inputs
from benchmarks.shapes import llama_8b
from tests.helpers import PLAIN, initial, loss_and_grad, make_step, random_batch, tiny

# Room for 192 of the 256 tokens in the gradients of one layer: 32 (q) + 16 (k) + 16 (v) + 32 (o) + 3 x 32 (MLP).
MODEL = tiny(
    num_layers=4,
    hidden_size=32,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    attention_bias=False,
    mlp_bias=False,
)
HOST = dict(remat=True, offload_activations=True, offload_weights=True, offload_optimizer=True)
PROFILE = dataclasses.replace(PLAIN, **HOST, segment_layers=(2,))


def places(lengths, tokens, per_layer=192):
    return shared_inputs(Profile(segment_layers=lengths).segments(sum(lengths)), tokens, per_layer)


@pytest.mark.parametrize(
    "lengths,tokens,expected",
    [
        ((2, 2, 2, 2), 256, {3: 6, 2: 4, 1: 2}),  # two layers each; the first segment's input is not saved
        ((2, 2, 2, 2), 577, {3: 4, 2: 0}),  # four layers each: no place is left for that of segment 1
        ((2, 2, 2, 2), 192, {}),  # one layer: its loop has one trip, and the copies would stay on the device
        ((2, 1, 3, 2), 256, {3: 6, 2: 4}),  # a segment of one layer saves its input by itself
        ((2, 4, 1, 1), 256, {1: 4}),  # not in the rows of layers 6 and 7, which are written before it is read
        ((8,), 256, {}),
        ((2, 6), 1600, {}),
    ],
)
def test_places_by_hand(lengths, tokens, expected):
    assert places(lengths, tokens) == expected


def test_an_input_lies_where_nothing_is_written_before_it_is_read():
    for lengths in ((3, 6, 8, 8, 4, 2, 1), (2,) * 16, (1, 1, 9, 9, 9, 3), (4, 4, 8, 16)):
        segments = Profile(segment_layers=lengths).segments(32)
        for per_layer in (53250, 100_000, 300_000):
            found = shared_inputs(segments, 524288, per_layer)
            layers = -(-524288 // per_layer)
            rows = [range(first, first + layers) for first in found.values()]
            assert len({row for span in rows for row in span}) == layers * len(found)  # none twice
            assert all(span[-1] < segments[n].runs[-1].stop for n, span in zip(found, rows))
    assert places((3, 6, 8, 8, 4, 2, 1), 524288, 53250) == {5: 21, 4: 11, 3: 1}  # Llama-8B: three of five


def test_a_single_input_that_is_not_shared_takes_two_rows():
    segments = Profile(segment_layers=(2, 2, 2, 2)).segments(8)
    assert [segment_inputs(segments, True, shared) for shared in (0, 1, 2, 3)] == [3, 2, 2, 0]


@functools.cache
def step_that(share, dp, sp):
    return make_step(MODEL, dp, sp, dataclasses.replace(PROFILE, share_gradients=share))


@pytest.mark.parametrize("dp,sp", [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_equal_to_separate_arrays(dp, sp):
    """Loss and gradients, bit for bit."""
    steps = [step_that(share, dp, sp) for share in (False, True)]
    results = [loss_and_grad(step, initial(step), random_batch(MODEL)) for step in steps]
    jax.tree.map(np.testing.assert_array_equal, *results)


def host_arrays(share):
    """Shapes of arrays in host memory with a segment's or more of hidden states."""
    step = step_that(share, 1, 1)
    batch = step.put_batch(**random_batch(MODEL))
    arguments = *step.split(initial(step)), batch, jnp.float32(1)  # as in the run above: traced once
    jaxpr = str(step.loss_and_grad.trace(*arguments).jaxpr)
    return set(re.findall(r"<host>\[(\d,4,64,32)\]", jaxpr))


def test_no_array_is_left_for_them():
    assert host_arrays(False) == {"1,4,64,32", "2,4,64,32"} and host_arrays(True) == set()


@pytest.mark.parametrize(
    "changes",
    [
        dict(offload_weights=False, offload_optimizer=False),
        dict(offload_activations=False),
        dict(update_in_backward=True),
    ],
)
def test_refused_where_there_is_nothing_to_share(changes):
    with pytest.raises(UserError, match="--share-gradients stores layer inputs in the host memory of gradients"):
        dataclasses.replace(Profile(share_gradients=True, **HOST), **changes).check()


def test_refused_where_no_input_finds_room():
    """Segments of one layer keep all inputs; an input larger than the gradients of the layers before finds no room."""
    job = lambda length, **changes: Job(
        llama_8b(8),
        Profile(attention="flash", compute_dtype="bfloat16", share_gradients=True, **HOST, **changes),
        1,
        length,
        states="int8",
        master="none",
    )
    choose = planner.Planner(TrainConfig(memory="manual"), parse_cluster("H200-141", 500), False, None).choose
    assert choose(job(131072, segment_layers=(4,))).job.shared_inputs == 1
    for refused in (job(131072), job(524288, segment_layers=(4,))):
        with pytest.raises(UserError, match="--share-gradients: has no effect here"):
            choose(refused)


def test_reading_ahead_is_refused_where_nothing_is_read():
    job = lambda **changes: Job(
        llama_8b(8), Profile(attention="flash", compute_dtype="bfloat16", prefetch_activations=True, **changes), 1, 4096
    )
    choose = planner.Planner(TrainConfig(memory="manual"), parse_cluster("H200-141", 500), False, None).choose
    for read in (dict(offload_activations=True), dict(keep_attention_on_host=3)):
        assert choose(job(**read)).job.profile.prefetch_activations
    for refused in ({}, dict(keep_attention_on_host=1), dict(segment_layers=(2,), keep_attention_on_host=2)):
        with pytest.raises(UserError, match="--prefetch-activations: has no effect here"):
            choose(job(**refused))


def test_rebuilt_inputs_alone_are_refused_where_nothing_is_rebuilt():
    job = lambda **changes: Job(
        llama_8b(8),
        Profile(attention="flash", compute_dtype="bfloat16", rebuild_inputs_alone=True, **HOST, **changes),
        1,
        131072,
    )
    choose = planner.Planner(TrainConfig(memory="manual"), parse_cluster("H200-141", 500), False, None).choose
    assert choose(job(segment_layers=(4,))).job.profile.rebuild_inputs_alone
    with pytest.raises(UserError, match="--rebuild-inputs-alone: no segment has several layers"):
        choose(job())
