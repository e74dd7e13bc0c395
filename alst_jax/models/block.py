"""The transformer block and the parameters of a model, as Flax NNX modules, which are pytrees.

B batch, T local tokens, D hidden, F ffn, N query heads, K kv heads, H head dim, V vocabulary, L layers. Modules see whole
weights and local tokens; sharding, gathering and placement are decided outside (step.py, stack/). One layer's block is a
slice of the stacked one: `jax.tree.map(lambda w: w[i], params["layers"])`, and so are its gradients.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from alst_jax.models.config import LayerKind, ModelConfig
from alst_jax.models.tree import leaves_read_by
from alst_jax.ops.linear import add_bias, linear
from alst_jax.ops.norm import rms_norm
from alst_jax.ops.rope import apply_rope, rope_tables
from alst_jax.ops.swiglu import swiglu

Params = dict[str, Any]


class Tokens(NamedTuple):
    """What a token brings to a block besides its hidden state; leading dims are those of the hidden states."""

    cos: Float[Array, "*B 1 H2"]
    sin: Float[Array, "*B 1 H2"]

    @staticmethod
    def of(config: ModelConfig, positions: Int[Array, "B T"]) -> "Tokens":
        """From the positions of the tokens in their documents."""
        return Tokens(*rope_tables(config.rope, config.head_dim, positions))


class Linear(nnx.Module):
    """x @ kernel + bias."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        std = jnp.asarray(config.initializer_range, dtype)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (in_dim, out_dim), dtype) * std)
        self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = linear(x, self.kernel[...])  # x @ kernel
        return y if self.bias is None else add_bias(y, self.bias[...])

    def heads(self, i: jax.Array | int, n: int) -> "Linear":
        """The columns of group i of n equal groups of heads."""
        size = lambda w: w.shape[-1] // n
        return jax.tree.map(lambda w: lax.dynamic_slice_in_dim(w, i * size(w), size(w), axis=-1), self)


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """The four projections around attention."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        make = functools.partial(Linear, config=config, dtype=dtype, rngs=rngs)
        d, qkv_bias = config.hidden_size, config.attention_bias or config.qkv_bias
        self.q_proj = make(d, config.num_heads * config.head_dim, qkv_bias)
        self.k_proj = make(d, config.num_kv_heads * config.head_dim, qkv_bias)
        self.v_proj = make(d, config.num_kv_heads * config.head_dim, qkv_bias)
        self.o_proj = make(config.num_heads * config.head_dim, d, config.attention_bias)


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        make = functools.partial(Linear, bias=config.mlp_bias, config=config, dtype=dtype, rngs=rngs)
        self.gate_proj = make(config.hidden_size, config.intermediate_size)
        self.up_proj = make(config.hidden_size, config.intermediate_size)
        self.down_proj = make(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    All but attention is token-wise: `before` and `after`, which stack/layer.py runs in tiles of tokens.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)
        self.head_dim, self.num_kv_heads = config.head_dim, config.num_kv_heads

    def __call__(
        self, h: Float[Array, "*B D"], tokens: Tokens, attention: Callable, kind: LayerKind = LayerKind()
    ) -> Float[Array, "*B D"]:
        """The next hidden states. attention(q[*B, N, H], k[*B, K, H], v) -> o[*B, N, H]."""
        return self.after(h, attention(*self.before(h, tokens, kind)))

    def before(
        self, h: Float[Array, "*B D"], tokens: Tokens, kind: LayerKind = LayerKind()
    ) -> tuple[Float[Array, "*B N H"], Float[Array, "*B K H"], Float[Array, "*B K H"]]:
        """Queries, keys and values, for as many heads as the projections have columns."""
        x, attn = self.input_layernorm(h), self.self_attn
        q, k, v = (
            part(x).reshape(*x.shape[:-1], -1, self.head_dim) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        if kind.rope:
            q, k = apply_rope(q, *tokens), apply_rope(k, *tokens)
        return q, k, v

    def after(self, h: Float[Array, "*B D"], o: Float[Array, "*B N H"]) -> Float[Array, "*B D"]:
        """The next hidden states, from the output of attention."""
        h = h + self.self_attn.o_proj(o.reshape(*o.shape[:-2], -1))
        return h + self.mlp(self.post_attention_layernorm(h))

    def heads(self, i: jax.Array | int, n: int) -> "Block":
        """The block whose `before` makes group i of n of the query heads, and the kv heads that they read."""
        part, kv = jax.tree.map(lambda w: w, self), min(n, self.num_kv_heads)
        attn = part.self_attn
        attn.q_proj = attn.q_proj.heads(i, n)
        attn.k_proj, attn.v_proj = (proj.heads(i * kv // n, kv) for proj in (attn.k_proj, attn.v_proj))
        return part


def init_params(config: ModelConfig, dtype: DTypeLike, key: jax.Array) -> Params:
    """Random weights: normal with `initializer_range`, norms one, biases zero; layers stacked on dim 0."""
    rngs = nnx.Rngs(params=key)
    table = lambda: {"embedding": jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), dtype)
                     * jnp.asarray(config.initializer_range, dtype)}
    params = {"embed_tokens": table()}
    params["layers"] = nnx.vmap(lambda rngs: Block(config, dtype, rngs))(rngs.fork(split=config.num_layers))
    params["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
    return params if config.tie_word_embeddings else params | {"lm_head": table()}


def abstract_params(config: ModelConfig, dtype: DTypeLike) -> Params:
    """The parameter tree as jax.ShapeDtypeStructs: from it derive shapes, shardings, optimizer state and converters."""
    return jax.eval_shape(lambda: init_params(config, dtype, jax.random.key(0)))


class Halves(NamedTuple):
    """Names of a block's parameters by the half that reads them."""

    before: frozenset[tuple[str, ...]]
    after: frozenset[tuple[str, ...]]


@functools.cache
def halves(config: ModelConfig) -> Halves:
    """Which parameters `Block.before` reads and which `Block.after`. ValueError if a parameter is read by both or none."""
    block = jax.eval_shape(lambda: Block(config, jnp.float32, nnx.Rngs(0)))
    h, tokens = jnp.zeros((2, config.hidden_size)), Tokens.of(config, jnp.zeros((2, 1), jnp.int32))
    tokens = Tokens(*(x[:, 0] for x in tokens))
    o = jnp.zeros((2, config.num_heads, config.head_dim))
    before = frozenset().union(*(leaves_read_by(lambda b, kind=kind: b.before(h, tokens, kind), block)
                                 for kind in config.kinds))
    after = leaves_read_by(lambda b: b.after(h, o), block)
    if before & after or len(before | after) != len(jax.tree.leaves(block)):
        raise ValueError(f"each parameter of a block belongs to one half: before {before}, after {after}")
    return Halves(before, after)
