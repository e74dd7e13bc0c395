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
from tests.helpers import (
    PLAIN,
    assert_trains_alike,
    assert_trees_close,
    initial,
    loss_and_grad,
    make_step,
    random_batch,
    tiny,
    train,
)

MODEL = tiny(num_layers=2, attention_bias=False, mlp_bias=False)
FEATURES = {
    "loss_tile": 7,
    "mlp_tile": 5,
    "remat": True,
    "offload_activations": True,
    "offload_weights": True,
    "offload_optimizer": True,
}


def profile(*features):
    chosen = {name: FEATURES[name] for name in features}
    if "offload_activations" in chosen:
        chosen["remat"] = True  # it offloads what rematerialisation keeps
    return dataclasses.replace(PLAIN, **chosen)


ALONE = [(name,) for name in FEATURES]
WITHOUT_ONE = [tuple(n for n in FEATURES if n != name) for name in FEATURES if name != "remat"]
PAIRS = [
    ("loss_tile", "mlp_tile"),
    ("mlp_tile", "offload_activations"),
    ("offload_weights", "offload_activations"),
    ("offload_weights", "offload_optimizer"),
]


@pytest.fixture(scope="module")
def reference():
    return train(make_step(MODEL), random_batch(MODEL))


def check(sp, features, reference, dp=1):
    assert_trains_alike(make_step(MODEL, dp=dp, sp=sp, profile=profile(*features)), random_batch(MODEL), reference)


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
    step = make_step(MODEL, profile=profile("offload_weights"))
    params = initial(step)
    _, gradients = step.loss_and_grad(*step.split(params), step.put_batch(**random_batch(MODEL)), jnp.float32(1))
    norm = step.gradient_norm(gradients)
    new, state = step.update(params, gradients, step.init_optimizer(params), norm, jnp.float32(1e-3))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves((gradients, new))} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {"device"}


def test_offloaded_optimizer_lives_on_the_host():
    """And nothing else does: neither weights nor gradients."""
    step = make_step(MODEL, profile=profile("offload_optimizer"))
    params = initial(step)
    state = step.init_optimizer(params)
    _, gradients = step.loss_and_grad(*step.split(params), step.put_batch(**random_batch(MODEL)), jnp.float32(1))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(gradients)} == {"device"}
    for _ in range(2):  # and stays there
        params, state = step.update(params, gradients, state, step.gradient_norm(gradients), jnp.float32(1e-3))
        assert {x.sharding.memory_kind for x in jax.tree.leaves((state["mu"], state["nu"]))} == {"pinned_host"}
        assert {x.sharding.memory_kind for x in jax.tree.leaves(params)} == {"device"}


@pytest.mark.parametrize("features", [pytest.param((), marks=pytest.mark.slow), ("offload_weights",)], ids=str)
def test_accumulated_gradients_sum_in_float32(features):
    """bfloat16 gradients of several batches are summed in float32, wherever they live, and as the single pass does."""
    step = make_step(
        MODEL, sp=2, profile=dataclasses.replace(profile(*features), compute_dtype="bfloat16"), dtype=jnp.bfloat16
    )
    params = initial(step)
    parts, sums = [], step.zero_gradients()
    for seed in range(3):
        _, new = step.loss_and_grad(
            *step.split(params), step.put_batch(**random_batch(MODEL, seed=seed)), jnp.float32(1)
        )
        parts.append(jax.tree.map(lambda x: np.asarray(x, np.float64), new))
        sums = step.add_gradients(sums, new)
    assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
    assert_trees_close(sums, jax.tree.map(lambda *xs: sum(xs), *parts), 1e-6)


def test_lengths_that_nothing_divides():
    """23 tokens a row with tiles that leave a part of one, a tile of just 23, and tiles longer than the row."""
    batch, plain = random_batch(MODEL, rows=1, length=23), make_step(MODEL)
    one = loss_and_grad(plain, initial(plain), batch)
    for loss_tile, mlp_tile in ((7, 23), (1000, 5)):
        step = make_step(MODEL, profile=Profile(loss_tile=loss_tile, mlp_tile=mlp_tile))
        many = loss_and_grad(step, initial(step), batch)
        np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
        assert_trees_close(many[1], one[1], 1e-5)


def test_padding_behind_a_document_changes_nothing():
    short, padded = random_batch(MODEL, rows=1, length=23), random_batch(MODEL, rows=1, length=32, seed=5)
    for name in ("tokens", "labels"):
        padded[name][:, :23] = short[name]
    padded["labels"][:, 23:] = IGNORED
    one, many = (
        loss_and_grad(step, initial(step), batch)
        for step, batch in ((make_step(MODEL), short), (make_step(MODEL, sp=4, profile=profile(*FEATURES)), padded))
    )
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    assert_trees_close(many[1], one[1], 1e-5)
