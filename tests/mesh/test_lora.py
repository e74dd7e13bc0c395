# pytest tests/mesh/test_lora.py
"""Adapters under every profile and on every mesh: the same loss, gradients and updated adapters as with all features
off; frozen weights have no gradient in the program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.models.lora import LINEARS, Lora
from alst_jax.models.tree import is_stacked, names
from alst_jax.stack.batch import Batch
from tests.helpers import (
    PLAIN,
    QUIET_ADAMW,
    assert_trees_close,
    initial,
    leaves,
    make_step,
    packed,
    random_batch,
    tiny,
    to_numpy,
)

MODEL = tiny(lora=Lora(4, 8.0))
HOST = dict(offload_activations=True, offload_weights=True, offload_optimizer=True)
TILES = dict(loss_tile=24, mlp_tile=24)
CASES = {
    "one device, in host memory": ((1, 1), dict(segment_layers=(2, 1), keep_attention_on_host=1, **TILES, **HOST)),
    "ulysses, head chunks": (
        (1, 4),
        dict(
            segment_layers=(3,),
            head_chunks=2,
            keep_attention_on_device=1,
            keep_qkv_on_device=1,
            keep_mlp_on_device=1,
            rebuild_inputs_alone=True,
            **TILES,
            **HOST,
        ),
    ),
    "plain stack, tiles, head chunks": ((2, 2), dict(stack="plain", head_chunks=2, **TILES)),
}
UNCLIPPED = dataclasses.replace(QUIET_ADAMW, clip_norm=0.0)


def begin(step):
    """(trained, frozen) with adapters whose B is not zero."""
    trained, frozen = step.split(initial(step))
    filled = lambda path, x: (
        x
        if names(path)[-1] != "lora_B"
        else jax.device_put(
            np.random.default_rng(len(names(path)[2])).normal(0, 0.1, x.shape).astype(x.dtype), x.sharding
        )
    )
    return jax.tree_util.tree_map_with_path(filled, trained), frozen


def gradients_of(step, batch):
    """(loss, gradients) of one batch."""
    loss, gradients = step.loss_and_grad(*begin(step), step.put_batch(**batch), jnp.float32(1 / 200))
    return float(loss), to_numpy(gradients)


@pytest.fixture(scope="module")
def without_features():
    return gradients_of(make_step(MODEL, profile=PLAIN, optimizer=UNCLIPPED), random_batch())


@pytest.mark.parametrize("case", CASES)
def test_no_feature_changes_the_result(case, without_features):
    mesh, changes = CASES[case]
    step = make_step(MODEL, *mesh, profile=dataclasses.replace(PLAIN, remat=True, **changes), optimizer=UNCLIPPED)
    loss, gradients = gradients_of(step, random_batch())
    np.testing.assert_allclose(loss, without_features[0], rtol=1e-6)
    assert leaves(gradients).keys() == {
        f"layers.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}.{which}"
        for name in LINEARS
        for which in ("lora_A", "lora_B")
    }
    assert_trees_close(gradients, without_features[1], 1e-5)


@pytest.mark.slow
def test_the_update_in_the_backward_pass():
    step = make_step(MODEL, 1, 2, profile=dataclasses.replace(PLAIN, remat=True, **HOST), optimizer=UNCLIPPED)
    (trained, frozen), batch = begin(step), step.put_batch(**random_batch())
    scale, rate, state = jnp.float32(1 / 200), jnp.float32(1e-2), step.init_optimizer(trained)
    _, gradients = step.loss_and_grad(trained, frozen, batch, scale)
    norm = step.gradient_norm(gradients)
    want, _ = step.update(jax.tree.map(jnp.copy, trained), gradients, jax.tree.map(jnp.copy, state), norm, rate)
    want = to_numpy(want)
    assert_trees_close(to_numpy(step.update_in_backward(trained, frozen, state, batch, scale, rate)[4]), want, 1e-5)


@pytest.mark.slow
def test_packed_documents_compute_what_they_would_alone():
    step = make_step(MODEL, profile=PLAIN, optimizer=UNCLIPPED)
    together, alone = packed([[20, 30, 14], [64]], 64, 1)
    (loss, gradients), (same, wanted) = gradients_of(step, together), gradients_of(step, alone)
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    assert_trees_close(gradients, wanted, 1e-5)


def equations(jaxpr):
    """All equations of a jaxpr and of those inside of it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def weight_gradients(model, profile, freeze=None):
    """Shapes of products over all tokens of a tile, and of sums over rows of a table, in loss and gradient."""
    step = make_step(model, profile=profile, freeze=freeze)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tuple(random_batch().values())))
    jaxpr = step.loss_and_grad.trace(step.trained, step.frozen, Batch(*batch), scale).jaxpr.jaxpr
    weights = {
        leaf.shape[is_stacked(path) :]
        for path, leaf in jax.tree_util.tree_leaves_with_path(step.params)
        if leaf.ndim - is_stacked(path) == 2
    }
    return {
        tuple(equation.outvars[0].aval.shape)
        for equation in equations(jaxpr)
        if equation.primitive.name in ("dot_general", "scatter-add")
    } & weights


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(remat=True, segment_layers=(2,), **TILES), dict(remat=True, stack="plain", **TILES)],
    ids=["plain", "segments", "plain stack"],
)
def test_the_program_has_no_gradient_of_a_frozen_weight(changes):
    profile = dataclasses.replace(PLAIN, **changes)
    kernels = {(64, 128), (64, 32), (128, 64), (64, 96), (96, 64)}  # (96, 64) is also the shape of the tables
    adapters = {(64, 4), (4, 128), (4, 32), (128, 4), (4, 64), (4, 96), (96, 4)}
    assert weight_gradients(MODEL, profile) == adapters
    assert weight_gradients(tiny(), profile) == kernels
