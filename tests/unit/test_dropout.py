# pytest tests/unit/test_dropout.py
"""Dropout's masks are functions of step, token, layer, module and feature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.ops.dropout import dropout, fold_in, kept, token_keys

TOKENS, FEATURES = 64, 48


def keys(step=3, seed=0, numbers=np.arange(TOKENS, dtype=np.uint32)):
    return token_keys(seed, jnp.uint32(step), jnp.asarray(numbers))


@pytest.fixture(scope="module")
def mask():
    return np.asarray(kept(fold_in(keys(), 1), FEATURES, 0.25))


def test_a_part_of_the_tokens_draws_the_same_bits(mask):
    some = np.array([5, 60, 7], np.uint32)
    assert np.array_equal(kept(fold_in(keys(numbers=some), 1), FEATURES, 0.25), mask[some])
    rows = keys(numbers=np.arange(TOKENS, dtype=np.uint32).reshape(2, -1))
    assert np.array_equal(np.asarray(kept(fold_in(rows, 1), FEATURES, 0.25)).reshape(mask.shape), mask)


def test_each_number_makes_other_masks(mask):
    others = [
        kept(fold_in(keys(step=4), 1), FEATURES, 0.25),
        kept(fold_in(keys(seed=1), 1), FEATURES, 0.25),
        kept(fold_in(keys(), 2), FEATURES, 0.25),
        kept(fold_in(fold_in(keys(), 1), 0), FEATURES, 0.25),
    ]
    for other in others:  # independent masks agree in 1/4 x 1/4 + 3/4 x 3/4 of their elements
        assert abs(np.mean(np.asarray(other) == mask) - 0.625) < 0.05
    pairs = [(mask[0::2], mask[1::2]), (mask[:, 0::2], mask[:, 1::2])]  # tokens; features that share a word
    assert all(abs(np.mean(a == b) - 0.625) < 0.05 for a, b in pairs)


def test_the_mean_over_masks_is_the_input():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(TOKENS, 5)), jnp.float32)  # an odd number of features
    one = jax.jit(lambda step: dropout(x, token_keys(0, step, jnp.arange(TOKENS, dtype=jnp.uint32)), 0.3))
    drawn = np.stack([one(jnp.uint32(step)) for step in range(400)])
    scaled = np.asarray(x)[None] / np.float32(0.7)
    assert np.all((drawn == 0) | (np.abs(drawn - scaled) < 1e-4 * np.abs(scaled))), "kept elements are x / (1 - rate)"
    assert abs(np.mean(drawn == 0) - 0.3) < 0.005
    deviation = np.abs(np.asarray(x)) * (0.3 / 0.7 / 400) ** 0.5
    assert np.all(np.abs(drawn.mean(axis=0) - np.asarray(x)) < 5 * deviation)
