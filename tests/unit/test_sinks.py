# pytest tests/unit/test_sinks.py
"""Attention sinks: a score of each head beside those of its keys, in the output and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.config import UserError
from alst_jax.ops.attention import AttentionSpec, Kernel, attention, attention_forward, xla
from tests.helpers import relative_error

DOCUMENTS = [0, 7, 7, 60, 101, 202]
SPECS = {
    "causal": (AttentionSpec(sinks=True), None),
    "window": (AttentionSpec(window=5, sinks=True), None),
    "documents": (AttentionSpec(sinks=True), DOCUMENTS),
    "cap": (AttentionSpec(soft_cap=1.5, scale=0.7, causal=False, sinks=True), None),
}


def inputs():
    """q, k, v, sinks, do; 2 x 101 tokens, 4 query heads, 2 kv heads."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, do = (jax.random.normal(key, (2, 101, n, 8)) for key, n in zip(keys, (4, 2, 2, 4)))
    return q, k, v, jnp.asarray([-3.0, 0.0, 1.0, 6.0]), do


def masked(q, k, v, sinks, spec, documents):
    """The same with a column of sinks behind all scores; its weight is left out."""
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    scores = jnp.einsum("bsnh,btnh->bnst", q, k) * spec.scale_of(8)
    scores = scores if spec.soft_cap is None else spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    tokens = np.arange(202).reshape(2, 101)
    number = np.searchsorted(documents, tokens, side="right") if documents else np.zeros_like(tokens)
    s, t = np.arange(101)[:, None], np.arange(101)[None]
    mask = (number[:, :, None] == number[:, None, :]) & (t <= s if spec.causal else True)
    mask &= True if spec.window is None else np.abs(s - t) < spec.window
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1))[..., :-1]
    return jnp.einsum("bnst,btnh->bsnh", weights, v)


@pytest.mark.parametrize("case", SPECS)
def test_output_and_gradients_equal_a_column_of_scores(case):
    spec, documents = SPECS[case]
    *arrays, do = inputs()
    offsets = None if documents is None else jnp.asarray(documents, jnp.int32)
    ours = lambda q, k, v, sinks: attention(q, k, v, spec, offsets, sinks, kernel="xla")
    found, true = (
        jax.jit(lambda do, *x, fn=fn: (lambda o, pull: (o, *pull(do)))(*jax.vjp(fn, *x)))(do, *arrays)
        for fn in (ours, lambda *x: masked(*x, spec, documents))
    )
    for name, a, b in zip(("o", "dq", "dk", "dv", "dsinks"), found, true, strict=True):
        assert relative_error(a, b) < 1e-5, name
    assert np.abs(found[-1]).min() > 1e-4  # each head's sink has a gradient


def test_sinks_without_an_array_and_an_array_without_sinks_are_refused():
    q, k, v, sinks, _ = inputs()
    with pytest.raises(ValueError, match="sinks=True in the AttentionSpec, but no array"):
        attention_forward(q, k, v, AttentionSpec(sinks=True), kernel="xla")
    with pytest.raises(ValueError, match="sinks=False in the AttentionSpec, but an array"):
        attention_forward(q, k, v, sinks=sinks, kernel="xla")


def test_a_kernel_without_sinks_is_refused():
    q, k, v, sinks, _ = inputs()
    own = Kernel("own", xla.forward, xla.backward)
    with pytest.raises(UserError, match="--attention own does not implement sinks"):
        attention_forward(q, k, v, AttentionSpec(sinks=True), None, sinks, kernel=own)
