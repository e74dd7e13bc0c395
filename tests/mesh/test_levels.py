# pytest tests/mesh/test_levels.py
"""Save levels: q, k, v, gate and up kept on the device. Equal to the plain step, and really not computed again."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from alst_jax.config import UserError
from alst_jax.profile import Profile
from alst_jax.stack import layer
from tests import stand_in
from tests.helpers import PLAIN, assert_trees_close, initial, loss_and_grad, make_step, random_batch, tiny, train
from tests.mesh import test_profiles

MODEL = tiny(num_layers=4, attention_bias=True, mlp_bias=False)  # D 64, F 96, N H 128, K H 32
TILES = dict(loss_tile=7, mlp_tile=5)
HOST = dict(offload_activations=True, offload_weights=True, offload_optimizer=True)


def levels(device, qkv, mlp=0, host=0):
    return dict(
        keep_attention_on_device=device, keep_attention_on_host=host, keep_qkv_on_device=qkv, keep_mlp_on_device=mlp
    )


@functools.cache
def reference(trains):
    """Loss and gradients of the plain step; trains: the losses and the updated weights of two."""
    step = make_step(MODEL)
    return (
        train(step, random_batch(MODEL), steps=2) if trains else loss_and_grad(step, initial(step), random_batch(MODEL))
    )


@pytest.mark.parametrize(
    "mesh,changes",
    [
        ((1, 1), levels(4, 3, 2) | TILES),
        pytest.param((1, 1), levels(4, 4), marks=pytest.mark.slow),
        pytest.param(
            (1, 1),
            levels(3, 2, 1, host=1) | dict(segment_layers=(2,), attention="flash") | TILES | HOST,
            marks=pytest.mark.slow,
        ),
        pytest.param((1, 4), levels(3, 3, 2) | dict(head_chunks=2) | TILES, marks=pytest.mark.slow),
        ((2, 2), levels(4, 3, 2) | dict(segment_layers=(1, 3), head_chunks=4, attention="flash") | TILES | HOST),
        ((1, 2), levels(0, 0, host=4) | dict(segment_layers=(4,), prefetch_activations=True, head_chunks=2) | HOST),
    ],
    ids=test_profiles.name,
)
def test_each_level_equals_the_plain_step(mesh, changes, monkeypatch):
    """Updated weights where little is compiled besides; tests of the update in the backward pass have them, too."""
    calls, trains = stand_in.install(monkeypatch), mesh == (1, 1)
    step = make_step(MODEL, *mesh, dataclasses.replace(PLAIN, remat=True, **changes))
    batch = random_batch(MODEL)
    found = train(step, batch, steps=2) if trains else loss_and_grad(step, initial(step), batch)
    expected = reference(trains)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert_trees_close(found[1], expected[1], 1e-5)
    if trains:
        assert_trees_close(found[2], expected[2], 1e-4)
    assert ("flash" in calls) == ("attention" in changes)


def products(jaxpr, shape) -> int:
    """How often a step computes tokens @ weight, with a weight of this shape."""
    total = 0
    for eqn in jaxpr.eqns:
        trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        total += trips * sum(products(x, shape) for x in inner if hasattr(x, "eqns"))
        if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.shape == shape:
            total += eqn.params["dimension_numbers"][0][1] == (0,)
    return total


def counted(monkeypatch, **changes):
    """Products with q's, with k's and v's, with gate's and up's weight in a step of 4 layers, each in one tile."""
    jaxpr = test_profiles.traced(monkeypatch, mlp_tile=256, **changes)
    return tuple(products(jaxpr, shape) for shape in ((64, 128), (64, 32), (64, 96)))


@pytest.mark.parametrize(
    "changes,expected",
    [
        pytest.param(levels(4, 0), (8, 16, 16), marks=pytest.mark.slow),
        (levels(4, 4, 3), (4, 8, 10)),
        # The first three layers of a segment are rebuilt: gate and up would be computed three times.
        pytest.param(levels(4, 3) | dict(segment_layers=(4,)), (5, 10, 22), marks=pytest.mark.slow),
        (levels(4, 4, 2) | dict(segment_layers=(4,)), (4, 8, 16)),
    ],
    ids=str,
)
def test_what_is_kept_is_not_computed_again(changes, expected, monkeypatch):
    assert counted(monkeypatch, **changes) == expected


def test_without_the_known_values_they_are_computed_again(monkeypatch):
    """The control of the test above: `instead` that gives the value computed now."""
    monkeypatch.setattr(layer, "instead", lambda known, made: made)
    assert counted(monkeypatch, **levels(4, 4, 3)) == (4, 8, 16)


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            dict(keep_qkv_on_device=1),
            "--keep-qkv-on-device 1: more than --keep-attention-on-device 0; a layer that keeps "
            "q, k and v keeps its attention output too, so use --keep-attention-on-device 1 or more",
        ),
        (levels(2, 1, 2), "--keep-mlp-on-device 2: more than --keep-qkv-on-device 1"),
        (levels(1, 1) | dict(remat=False), "--keep-qkv-on-device are parts of rematerialisation"),
        (levels(1, 1) | dict(stack="plain"), "--keep-qkv-on-device needs --stack segments"),
    ],
    ids=str,
)
def test_levels_are_nested_and_need_the_hand_written_backward_pass(changes, message):
    with pytest.raises(UserError, match=message):
        make_step(MODEL, profile=Profile(**changes))
