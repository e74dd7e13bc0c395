# pytest tests/mesh/test_token_losses.py
"""The loss of each token and the exact matches: against the logits themselves, on meshes and with packed documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.config import IGNORED
from alst_jax.ops.cross_entropy import LogitScaling, token_losses
from alst_jax.profile import Profile
from tests.helpers import PLAIN, initial, make_step, packed, random_batch, tiny
from tests.mesh.test_families_profiles import FIELDS, model_of

FEATURES = Profile(
    loss_tile=5,
    mlp_tile=7,
    remat=True,
    offload_activations=True,
    offload_weights=True,
    head_chunks=2,
    segment_layers=(2,),
)


def test_by_hand():
    """Three tokens of two numbers, a vocabulary of three: the logits are those numbers and their sum."""
    h, table = np.float32([[0, 0], [2, -1], [1, 3]]), np.float32([[1, 0], [0, 1], [1, 1]])
    found = token_losses(jnp.asarray(h), jnp.asarray(table), jnp.asarray([2, 0, IGNORED]), tile=2)
    # log 3; log(e^2 + e^-1 + e^1) - 2. Three equal logits: the first counts as the largest, and the label is the third.
    np.testing.assert_allclose(found.losses, [np.log(3), np.log(np.exp(2) + np.exp(-1) + np.exp(1)) - 2, 0], rtol=1e-6)
    assert found.hits.tolist() == [False, True, False]
    capped = token_losses(jnp.asarray(h), jnp.asarray(table), jnp.asarray([2, 0, 2]), 1, LogitScaling(2.0, 0.5))
    x = 0.5 * np.tanh(h[2] @ table.T / 2 / 0.5)
    assert capped.losses[2] == pytest.approx(np.log(np.exp(x).sum()) - x[2], rel=1e-6) and capped.hits[2]


@pytest.fixture(scope="module")
def alone():
    step, batch = make_step(), random_batch()
    params = initial(step)
    return batch, jax.tree.map(np.asarray, step.token_losses(*step.split(params), step.put_batch(**batch)))


def test_they_add_up_to_the_loss(alone):
    batch, found = alone
    step = make_step()
    total = step.loss(*step.split(initial(step)), step.put_batch(**batch), jnp.float32(1))
    assert found.losses.sum() == pytest.approx(float(total), rel=1e-5)
    assert not found.losses[batch["labels"] == IGNORED].any() and not found.hits[batch["labels"] == IGNORED].any()
    assert found.losses.shape == (4, 64) and 0 < found.hits.mean() < 0.2


@pytest.mark.parametrize(
    "dp,sp,profile",
    [
        pytest.param(2, 2, FEATURES, id="2x2, every feature"),
        pytest.param(1, 4, PLAIN, id="1x4", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_equals_one_device(dp, sp, profile, alone):
    batch, expected = alone
    step = make_step(dp=dp, sp=sp, profile=profile)
    found = step.token_losses(*step.split(initial(step)), step.put_batch(**batch))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5, atol=1e-5)
    assert (np.asarray(found.hits) == expected.hits).all() and found.losses.is_fully_replicated


def test_packed_documents_are_those_alone():
    together, alone = packed([[20, 44], [33, 30]], 64, 1)
    step = make_step(tiny(num_layers=2))
    params = step.split(initial(step))
    one, other = (step.token_losses(*params, step.put_batch(**batch)).losses for batch in (together, alone))
    learned = lambda losses, batch: np.asarray(losses)[batch["labels"] != IGNORED]
    np.testing.assert_allclose(learned(one, together), learned(other, alone), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FIELDS)
def test_every_family(family):
    """Packed, on four devices and with every feature, the losses add up to the loss of the documents alone. Families
    whose rotary embedding depends on the length take whole rows."""
    model = model_of(family)
    whole = any(rope.needs_length for rope in model.ropes)
    together, one_a_row = packed([[64], [64]] if whole else [[20, 44], [33, 31]], 64, 2)
    step, plain = make_step(model, 2, 2, FEATURES), make_step(model)
    found = step.token_losses(*step.split(initial(step)), step.put_batch(**together))
    total = plain.loss(*plain.split(initial(plain)), plain.put_batch(**one_a_row), jnp.float32(1))
    assert np.asarray(found.losses).sum() == pytest.approx(float(total), rel=1e-5)
