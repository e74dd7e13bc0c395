# pytest tests/mesh/test_features.py
"""Every feature on equals the feature off, alone and with the others, on one device and on four; and it is really
on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.config import IGNORED
from alst_jax.profile import Profile
from tests.helpers import PLAIN, assert_trees_close, initial, make_step, random_batch, tiny, train

MODEL = tiny(num_layers=2, attention_bias=False, mlp_bias=False)
FEATURES = {
    "loss_tile": 7, "mlp_tile": 5, "remat": True, "offload_activations": True, "offload_weights": True,
    "offload_optimizer": True}


def profile(*features):
    chosen = {name: FEATURES[name] for name in features}
    if "offload_activations" in chosen:
        chosen["remat"] = True  # it offloads what rematerialisation keeps
    return dataclasses.replace(PLAIN, **chosen)


ALONE = [(name,) for name in FEATURES]
WITHOUT_ONE = [tuple(n for n in FEATURES if n != name) for name in FEATURES if name != "remat"]
PAIRS = [("loss_tile", "mlp_tile"), ("mlp_tile", "offload_activations"), ("offload_weights", "offload_activations"),
         ("offload_weights", "offload_optimizer")]


@pytest.fixture(scope="module")
def reference():
    return train(make_step(MODEL), random_batch(MODEL))


def check(sp, features, reference, dp=1):
    losses, gradients, weights = train(make_step(MODEL, dp=dp, sp=sp, profile=profile(*features)), random_batch(MODEL))
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    assert_trees_close(gradients, reference[1], 1e-5)
    assert_trees_close(weights, reference[2], 1e-4)


@pytest.mark.parametrize("features", [*ALONE, *PAIRS, tuple(FEATURES)], ids="+".join)
def test_on_equals_off_on_one_device(features, reference):
    check(1, features, reference)


@pytest.mark.parametrize("features", [*WITHOUT_ONE, tuple(FEATURES)], ids="+".join)
def test_on_equals_off_on_four_devices(features, reference):
    check(2, features, reference, dp=2)


def jaxpr(profile):
    step = make_step(MODEL, profile=profile)
    batch = step.put_batch(**random_batch(MODEL))
    return str(jax.make_jaxpr(step.loss_and_grad)(step.trained, step.frozen, batch, jnp.float32(1)))


def test_offloaded_carry_is_a_host_residual():
    """The scan's stacked residual, one [B, T, D] a layer, has the host memory space; without the flag nothing has."""
    stacked = f"f32<host>[{MODEL.num_layers},4,64,{MODEL.hidden_size}]"
    assert stacked in jaxpr(profile("offload_activations"))
    assert "<host>" not in jaxpr(profile("remat"))


def test_offloaded_weights_and_gradients_live_on_the_host():
    for on in (True, False):
        step = make_step(MODEL, profile=profile("offload_weights") if on else PLAIN)
        params = initial(step)
        _, gradients = step.loss_and_grad(*step.split(params), step.put_batch(**random_batch(MODEL)), jnp.float32(1))
        norm = step.gradient_norm(gradients)
        new, state = step.update(params, gradients, step.init_optimizer(params), norm, jnp.float32(1e-3))
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves((gradients, new))}
        assert kinds == {"pinned_host" if on else "device"}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {"device"}


def test_offloaded_optimizer_lives_on_the_host():
    step = make_step(MODEL, profile=profile("offload_optimizer"))
    params = initial(step)
    state = step.init_optimizer(params)
    _, gradients = step.loss_and_grad(*step.split(params), step.put_batch(**random_batch(MODEL)), jnp.float32(1))
    for _ in range(2):  # and stays there
        params, state = step.update(params, gradients, state, step.gradient_norm(gradients), jnp.float32(1e-3))
        assert {x.sharding.memory_kind for x in jax.tree.leaves((state["mu"], state["nu"]))} == {"pinned_host"}
        assert {x.sharding.memory_kind for x in jax.tree.leaves(params)} == {"device"}


def test_accumulated_gradients_sum_in_float32():
    """bfloat16 gradients of several batches are summed in float32, wherever they live, and as the single pass does."""
    for features in ((), ("offload_weights",)):
        step = make_step(MODEL, sp=2, profile=dataclasses.replace(profile(*features), compute_dtype="bfloat16"),
                         dtype=jnp.bfloat16)
        params = initial(step)
        parts, sums = [], step.zero_gradients()
        for seed in range(3):
            _, new = step.loss_and_grad(*step.split(params), step.put_batch(**random_batch(MODEL, seed=seed)), jnp.float32(1))
            parts.append(jax.tree.map(lambda x: np.asarray(x, np.float64), new))
            sums = step.add_gradients(sums, new)
        assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
        assert_trees_close(sums, jax.tree.map(lambda *xs: sum(xs), *parts), 1e-6)


def test_lengths_that_nothing_divides():
    """23 tokens a row with tiles of 7 and 5; and rows shorter than a tile."""
    batch = random_batch(MODEL, rows=1, length=23)
    one = train(make_step(MODEL), batch)
    for tiles in ((7, 5), (22, 23), (1000, 1000)):
        many = train(make_step(MODEL, profile=Profile(loss_tile=tiles[0], mlp_tile=tiles[1])), batch)
        assert_trees_close(many[1], one[1], 1e-5)
        assert_trees_close(many[2], one[2], 1e-4)


def test_padding_behind_a_document_changes_nothing():
    short, padded = random_batch(MODEL, rows=1, length=23), random_batch(MODEL, rows=1, length=32, seed=5)
    for name in ("tokens", "labels"):
        padded[name][:, :23] = short[name]
    padded["labels"][:, 23:] = IGNORED
    one, many = train(make_step(MODEL), short), train(make_step(MODEL, sp=4, profile=profile(*FEATURES)), padded)
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    assert_trees_close(many[1], one[1], 1e-5)
