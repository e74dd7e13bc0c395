# pytest tests/unit/test_formats.py
"""Narrow optimizer state: exact where it claims to be, unbiased where it rounds, and it trains like float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.optim.adamw import AdamW
from alst_jax.optim.formats import Log8, Plain, block_of, join_float32, round_to_bfloat16, split_float32
from alst_jax.profile import Profile
from tests.helpers import PLAIN, float32_masters, initial, leaf, make_step, random_batch, tiny, to_numpy, train

DRAWS = 4000


def samples(draw):
    """float64[DRAWS, ...]: what `draw(key)` gives for many keys."""
    return np.asarray(
        jax.jit(jax.vmap(lambda k: draw(k).astype(jnp.float32)))(jax.random.split(jax.random.key(1), DRAWS)), np.float64
    )


def assert_unbiased(draws, x):
    mean, spread = draws.mean(0), draws.std(0) / np.sqrt(DRAWS)
    rare = 5 / DRAWS * 0.13 * np.abs(x)  # a neighbour drawn less than once in so many
    assert np.all(np.abs(mean - x) <= 5 * spread + rare)


def test_split_floats_are_joined_bit_for_bit():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    x = bits.view(np.float32)
    x = np.concatenate([x[np.isfinite(x)], np.float32([0, -0.0, 1, 1 + 2**-8, 1 + 3 * 2**-9, 1e-45, -1e-40])])
    high, low = split_float32(jnp.asarray(x))
    assert high.dtype == jnp.bfloat16 and low.dtype == jnp.uint16
    np.testing.assert_array_equal(np.asarray(join_float32(high, low)).view(np.uint32), x.view(np.uint32))
    normal = np.abs(x) < 1e38
    error = np.abs(np.asarray(high, np.float64)[normal] - x[normal])
    assert np.all(error <= 2.0**-8 * np.abs(x[normal].astype(np.float64)) + 1e-40)  # half a unit in the last place


def test_bfloat16_rounding_is_unbiased_and_to_a_neighbour():
    x = np.float32([1.001, -1.001, 3.14159, 1e-20, -7e10, 1.0, 0.0])
    draws = samples(lambda key: round_to_bfloat16(jnp.asarray(x), key))
    assert_unbiased(draws, x)
    assert np.all(np.abs(draws - x) < 2.0**-7 * np.abs(x) + 1e-30)
    assert len(np.unique(draws[:, 0])) == 2 and len(np.unique(draws[:, 5])) == 1
    nearest = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)  # the twin that loses small updates
    assert abs(nearest[0] - x[0]) > 10 * abs(draws[:, 0].mean() - x[0])


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_unbiased_and_relative(signed):
    x = np.float32(10.0) ** np.random.default_rng(0).uniform(-5, 0, (3, 64)).astype(np.float32)
    x[0, :5] = 0
    if signed:
        x *= np.where(np.random.default_rng(1).random(x.shape) < 0.5, -1, 1).astype(np.float32)
    form = Log8(signed, 32)
    stored = form.encode(jnp.asarray(x), jax.random.key(0))
    assert stored["code"].dtype == (jnp.int8 if signed else jnp.uint8) and stored["scale"].shape == (3, 2)
    draws = samples(lambda key: form.decode(form.encode(jnp.asarray(x), key), jnp.float32))
    assert_unbiased(draws, x)
    assert np.all(draws[:, x == 0] == 0)
    assert np.abs(draws / np.where(x == 0, 1, x) - 1)[:, x != 0].max() < (0.13 if signed else 0.095)
    linear = np.round(x / np.abs(x).max() * 127) / 127 * np.abs(x).max()  # the twin without the logarithm
    assert np.mean(linear[x != 0] == 0) > 0.3


def test_what_is_stored_plain():
    assert block_of((4, 64, 512), 1) == 256 and block_of((4, 64, 96), 1) == 32
    assert block_of((4, 64, 512), 2) is None  # sharded along the blocks
    assert block_of((64,), None) is None and block_of((4, 50), 0) is None
    made = AdamW(states="int8").formats(jax.ShapeDtypeStruct((3, 7), jnp.float32), jax.sharding.PartitionSpec())
    assert made == {"mu": Plain("float32"), "nu": Plain("float32")}


MODEL = tiny(num_layers=2, attention_bias=False, mlp_bias=False)


def bfloat16_run(profile=PLAIN, steps=20, **settings):
    step = make_step(MODEL, profile=profile, dtype=jnp.bfloat16, optimizer=AdamW(weight_decay=0.1, **settings))
    return train(step, random_batch(MODEL), steps=steps, learning_rate=3e-3)


@pytest.fixture(scope="module")
def reference():
    return bfloat16_run()


@pytest.mark.parametrize(
    "profile", [PLAIN, Profile(offload_weights=True, offload_optimizer=True)], ids=["device", "host"]
)
def test_low_bits_are_a_float32_master_to_the_last_bit(profile):
    low_bits, exact = (float32_masters(kind, MODEL, profile) for kind in ("low-bits", "float32"))
    for a, b in zip(jax.tree.leaves(low_bits), jax.tree.leaves(exact)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "settings",
    [
        dict(states="bfloat16"),
        dict(states="int8"),
        dict(master="none"),
        dict(states="int8", master="low-bits"),
        dict(states="int8", master="none"),
    ],
    ids=str,
)
def test_narrow_state_trains_like_float32(settings, reference):
    losses = bfloat16_run(**settings)[0]
    assert reference[0][-1] < 0.8 * reference[0][0]  # something was learned
    np.testing.assert_allclose(losses, reference[0], rtol=0.02)
    assert losses != reference[0]


def test_weights_rounded_to_nearest_would_not_move():
    """Why a master or stochastic rounding: updates below half a unit in the last place are all lost otherwise."""
    step = make_step(MODEL, dtype=jnp.bfloat16, optimizer=AdamW(master="none", weight_decay=0.0))
    params = initial(step)
    start, state = to_numpy(params), step.init_optimizer(params)
    gradients = jax.device_put(jax.tree.map(lambda p: np.ones(p.shape, p.dtype), start), step.param_shardings)
    for _ in range(8):
        params, state = step.update(params, gradients, state, step.gradient_norm(gradients), jnp.float32(2e-6))
    kernel = lambda tree: np.asarray(leaf(tree, "layers.mlp.up_proj.kernel"), np.float64)
    moved = kernel(start) - kernel(params)
    assert abs(moved.mean() - 8 * 2e-6) < 2e-6  # each of them by 1e-4 of a weight of 0.02: a 40th of its unit


@pytest.mark.parametrize(
    "settings", [dict(states="int8", master="none"), dict(states="bfloat16", master="low-bits")], ids=str
)
def test_on_a_mesh_and_streamed_from_the_host(settings, reference):
    profile = Profile(offload_weights=True, offload_optimizer=True)
    step = make_step(
        MODEL, dp=2, sp=2, profile=profile, dtype=jnp.bfloat16, optimizer=AdamW(weight_decay=0.1, **settings)
    )
    assert leaf(step.optimizer_state["mu"], "norm.scale").dtype == jnp.float32  # a vector
    losses = train(step, random_batch(MODEL), steps=10, learning_rate=3e-3)[0]
    np.testing.assert_allclose(losses, reference[0][:10], rtol=0.02)
