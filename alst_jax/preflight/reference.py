"""The independent computation: a transformer in float32 jax.numpy, written from the definitions. It shares no code with
ops/, models/block.py, stack/ and parallel/; it reads the weights by their names.

R tokens, D hidden, N query heads, K kv heads, G = N / K, H head dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alst_jax.config import IGNORED
from alst_jax.models.config import LayerKind, ModelConfig
from alst_jax.ops.attention import AttentionSpec

Dict = dict[str, Any]


def independent(fn: Callable, **options: Any) -> Callable:
    """fn compiled, with float32 products where GPUs would round the factors."""

    def in_float32(*args):
        with jax.default_matmul_precision("highest"):
            return fn(*args)

    return jax.jit(in_float32, **options)


def norm(x: jax.Array, weights: Dict, model: ModelConfig) -> jax.Array:
    mean = jnp.sum(x * x, axis=-1, keepdims=True) / x.shape[-1]
    scale = (weights["scale"] + model.norm_offset).reshape((1,) * (x.ndim - 1) + (-1,))
    return x / jnp.sqrt(mean + model.rms_norm_eps) * scale


def dense(x: jax.Array, weights: Dict) -> jax.Array:
    y = jnp.einsum("ri,io->ro", x, weights["kernel"])
    return y + weights["bias"][None] if "bias" in weights else y


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The first P dims of x[R, N, H] as complex numbers x[i] + x[i + P/2] j, times cos + sin j [R, P/2]."""
    half = cos.shape[-1]
    a, b, rest, cos, sin = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :], cos[:, None], sin[:, None]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)


def before(model: ModelConfig, kind: LayerKind, w: Dict, h: jax.Array, cos: jax.Array, sin: jax.Array):
    """q[R, N, H], k[R, K, H], v of h[R, D]."""
    x, attn = h if model.norms == "after" else norm(h, w["input_layernorm"], model), w["self_attn"]
    q, k, v = (dense(x, attn[f"{name}_proj"]) for name in "qkv")
    if model.qk_norm == "all heads":
        q, k = norm(q, attn["q_norm"], model), norm(k, attn["k_norm"], model)
    q, k, v = (y.reshape(len(h), -1, model.head_dim) for y in (q, k, v))
    if model.qk_norm == "head":
        q, k = norm(q, attn["q_norm"], model), norm(k, attn["k_norm"], model)
    return (turn(q, cos, sin), turn(k, cos, sin), v) if kind.rope else (q, k, v)


def gate(model: ModelConfig, x: jax.Array) -> jax.Array:
    if model.activation == "silu":
        return x / (1 + jnp.exp(-x))
    return x / 2 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))


def after(model: ModelConfig, w: Dict, h: jax.Array, o: jax.Array) -> jax.Array:
    """The next h[R, D], of h and the output of attention o[R, N, H]."""

    def mlp(x):
        m = w["mlp"]
        return dense(gate(model, dense(x, m["gate_proj"])) * dense(x, m["up_proj"]), m["down_proj"])

    a = dense(o.reshape(len(h), -1), w["self_attn"]["o_proj"])
    if model.norms == "before":
        h = h + model.residual_multiplier * a
        return h + model.residual_multiplier * mlp(norm(h, w["post_attention_layernorm"], model))
    h = h + model.residual_multiplier * norm(a, w["post_attention_layernorm"], model)
    x = norm(h, w["pre_feedforward_layernorm"], model) if model.norms == "both" else h
    return h + model.residual_multiplier * norm(mlp(x), w["post_feedforward_layernorm"], model)


def scores(q: jax.Array, k: jax.Array, t: jax.Array, s: jax.Array, start: jax.Array, spec: AttentionSpec):
    """(scores float32[T, G, S], the slope of the soft cap) of q[T, G, H] at t[T], whose document begins at start[T],
    and k[S, H] at s[S]; -inf where a query does not read a key."""
    raw = jnp.einsum("tgh,sh->tgs", q, k) * (q.shape[-1] ** -0.5 if spec.scale is None else spec.scale)
    slope = jnp.ones_like(raw)
    if spec.soft_cap is not None:
        bent = jnp.tanh(raw / spec.soft_cap)
        raw, slope = spec.soft_cap * bent, 1 - bent * bent
    reads = (s[None] <= t[:, None]) & (s[None] >= start[:, None])
    if spec.window is not None:
        reads &= t[:, None] - s[None] < spec.window
    return jnp.where(reads[:, None], raw, -jnp.inf), slope


def token_losses(model: ModelConfig, w: Dict, h: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] of h[R, D] after the last layer, 0 for IGNORED."""
    x = logits(model, w, h)
    at = jnp.take_along_axis(x, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    top = jnp.max(x, axis=1)
    return jnp.where(labels == IGNORED, 0, jnp.log(jnp.sum(jnp.exp(x - top[:, None]), axis=1)) + top - at)


def logits(model: ModelConfig, w: Dict, h: jax.Array) -> jax.Array:
    return scaled(model, products(model, w, h))


def products(model: ModelConfig, w: Dict, h: jax.Array) -> jax.Array:
    return jnp.einsum("rd,vd->rv", norm(h, w["norm"], model), head(w))


def scaled(model: ModelConfig, x: jax.Array) -> jax.Array:
    x = x / model.logits_divisor
    return x if model.logits_soft_cap is None else model.logits_soft_cap * jnp.tanh(x / model.logits_soft_cap)


def head(w: Dict) -> jax.Array:
    return (w["lm_head"] if "lm_head" in w else w["embed_tokens"])["embedding"]


def loss(
    model: ModelConfig, w: Dict, tokens: jax.Array, labels: jax.Array, start: jax.Array, turns: tuple
) -> jax.Array:
    """The summed loss of one short sequence tokens[S]; labels, start[S]; turns: (cos, sin)[S, H/2] of each rotary
    embedding."""
    h = w["embed_tokens"]["embedding"][tokens] * model.embedding_multiplier
    t, heads = jnp.arange(len(tokens)), model.num_heads // model.num_kv_heads
    for number in range(model.num_layers):
        kind = model.layer_kinds[number] if model.layer_kinds else LayerKind()
        layer = jax.tree.map(lambda x, number=number: x[number], w["layers"])
        q, k, v = before(model, kind, layer, h, *turns[kind.table])
        spec, outputs = model.attention_spec(kind), []
        for n in range(model.num_kv_heads):
            group = slice(n * heads, (n + 1) * heads)
            x, _ = scores(q[:, group], k[:, n], t, t, start, spec)
            x = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
            outputs.append(jnp.einsum("tgs,sh->tgh", x / jnp.sum(x, axis=-1, keepdims=True), v[:, n]))
        h = after(model, layer, h, jnp.concatenate(outputs, axis=1))
    return jnp.sum(token_losses(model, w, h, labels))
