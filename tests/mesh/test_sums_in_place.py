# pytest tests/mesh/test_sums_in_place.py
"""Gradients of several batches, summed where they are made: equal to sums of separate gradients, which do not exist."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.models.lora import Lora
from tests.helpers import PLAIN, TINY, assert_trees_close, initial, make_step, random_batch

HOST = dict(offload_activations=True, offload_weights=True)


ADAPTERS = dataclasses.replace(TINY, lora=Lora(4, 8.0), tie_word_embeddings=True)


@functools.cache
def step(dp=1, sp=1, model=TINY, **changes):
    return make_step(model, dp, sp, dataclasses.replace(PLAIN, remat=True, **changes))


@pytest.mark.parametrize(
    "dp,sp,model,changes",
    [
        (2, 2, TINY, HOST),
        pytest.param(1, 1, ADAPTERS, {}, marks=pytest.mark.slow),  # test_lora_dropout sums those of adapters
        pytest.param(1, 1, TINY, {}, marks=pytest.mark.slow),
    ],
)
def test_equal_to_the_sum_of_separate_gradients(dp, sp, model, changes):
    made = step(dp, sp, model, **changes)
    params, losses = made.split(initial(made)), []
    sums, apart = made.zero_gradients(), made.zero_gradients()
    for seed in range(2):
        batch = made.put_batch(**random_batch(TINY, seed=seed))
        loss, sums = made.loss_and_sums(sums, *params, batch, jnp.float32(0.01))
        other, new = made.loss_and_grad(*params, batch, jnp.float32(0.01))
        apart = made.add_gradients(apart, new)
        losses.append((float(loss), float(other)))
    np.testing.assert_allclose(*zip(*losses), rtol=1e-6)
    assert_trees_close(sums, apart, 1e-6)
    kind = "pinned_host" if changes else "device"
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(sums)} == {kind}


def test_no_gradients_beside_the_sums():
    """The sums are donated and overwritten, and nothing of the gradients' size is temporary. The control adds separate
    gradients."""
    made, number = step(model=dataclasses.replace(TINY, num_layers=12)), jax.ShapeDtypeStruct((), jnp.float32)
    batch, arguments = made.put_batch(**random_batch(TINY, rows=1, length=16)), (made.trained,) * 2 + (made.frozen,)
    apart = jax.jit(lambda sums, *rest: made.add_gradients(sums, made.loss_and_grad(*rest)[1]), donate_argnums=0)
    ours, control = (
        function.lower(*arguments, batch, number).compile().memory_analysis()
        for function in (made.loss_and_sums, apart)
    )
    size = lambda tree: sum(leaf.size * 4 for leaf in jax.tree.leaves(tree))
    assert ours.alias_size_in_bytes >= size(made.trained)
    assert 2 * ours.temp_size_in_bytes < size(made.trained["layers"]) <= control.temp_size_in_bytes
