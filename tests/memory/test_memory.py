# pytest tests/memory/test_memory.py
"""Compiled bytes: what the features are for, each with its naive twin as negative control.

The tests compile without most optimizations (conftest.py): buffers are assigned before machine code is made, and the
bytes are the same, 17,124,416 for the step of four layers, for instance.
"""

import jax
import jax.numpy as jnp
import pytest

from alst_jax.ops.attention import attention
from alst_jax.ops.cross_entropy import cross_entropy, tiled_cross_entropy
from alst_jax.ops.tiling import tiled
from alst_jax.profile import Profile
from alst_jax.xla.order import after
from tests.helpers import make_step, random_batch, tiny

SHAPE = jax.ShapeDtypeStruct


def temp_bytes(fn, *shapes) -> int:
    return jax.jit(fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def loss_bytes(length, tile):
    h, table, labels = SHAPE((length, 16), jnp.float32), SHAPE((2048, 16), jnp.float32), SHAPE((length,), jnp.int32)
    loss = cross_entropy if tile is None else lambda h, w, y: tiled_cross_entropy(h, w, y, tile)
    return temp_bytes(jax.value_and_grad(loss, argnums=(0, 1)), h, table, labels)


def test_tiled_loss_does_not_grow_with_length():
    logits = 4 * 2048 * 4  # float32 bytes of a token's logits, times 4 tokens' worth of slack below
    tiled_growth = loss_bytes(4096, 128) - loss_bytes(1024, 128)
    assert tiled_growth < 3072 * 16 * 4 * 4  # a few copies of h, nothing of the size of the logits
    assert loss_bytes(4096, None) - loss_bytes(1024, None) > 3072 * logits / 4
    assert loss_bytes(4096, 128) < loss_bytes(4096, None) / 8


def mlp_bytes(length, tile):
    def mlp(x, w):
        return (jax.nn.silu(x @ w[0]) * (x @ w[1])) @ w[2]

    def loss(x, w):
        return jnp.sum(jnp.square(tiled(mlp, x, w, tile=tile)))

    weights = (SHAPE((16, 1024), jnp.float32), SHAPE((16, 1024), jnp.float32), SHAPE((1024, 16), jnp.float32))
    return temp_bytes(jax.grad(loss, argnums=(0, 1)), SHAPE((length, 16), jnp.float32), weights)


def test_tiled_mlp_does_not_grow_with_length():
    assert mlp_bytes(4096, 128) - mlp_bytes(1024, 128) < 3072 * 16 * 4 * 6  # copies of x, not [tokens, ffn]
    assert mlp_bytes(4096, None) - mlp_bytes(1024, None) > 3072 * 1024 * 4
    assert mlp_bytes(4096, 128) < mlp_bytes(4096, None) / 8


def test_xla_attention_is_linear_in_length():
    def grads(length):
        q, k = SHAPE((1, length, 4, 16), jnp.float32), SHAPE((1, length, 2, 16), jnp.float32)
        loss = lambda q, k, v: jnp.sum(jnp.square(attention(q, k, v, kernel="xla")))
        return temp_bytes(jax.grad(loss, argnums=(0, 1, 2)), q, k, k)

    def naive(length):
        return 4 * length * length * 4  # one float32 copy of the scores

    assert grads(8192) < 2.6 * grads(4096)
    assert grads(8192) < naive(8192) / 8


def step_bytes(layers=2, length=2048, sp=1, **changes) -> int:
    model = tiny(num_layers=layers, num_heads=8, num_kv_heads=8, attention_bias=False, mlp_bias=False)
    step = make_step(model, sp=sp, profile=Profile(**{"loss_tile": 32, "mlp_tile": 32, **changes}))
    batch = jax.tree.map(
        lambda x: SHAPE(x.shape, x.dtype, sharding=x.sharding),
        step.put_batch(**random_batch(model, rows=1, length=length)),
    )
    compiled = step.loss_and_grad.lower(step.trained, step.frozen, batch, SHAPE((), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_layer_costs_one_carry_under_remat():
    carry = 2048 * 64 * 4
    four = step_bytes(4)  # with fewer layers, the peak lies outside the layers
    assert 0.95 * carry < (step_bytes(8) - four) / 4 < 1.1 * carry


@pytest.mark.slow  # the control of the test above
def test_a_layer_costs_more_than_four_carries_without_remat():
    assert step_bytes(4, remat=False) > step_bytes(4) + 4 * 3 * 2048 * 64 * 4


@pytest.mark.parametrize("length", [8192])
def test_eight_sequence_ranks_need_an_eighth(length):
    one, eight = step_bytes(length=length), step_bytes(length=length, sp=8)
    # Gathered weights, tiles and the whole sequence's keys for one head do not shrink.
    assert one / 12 < eight < one / 5


def test_zeros_of_recomputed_attention_do_not_wait(monkeypatch):
    """Rebuilt segments that hold their inputs alone compute the attention of a layer twice from the same h. XLA would
    make the zeros of both results at once (docs/log.md)."""
    alone = dict(layers=4, segment_layers=(2,), rebuild_inputs_alone=True)
    carry, found = 2048 * 64 * 4, step_bytes(**alone)
    unordered = lambda arrays, x: x if x.ndim == 4 else after(arrays, x)  # inputs[layers, B, T, D]
    monkeypatch.setattr("alst_jax.stack.stack.after", unordered)
    assert step_bytes(**alone) - found > 4 * carry


def test_weights_of_segments_of_two_are_gathered_in_their_turn(monkeypatch):
    """No loop goes over their layers, so that nothing but order keeps the compiler from gathering all of them at
    once."""
    wide = dict(hidden_size=256, intermediate_size=1024, vocab_size=64)

    def bytes_of(layers):
        step = make_step(tiny(num_layers=layers, **wide), 2, 2, Profile(segment_layers=(2,), mlp_tile=64, loss_tile=64))
        shapes = step.put_batch(**random_batch(step.model, rows=2, length=256))
        lowered = step.loss_and_grad.lower(step.trained, step.frozen, shapes, SHAPE((), jnp.float32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    weights = sum(x.size * 4 for x in jax.tree.leaves(make_step(tiny(num_layers=1, **wide)).params["layers"]))
    assert bytes_of(12) - bytes_of(4) < weights
    monkeypatch.setattr("alst_jax.stack.stack.read_after", lambda array, read, index: read(index))
    assert bytes_of(12) - bytes_of(4) > 4 * weights
