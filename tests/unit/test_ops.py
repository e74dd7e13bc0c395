# pytest tests/unit/test_ops.py
"""The ops against independent twins, at 1e-5; odd sizes, ragged tiles, ignored labels, low precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.config import IGNORED
from alst_jax.ops.cross_entropy import cross_entropy, default_tile, tiled_cross_entropy
from alst_jax.ops.linear import add_bias, embed, linear
from alst_jax.ops.norm import rms_norm
from alst_jax.ops.rope import RopeConfig, apply_rope, rope_tables
from alst_jax.ops.tiling import even_tile, tiled
from tests.helpers import relative_error

TOKENS = 23
TILES = [1, 5, 22, 23, 24, 1000]


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def test_rms_norm():
    x, scale = np.asarray(normal(0, 3, 7, 16), np.float64), np.asarray(normal(1, 16), np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    assert relative_error(rms_norm(jnp.float32(x), jnp.float32(scale), 1e-5), expected) < 1e-6
    assert rms_norm(jnp.bfloat16(x), jnp.float32(scale), 1e-5).dtype == jnp.bfloat16


def test_rope_turns_pairs_by_position():
    x, at = normal(0, 1, 4, 2, 8), jnp.asarray([[0, 1, 5, 100]])
    out = apply_rope(x, *rope_tables(RopeConfig(theta=100.0), 8, at))
    complex_in = np.asarray(x)[..., :4] + 1j * np.asarray(x)[..., 4:]
    angles = np.asarray(at)[0][:, None, None] * (100.0 ** -(np.arange(4) / 4))
    expected = complex_in[0] * np.exp(1j * angles)
    assert relative_error(out[0], np.concatenate([expected.real, expected.imag], -1)) < 1e-5


def test_linear_gradient_keeps_the_carriers_precision():
    """bfloat16 activations, float32 carrier: dW is the exact sum of exact products, not rounded to bfloat16."""
    x, w = normal(0, 4096, 8, dtype=jnp.bfloat16), normal(1, 8, 4, dtype=jnp.bfloat16)
    dy = normal(2, 4096, 4, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    ours = jax.vjp(linear, x, w.astype(jnp.float32))[1](dy)[1]
    rounded = jax.vjp(lambda x, w: x @ w, x, w)[1](dy)[1]
    assert ours.dtype == jnp.float32 and relative_error(ours, exact) < 1e-5
    assert relative_error(rounded, exact) > 1e-4
    assert linear(x, w.astype(jnp.float32)).dtype == jnp.bfloat16


def test_add_bias():
    x, b = normal(0, 4, 8, dtype=jnp.bfloat16), normal(1, 8)
    assert add_bias(x, b).dtype == jnp.bfloat16
    np.testing.assert_allclose(add_bias(x.astype(jnp.float32), b), np.asarray(x, np.float32) + np.asarray(b), rtol=1e-6)


def test_embedding_gradient_sums_equal_tokens_in_float32():
    table, tokens = normal(0, 5, 3), jnp.zeros((1, 1000), jnp.int32).at[0, 0].set(4)
    dy = jnp.full((1, 1000, 3), 1.0, jnp.bfloat16)
    gradient = jax.vjp(lambda t: embed(t, tokens, jnp.bfloat16), table)[1](dy)[0]
    np.testing.assert_array_equal(gradient[0], np.full(3, 999.0, np.float32))  # bfloat16 stops counting at 256
    np.testing.assert_array_equal(gradient[4], np.ones(3, np.float32))


# -------------------------------------------------------------------------------------------------------------- tiling


def gated(rows, weights, which):
    """Row-wise, with an integer input and two outputs."""
    y = jnp.tanh(rows @ weights["in"]) * jnp.where(which[:, None] > 0, 2.0, -1.0)
    return {"out": y @ weights["out"], "norm": jnp.sum(y * y, axis=-1)}


@pytest.mark.parametrize("tile", TILES)
def test_tiled_equals_whole(tile):
    x, which = normal(0, TOKENS, 6), jnp.arange(TOKENS) % 3
    weights = {"in": normal(1, 6, 10), "out": normal(2, 10, 4)}
    target = normal(3, TOKENS, 4)

    def loss(rows, weights, tile):
        y = tiled(gated, rows, weights, which, tile=tile)
        return jnp.sum(y["out"] * target) + jnp.sum(jnp.sin(y["norm"]))

    ours, whole = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)(x, weights, rows) for rows in (tile, None)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        assert relative_error(a, b) < 1e-5


def test_tiled_sums_weight_gradients_in_float32():
    x, w = normal(0, 4096, 4, dtype=jnp.bfloat16), normal(1, 4, 3, dtype=jnp.bfloat16)
    dy = normal(2, 4096, 3, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    fn = lambda x, w: linear(x, w)
    in_tiles = jax.jit(lambda w: jax.vjp(lambda w: tiled(fn, x, w, tile=64), w)[1](dy)[0])
    carrier = in_tiles(w.astype(jnp.float32))
    assert carrier.dtype == jnp.float32 and relative_error(carrier, exact) < 1e-5

    of_tile = jax.jit(lambda x, dy: jax.vjp(lambda w: fn(x, w), w)[1](dy)[0])
    naive = jnp.zeros((4, 3), jnp.bfloat16)  # the twin that sums in the weight's own dtype
    for start in range(0, 4096, 64):
        naive += of_tile(x[start : start + 64], dy[start : start + 64])
    assert relative_error(naive, exact) > 10 * relative_error(carrier, exact)
    bf16 = in_tiles(w)
    assert bf16.dtype == jnp.bfloat16 and relative_error(bf16, exact) < relative_error(naive, exact)


def test_fixed_arrays_get_no_gradient_and_tiles_come_out_even():
    x, scale, weights = normal(0, TOKENS, 6), normal(1, TOKENS, 1), normal(2, 6, 4)
    for tile in (5, None):
        loss = lambda x, w, scale: jnp.sum(jnp.sin(tiled(lambda x, w, scale: (x * scale) @ w, x, w, scale, tile=tile)))
        dx, _, dscale = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weights, scale)
        assert np.all(np.asarray(dscale) == 0) and np.any(np.asarray(dx) != 0)
    assert [even_tile(rows, 4096) for rows in (65_536, 6144, 100, 4097, 12_288)] == [4096, 3072, 4096, 4096, 4096]


# ---------------------------------------------------------------------------------------------------------------- loss


def loss_inputs(vocab=37, dim=8, ignored=0.3):
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(TOKENS) < ignored, IGNORED, rng.integers(0, vocab, TOKENS)).astype(np.int32)
    return normal(1, TOKENS, dim), normal(2, vocab, dim), jnp.asarray(labels)


def exact_loss(h, table, labels):
    logits = np.asarray(h, np.float64) @ np.asarray(table, np.float64).T
    valid = np.asarray(labels) != IGNORED
    log_z = np.log(np.exp(logits).sum(-1))
    return sum(log_z[t] - logits[t, labels[t]] for t in np.flatnonzero(valid))


@pytest.mark.parametrize("tile", TILES)
def test_tiled_cross_entropy(tile):
    h, table, labels = loss_inputs()
    of = lambda loss: jax.jit(jax.value_and_grad(lambda h, w: 3.0 * loss(h, w), argnums=(0, 1)))(h, table)
    ours, plain = of(lambda h, w: tiled_cross_entropy(h, w, labels, tile)), of(lambda h, w: cross_entropy(h, w, labels))
    alone = jax.jit(lambda h, w: tiled_cross_entropy(h, w, labels, tile))(h, table)
    assert abs(float(ours[0]) / 3 - exact_loss(h, table, labels)) < 1e-5 * float(ours[0])
    assert float(alone) == pytest.approx(float(ours[0]) / 3, rel=1e-6)
    for a, b in zip(ours[1], plain[1]):
        assert relative_error(a, b) < 1e-5


def test_loss_of_a_tile_weighs_by_its_valid_labels():
    """A mean of tile means is another number: the error a shipped trainer made."""
    h, table, _ = loss_inputs()
    labels = jnp.full(TOKENS, IGNORED).at[:5].set(3).at[7].set(1).at[20].set(2)
    total, valid = float(jax.jit(tiled_cross_entropy, static_argnums=3)(h, table, labels, 5)), 7
    rows = lambda i: (np.asarray(h[i : i + 5]), np.asarray(labels[i : i + 5]))
    means = [
        float(exact_loss(h, table, labels)) / max(1, int((labels != IGNORED).sum()))
        for h, labels in map(rows, range(0, TOKENS, 5))
    ]
    assert total / valid == pytest.approx(exact_loss(h, table, labels) / valid, rel=1e-5)
    assert abs(np.mean(means) - total / valid) > 0.05 * total / valid


def test_ignored_labels_give_exactly_zero():
    h, table, _ = loss_inputs()
    labels = jnp.full(TOKENS, IGNORED)
    of = jax.jit(jax.value_and_grad(lambda h, w, labels: tiled_cross_entropy(h, w, labels, 5), argnums=(0, 1)))
    loss, (dh, dtable) = of(h, table, labels)
    assert float(loss) == 0 and not np.any(dh) and not np.any(dtable)
    # One label in the middle tile: the other tiles' rows stay 0, nothing is NaN.
    dh, _ = of(h, table, labels.at[12].set(3))[1]
    assert np.any(dh[12]) and not np.any(np.delete(dh, 12, axis=0))


def test_huge_logits_stay_finite():
    h, table, labels = loss_inputs()
    loss, grads = jax.jit(jax.value_and_grad(lambda h: tiled_cross_entropy(h, table, labels, 5)))(h * 1e4)
    assert np.isfinite(loss) and np.isfinite(grads).all()


def count_logit_products(fn, vocab):
    """Matrix products with the vocabulary as a dim, in a function's program, inner programs included."""

    def visit(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general" and any(vocab in v.aval.shape for v in eqn.invars):
                total += 1
            for value in eqn.params.values():
                for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                    inner = getattr(inner, "jaxpr", inner)
                    total += visit(inner) if hasattr(inner, "eqns") else 0
        return total

    return visit(fn)


def test_logits_are_made_once():
    """Three products with the vocabulary, logits, dh and dW; a loss that recomputes its logits needs four."""
    h, table, labels = loss_inputs()
    h, labels = h[:20], labels[:20]  # whole tiles, so that the body stands in the program once
    ours = jax.make_jaxpr(jax.grad(lambda h, w: tiled_cross_entropy(h, w, labels, 5), argnums=(0, 1)))(h, table)

    def recomputing(h, w):
        tile = jax.checkpoint(lambda h, y: cross_entropy(h, w, y))
        return sum(tile(h[i : i + 20], labels[i : i + 20]) for i in range(0, 20, 20))

    twin = jax.make_jaxpr(jax.grad(recomputing, argnums=(0, 1)))(h, table)
    assert count_logit_products(ours.jaxpr, 37) == 3
    assert count_logit_products(twin.jaxpr, 37) == 4


def test_default_tile_is_a_gibibyte_of_logits():
    assert default_tile(128256) == 2048 and default_tile(128256) * 128256 * 4 <= 2**30
    assert default_tile(2**31) == 128
