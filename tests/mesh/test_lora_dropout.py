# pytest tests/mesh/test_lora_dropout.py
"""Dropout of adapters: the same masks under every profile and on every mesh, other ones each step, none in
evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.models.lora import Lora
from alst_jax.ops.dropout import dropout
from alst_jax.stack.batch import Batch
from alst_jax.trainer import TrainState, optimizer_step
from tests.helpers import PLAIN, assert_trees_close, make_step, random_batch, tiny, to_numpy
from tests.mesh.test_lora import CASES as FEATURES
from tests.mesh.test_lora import HOST, TILES, UNCLIPPED, begin

MODEL = tiny(lora=Lora(4, 8.0, dropout=0.3, seed=5), qk_norm="all heads")  # head chunks need the norms of all heads
CASES = {
    "one device, in host memory": (
        (1, 1),
        dict(segment_layers=(2, 1), keep_attention_on_host=1, head_chunks=2, **TILES, **HOST),
    ),
    "ulysses, head chunks": FEATURES["ulysses, head chunks"],
    "plain stack, tiles": ((2, 2), dict(stack="plain", head_chunks=2, **TILES)),
}
DRAWS = np.array([7, 0], np.uint32)  # see Batch.draws
SCALE = 1 / 200


@pytest.fixture(scope="module")
def plain():
    return make_step(MODEL, profile=PLAIN, optimizer=UNCLIPPED)


def gradients_of(step):
    batch = step.put_batch(**random_batch(), draws=DRAWS)
    loss, gradients = step.loss_and_grad(*begin(step), batch, jnp.float32(SCALE))
    return float(loss), to_numpy(gradients)


@pytest.fixture(scope="module")
def without_features(plain):
    return gradients_of(plain)


@pytest.mark.parametrize(
    "case", [name if n == 1 else pytest.param(name, marks=pytest.mark.slow) for n, name in enumerate(CASES)]
)
def test_no_feature_changes_the_masks(case, without_features):
    mesh, changes = CASES[case]
    step = make_step(MODEL, *mesh, profile=dataclasses.replace(PLAIN, remat=True, **changes), optimizer=UNCLIPPED)
    loss, gradients = gradients_of(step)
    np.testing.assert_allclose(loss, without_features[0], rtol=1e-6)
    assert_trees_close(gradients, without_features[1], 1e-5)


def test_masks_are_of_the_step_and_the_token(plain, without_features):
    """A step's masks do not depend on its division into batches; another step has others, and evaluation has none."""
    whole, (trained, frozen) = random_batch(), begin(plain)

    def loss(draws, rows=slice(0, 4)):
        part = {name: np.tile(array[rows], (2 if rows != slice(0, 4) else 1, 1)) for name, array in whole.items()}
        if rows != slice(0, 4):  # rows twice, to compile once; the second ones are not learned
            part["labels"][2:] = -100
        if draws is None:
            return float(plain.loss(trained, frozen, plain.put_batch(**part), jnp.float32(SCALE)))
        batch = plain.put_batch(**part, draws=np.array(draws, np.uint32))
        return float(plain.loss_and_grad(trained, frozen, batch, jnp.float32(SCALE))[0])

    np.testing.assert_allclose(loss((7, 0)), without_features[0], rtol=1e-6)
    halves = loss((7, 0), slice(0, 2)) + loss((7, 2 * 64), slice(2, 4))
    np.testing.assert_allclose(halves, without_features[0], rtol=1e-6)
    others = [loss((8, 0)), loss((7, 1)), loss(None)]
    assert all(abs(other - without_features[0]) > 1e-4 for other in others) and len(set(others)) == 3


def test_without_draws_the_program_is_that_without_dropout():
    """`loss` for evaluation: the same operations as of adapters without dropout, and no random bits."""

    def program(lora, draws):
        step = make_step(tiny(lora=lora), profile=PLAIN)
        batch = Batch.abstract(4, 64, step.mesh, dropout=draws)
        return str(step.loss.trace(step.trained, step.frozen, batch, jax.ShapeDtypeStruct((), jnp.float32)).jaxpr)

    dropped = Lora(4, 8.0, dropout=0.3)
    assert program(dropped, draws=False) == program(Lora(4, 8.0), draws=False)
    assert "threefry2x32" in program(dropped, draws=True)


def test_a_step_of_training_draws_the_masks(plain):
    """Two batches are one batch, loss and gradients, and the number of the step decides."""
    whole = random_batch()

    def found(number, *parts):
        trained, frozen = begin(plain)
        state = TrainState(trained, frozen, plain.init_optimizer(trained), number)
        batches = [{name: x[part] for name, x in whole.items()} for part in parts]
        values = optimizer_step(plain, state, batches, 0.0)[1]
        return values["loss"], values["grad_norm"]

    (one, norm), (trained, frozen) = found(7, slice(0, 4)), begin(plain)
    halves = found(7, slice(0, 2), slice(2, 4))
    np.testing.assert_allclose(halves[0], one, rtol=1e-6)
    np.testing.assert_allclose(halves[1], norm, rtol=1e-5)
    assert abs(found(8, slice(0, 4))[0] - one) > 1e-6
    labels = np.count_nonzero(whole["labels"] >= 0)
    without = float(plain.loss(trained, frozen, plain.put_batch(**whole), jnp.float32(1 / labels)))
    assert abs(without - one) > 1e-6


def test_the_mean_over_masks_is_the_input_in_bfloat16():
    x, keys = jnp.full((64, 4096), 3.0, jnp.bfloat16), jnp.arange(128, dtype=jnp.uint32).reshape(64, 2)
    dropped = dropout(x, keys, 0.1).astype(jnp.float32)
    kept = dropped[dropped > 0]
    assert float(kept[0]) == float(jnp.bfloat16(3 / 0.9)) and abs(kept.size / x.size - 0.9) < 2e-3
