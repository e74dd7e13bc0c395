# pytest tests/unit/test_attention.py
"""Attention in XLA against numpy and jax.nn; cuDNN's calls split by heads; what the backward pass uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.config import UserError
from alst_jax.ops import attention as attention_module
from alst_jax.ops.attention import attention, cudnn, head_groups, xla
from tests import stand_in
from tests.helpers import relative_error

TOKENS = 23


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def naive_attention(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def forward_and_gradients(function, *qkv_do):
    """(output, gradients of q, k, v), in one compiled call."""
    return jax.jit(lambda *x: (lambda o, pullback: (o, pullback(x[3])))(*jax.vjp(function, *x[:3])))(*qkv_do)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_xla_attention(kv_heads, monkeypatch):
    monkeypatch.setattr(xla, "SCORES_BYTES", 1)
    monkeypatch.setattr(xla, "MIN_ROWS", 7)  # 23 queries in tiles of 7, the last one ragged
    q, k, v = normal(0, 2, TOKENS, 4, 8), normal(1, 2, TOKENS, kv_heads, 8), normal(2, 2, TOKENS, kv_heads, 8)
    do = normal(3, *q.shape)
    o, gradients = forward_and_gradients(lambda *qkv: attention(*qkv, kernel="xla"), q, k, v, do)
    assert relative_error(o, naive_attention(q, k, v)) < 1e-5
    library = lambda *qkv: jax.nn.dot_product_attention(*qkv, is_causal=True, implementation="xla")
    for a, b in zip(gradients, forward_and_gradients(library, q, k, v, do)[1], strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(
    "length,heads,kv_heads,groups",
    [
        (524_288, 32, 8, 1),  # exactly 2^31 elements: still right
        (524_416, 32, 8, 2),
        (589_824, 32, 8, 2),
        (1_048_576, 32, 8, 2),
        (1_200_000, 32, 8, 4),
        (4_194_304, 32, 8, 8),
        (4_194_432, 32, 8, 16),
        (10_000_000, 32, 8, 32),
        (589_824, 32, 1, 2),
        (589_824, 36, 9, 3),
    ],
)
def test_heads_are_split_below_the_int32_wall(length, heads, kv_heads, groups):
    assert head_groups((1, length, heads, 128), kv_heads) == groups
    assert length * heads // groups * 128 <= 2**31


def test_a_head_beyond_the_wall_is_refused():
    with pytest.raises(UserError, match="cuDNN's gradients are right up to 16777216 tokens a head"):
        head_groups((1, 16_777_217, 32, 128), 8)


@pytest.mark.parametrize(
    "kv_heads,parts", [(2, 4), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(1, 8, marks=pytest.mark.slow)]
)
def test_split_heads_equal_one_call(kv_heads, parts, monkeypatch):
    """The guard's splitting: which query head reads which kv head must not change, nor what is summed where."""
    q, k, v = normal(0, 1, TOKENS, 8, 8), normal(1, 1, TOKENS, kv_heads, 8), normal(2, 1, TOKENS, kv_heads, 8)
    do = normal(3, 1, TOKENS, 8, 8)
    with monkeypatch.context() as patch:
        calls = stand_in.install(patch)
        patch.setattr(cudnn, "CUDNN_MAX_ELEMENTS", TOKENS * 8 * 8 // parts)
        o, gradients = forward_and_gradients(lambda *qkv: attention(*qkv, kernel="cudnn"), q, k, v, do)
    assert relative_error(o, naive_attention(q, k, v)) < 1e-5
    assert {shape[2] for shape in calls} == {8 // parts}
    whole = forward_and_gradients(lambda *qkv: attention(*qkv, kernel="xla"), q, k, v, do)[1]
    for ours, plain in zip(gradients, whole, strict=True):
        assert relative_error(ours, plain) < 1e-5


def test_backward_uses_what_was_kept(monkeypatch):
    """The output and lse handed to the backward pass are those it works with, not some computed again."""
    stand_in.install(monkeypatch)
    q, k, v, do = (normal(i, 1, TOKENS, 4, 8) for i in range(4))
    o, lse = attention_module.attention_forward(q, k, v, kernel="cudnn")
    backward = jax.jit(lambda o, lse: attention_module.attention_backward(q, k, v, (o, lse), do, kernel="cudnn"))
    exact = backward(o, lse)
    whole = forward_and_gradients(lambda *qkv: attention(*qkv, kernel="xla"), q, k, v, do)[1]
    for ours, plain in zip(exact, whole, strict=True):
        assert relative_error(ours, plain) < 1e-5
    other_o, other_lse = backward(o + 1, lse), backward(o, lse + 1)
    assert relative_error(other_o[0], exact[0]) > 1e-2 and relative_error(other_lse[2], exact[2]) > 1e-2


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="'flash3': one of xla, cudnn, flash"):
        attention(normal(0, 1, 8, 2, 4), normal(0, 1, 8, 2, 4), normal(0, 1, 8, 2, 4), kernel="flash3")
