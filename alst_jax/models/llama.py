"""Llama as Flax NNX modules: one block, readable; the stack of blocks is data (`layers`, stacked on dim 0).

B batch, T local tokens, D hidden, F ffn, N query heads, K kv heads, H head dim, V vocabulary, L layers. The modules see
whole weights and local tokens; how weights are sharded, gathered and placed is decided outside (step.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from alst_jax.config import ModelConfig
from alst_jax.ops.linear import add_bias, linear
from alst_jax.ops.norm import rms_norm
from alst_jax.ops.rope import apply_rope
from alst_jax.ops.tiling import tiled

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a block computes, without changing what.

    attend(project, x, (q, k, v weights), rope, (N, K)) -> o[B, T, N, H], where project(x, weights, rope) -> q, k, v also
    works on the weights of fewer heads; tokens per MLP tile (None: all).
    """

    attend: Callable
    mlp_tile: int | None = None


class Linear(nnx.Module):
    def __init__(self, in_dim: int, out_dim: int, use_bias: bool, std: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (in_dim, out_dim), dtype) * jnp.asarray(std, dtype))
        self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = linear(x, self.kernel[...])
        return y if self.bias is None else add_bias(y, self.bias[...])


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        d, h = config.hidden_size, config.head_dim
        make = functools.partial(
            Linear, use_bias=config.attention_bias, std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.q_proj = make(d, config.num_heads * h)
        self.k_proj = make(d, config.num_kv_heads * h)
        self.v_proj = make(d, config.num_kv_heads * h)
        self.o_proj = make(config.num_heads * h, d)
        self.heads, self.head_dim = (config.num_heads, config.num_kv_heads), h

    def __call__(self, x: Float[Array, "B T D"], rope: tuple, attend: Callable) -> Float[Array, "B T D"]:
        parts = [nnx.split(part) for part in (self.q_proj, self.k_proj, self.v_proj)]
        graphdefs, weights = [g for g, _ in parts], tuple(w for _, w in parts)

        def project(x_BTD, weights, rope):
            ys = [nnx.merge(g, w)(x_BTD) for g, w in zip(graphdefs, weights)]
            q_BTNH, k_BTKH, v_BTKH = (y.reshape(*y.shape[:2], -1, self.head_dim) for y in ys)
            return apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope), v_BTKH

        o_BTNH = attend(project, x, weights, rope, self.heads)
        return self.o_proj(o_BTNH.reshape(*o_BTNH.shape[:2], -1))


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        make = functools.partial(Linear, use_bias=config.mlp_bias, std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.gate_proj = make(d, f)
        self.up_proj = make(d, f)
        self.down_proj = make(f, d)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, h: Float[Array, "B T D"], rope: tuple, compute: Compute) -> Float[Array, "B T D"]:
        h = h + self.self_attn(self.input_layernorm(h), rope, compute.attend)
        graphdef, weights = nnx.split((self.post_attention_layernorm, self.mlp))

        def norm_and_mlp(x_TD, weights):
            norm, mlp = nnx.merge(graphdef, weights)
            return x_TD + mlp(norm(x_TD))

        rows = h.reshape(-1, h.shape[-1])
        return tiled(norm_and_mlp, compute.mlp_tile, rows, weights).reshape(h.shape)


class Llama(nnx.Module):
    """The whole parameter tree. Its forward pass is in step.py, where layers are scanned and weights gathered."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        table = (config.vocab_size, config.hidden_size)
        std = jnp.asarray(config.initializer_range, dtype)
        self.embed_tokens = nnx.Dict(embedding=nnx.Param(jax.random.normal(rngs.params(), table, dtype) * std))
        self.layers = nnx.vmap(lambda rngs: Block(config, dtype, rngs))(rngs.fork(split=config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Dict(embedding=nnx.Param(jax.random.normal(rngs.params(), table, dtype) * std))


def init_params(config: ModelConfig, dtype: DTypeLike, key: jax.Array) -> Params:
    """Random weights: normal with `initializer_range`, norms one, biases zero; layers stacked on dim 0."""
    return nnx.to_pure_dict(nnx.state(Llama(config, dtype, nnx.Rngs(params=key)), nnx.Param))


def abstract_params(config: ModelConfig, dtype: DTypeLike) -> Params:
    """The parameter tree as jax.ShapeDtypeStructs: from it derive shapes, shardings, optimizer state and converters."""
    return jax.eval_shape(lambda: init_params(config, dtype, jax.random.key(0)))


def block_apply(config: ModelConfig) -> Callable:
    """A pure function (layer_params, h, rope, compute) -> h for one layer's parameters (no L dim)."""
    # Dtypes and shapes of the abstract block do not matter: merge puts in the arrays it is given.
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(config, jnp.float32, nnx.Rngs(0))))

    def apply(layer: Params, h: Float[Array, "B T D"], rope: tuple, compute: Compute) -> Float[Array, "B T D"]:
        filled = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(layer))
        return nnx.merge(graphdef, filled)(h, rope, compute)

    return apply
