# pytest tests/mesh/test_packing.py
"""Packed documents compute exactly what they would alone: loss and every gradient, on meshes, with all features."""

import jax.numpy as jnp
import pytest

from alst_jax.data.packing import offsets_of
from alst_jax.models.config import LayerKind
from alst_jax.ops.attention import buckets
from alst_jax.optim.adamw import AdamW
from alst_jax.profile import Profile
from tests import stand_in
from tests.helpers import assert_trees_close, initial, make_step, packed, tiny, to_numpy

MODEL = tiny(num_layers=2, attention_bias=False, mlp_bias=False, layer_kinds=(LayerKind(), LayerKind(window=5)))
LENGTH = 64
# Lengths of the documents of each row. On 4 shards of 16 tokens: borders on edges of shards and inside of them, documents
# of one token, a document over three shards, one that is the whole row, padding behind.
ROWS = [[16, 16, 1, 1, 30], [64], [7, 40, 17], [1, 2, 3, 50]]
HOST = dict(offload_activations=True, offload_weights=True, offload_optimizer=True)
EVERYTHING = dict(
    segment_layers=(2,),
    keep_attention_on_host=1,
    keep_attention_on_device=1,
    keep_qkv_on_device=1,
    keep_mlp_on_device=1,
    head_chunks=2,
    loss_tile=7,
    mlp_tile=5,
    **HOST,
)


def summed(step, params, batch):
    """Summed loss and the gradients of all parameters."""
    loss, gradients = step.loss_and_grad(*step.split(params), step.put_batch(**batch), jnp.float32(0.01))
    return float(loss), to_numpy(gradients)


@pytest.fixture(scope="module")
def one_by_one():
    """Loss and gradients of the documents of ROWS, each in a row of its own, plain."""
    step = make_step(MODEL)
    return summed(step, initial(step), packed(ROWS, LENGTH, 1)[1])


@pytest.mark.parametrize(
    "mesh,changes",
    [
        ((1, 1), {}),
        ((1, 4), {}),
        ((2, 4), dict(segment_layers=(2,), keep_attention_on_device=1)),
        ((1, 4), EVERYTHING),
        ((4, 2), dict(stack="plain", head_chunks=2, mlp_tile=5)),
    ],
    ids=str,
)
def test_packed_documents_equal_documents_one_by_one(mesh, changes, one_by_one):
    step = make_step(MODEL, *mesh, Profile(**{"loss_tile": None, "mlp_tile": None} | changes))
    params = initial(step)
    loss, gradients = summed(step, params, packed(ROWS, LENGTH, mesh[0])[0])
    assert loss == pytest.approx(one_by_one[0], rel=1e-5)
    assert_trees_close(gradients, one_by_one[1], 1e-5)


def test_a_loop_of_dense_calls_on_four_devices(monkeypatch):
    """The kernel cudnn, with a stand-in for cuDNN, against XLA's documents on one device."""
    plain, batch = make_step(tiny(num_layers=1)), packed(ROWS, LENGTH, 1)[0]
    expected = summed(plain, initial(plain), batch)
    monkeypatch.setattr(buckets, "SMALLEST", 16)
    calls = stand_in.install(monkeypatch)
    changes = dict(attention="cudnn", head_chunks=2, segment_layers=(1,), keep_attention_on_device=1)
    step = make_step(tiny(num_layers=1), 1, 4, Profile(**changes))
    loss, gradients = summed(step, initial(step), batch)
    assert {shape[1] for shape in calls} == {16, 24, 32, 48, 64}
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert_trees_close(gradients, expected[1], 1e-5)


def test_borders_count(one_by_one):
    """The negative control: without the documents, loss and gradients differ."""
    step = make_step(MODEL)
    batch = packed(ROWS, LENGTH, 1)[0] | {"documents": None}
    loss, gradients = summed(step, initial(step), batch)
    assert abs(loss / one_by_one[0] - 1) > 1e-4
    with pytest.raises(AssertionError):
        assert_trees_close(gradients, one_by_one[1], 1e-3)


@pytest.mark.parametrize(
    "mesh",
    [(1, 1), pytest.param((1, 4), marks=pytest.mark.slow), pytest.param((2, 4), marks=pytest.mark.slow)],
    ids=str,
)
def test_257_documents_in_one_sequence(mesh):
    rows = [[1] * 128 + [2] * 129] * mesh[0]
    step, one = make_step(MODEL, *mesh), make_step(MODEL)
    params = initial(step)
    together, alone = packed(rows, 512, mesh[0])[0], packed(rows, 512, 1)[1]
    results = summed(step, params, together)
    expected = summed(one, initial(one), {name: x[:, :2] for name, x in alone.items()})
    assert results[0] == pytest.approx(expected[0], rel=1e-5)
    assert_trees_close(results[1], expected[1], 1e-5)


def test_one_program_serves_any_number_of_documents():
    step = make_step(MODEL)
    params = step.split(initial(step))
    for rows in ([[64], [10]], [[1] * 20, [30, 30]], [[5, 5, 5], [64]]):
        batch = packed(rows, LENGTH, 1)[0]
        documents = offsets_of(rows, LENGTH, 1, 64)
        step.loss(*params, step.put_batch(**batch | {"documents": documents}), jnp.float32(1))
    assert step.loss._cache_size() == 1  # jax has no public name for it


def test_an_update_in_the_backward_pass_on_packed_documents():
    """Weights after one step, with and without it."""
    results, batch = [], packed(ROWS, LENGTH, 1)[0]
    for changes in (HOST | dict(update_in_backward=True), {}):
        step = make_step(MODEL, profile=Profile(**changes), optimizer=AdamW(eps=1e-4, clip_norm=0.0))
        trained, frozen = step.split(initial(step))
        state, put, rate, scale = (
            step.init_optimizer(trained),
            step.put_batch(**batch),
            jnp.float32(1e-2),
            jnp.float32(0.01),
        )
        if changes:
            trained = step.update_in_backward(trained, frozen, state, put, scale, rate)[4]
        else:
            _, gradients = step.loss_and_grad(trained, frozen, put, scale)
            trained, _ = step.update(trained, gradients, state, step.gradient_norm(gradients), rate)
        results.append(to_numpy(trained))
    assert_trees_close(*results, 1e-5)
