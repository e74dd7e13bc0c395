# pytest tests/mesh/test_frozen.py
"""The fifth interface: trained and frozen parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.models.block import init_params
from alst_jax.models.tree import combine, partition
from alst_jax.profile import Profile
from tests.helpers import (
    PLAIN,
    QUIET_ADAMW,
    TINY,
    assert_trees_close,
    initial,
    leaves,
    loss_and_grad,
    make_step,
    random_batch,
    tiny,
    to_numpy,
    train,
)

TILES = dict(loss_tile=7, mlp_tile=5)
HOST = dict(offload_activations=True, offload_weights=True, offload_optimizer=True)
FROZEN = ["embed_tokens|lm_head", r"layers\.", "mlp", "norm", "q_proj", "self_attn.o_proj.kernel"]


@pytest.mark.parametrize(
    "mesh,changes",
    [
        ((1, 1), {}),
        ((1, 4), dict(segment_layers=(2, 1), keep_attention_on_host=1, head_chunks=2, **TILES, **HOST)),
        ((2, 2), dict(stack="plain", **TILES)),
    ],
    ids=str,
)
@pytest.mark.parametrize("freeze", FROZEN)
def test_frozen_parameters_stay_and_the_others_move_as_before(freeze, mesh, changes):
    """Gradients of the trained parameters are those of full training; the frozen ones have none, and no state."""
    profile = dataclasses.replace(PLAIN, remat=True, **changes)
    batch, unclipped = random_batch(), dataclasses.replace(QUIET_ADAMW, clip_norm=0.0)
    step = make_step(TINY, *mesh, profile=profile, freeze=freeze, optimizer=unclipped)
    full = make_step(TINY, profile=PLAIN, optimizer=unclipped)
    _, gradients, weights = train(step, batch, steps=1)
    _, all_gradients = loss_and_grad(full, initial(full), batch)
    frozen = leaves(step.frozen).keys()
    assert (
        frozen and frozen | leaves(gradients).keys() == leaves(weights).keys() and not frozen & leaves(gradients).keys()
    )
    assert_trees_close(gradients, {n: x for n, x in leaves(all_gradients).items() if n not in frozen}, 1e-5)
    start = leaves(to_numpy(initial(step)))
    for name, value in leaves(weights).items():
        assert np.array_equal(value, start[name]) == (name in frozen), name
    for moment in ("mu", "nu"):
        assert leaves(step.optimizer_state[moment]).keys() == leaves(gradients).keys()


@pytest.mark.parametrize("freeze", ["embed_tokens", "lm_head|norm", r"layers.*q_proj"])
def test_frozen_parameters_with_the_update_in_the_backward_pass(freeze):
    profile = dataclasses.replace(PLAIN, remat=True, **HOST)
    unclipped = dataclasses.replace(QUIET_ADAMW, clip_norm=0.0)
    step = make_step(TINY, 1, 2, profile=profile, freeze=freeze, optimizer=unclipped)
    trained, frozen = step.split(initial(step))
    batch, scale, rate = step.put_batch(**random_batch()), jnp.float32(1 / 200), jnp.float32(1e-2)
    state = step.init_optimizer(trained)
    loss, gradients = step.loss_and_grad(trained, frozen, batch, scale)
    norm = step.gradient_norm(gradients)
    want, _ = step.update(jax.tree.map(jnp.copy, trained), gradients, jax.tree.map(jnp.copy, state), norm, rate)
    want = to_numpy(want)
    result = step.update_in_backward(trained, frozen, state, batch, scale, rate)
    np.testing.assert_allclose([result[0], result[1]], [loss, norm], rtol=1e-5)
    assert_trees_close(to_numpy(result[4]), want, 1e-5)


def test_no_gradient_buffer_for_frozen_parameters():
    """The compiled results are smaller by the frozen parameters; and so is all memory, by the head's sum over tiles at
    least (results that are gradients serve as temporary memory before)."""

    def memory(freeze):
        step = make_step(tiny(vocab_size=4096), profile=Profile(loss_tile=16), freeze=freeze)
        lowered = step.loss_and_grad.lower(step.trained, step.frozen, step.put_batch(**random_batch()), jnp.float32(1))
        return lowered.compile().memory_analysis()

    full, part = memory(None), memory("embed_tokens|lm_head")
    table = 4096 * 64 * 4
    assert abs(full.output_size_in_bytes - part.output_size_in_bytes - 2 * table) < 1024
    total = lambda memory: memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert total(part) <= total(full) - table


def test_partition_and_combine():
    params = init_params(TINY, jnp.float32, jax.random.key(0))
    some, rest = partition(params, lambda path: "mlp" in jax.tree_util.keystr(path))
    assert 0 < len(jax.tree.leaves(some)) < len(jax.tree.leaves(params))
    for tree in (combine(some, rest), combine(rest, some)):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        assert all(a is b for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(params)))
