"""Llama as Flax NNX modules: one block, readable; the stack of blocks is data (`layers`, stacked on dim 0).

B batch, T local tokens, D hidden, F ffn, N query heads, K kv heads, H head dim, V vocabulary, L layers. The modules see
whole weights and local tokens; how weights are sharded, gathered and placed is decided outside (step.py).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from alst_jax.models.config import ModelConfig
from alst_jax.ops.linear import add_bias, linear
from alst_jax.ops.norm import rms_norm
from alst_jax.ops.rope import apply_rope
from alst_jax.ops.swiglu import swiglu

Params = dict[str, Any]


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
        self.head_dim = h

    def project(
        self, x: Float[Array, "T D"], q_proj: Linear, k_proj: Linear, v_proj: Linear, rope: tuple
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
        """Queries, keys and values of some tokens, for as many heads as the projections have columns."""
        q_TNH, k_TKH, v_TKH = (part(x).reshape(x.shape[0], -1, self.head_dim) for part in (q_proj, k_proj, v_proj))
        return apply_rope(q_TNH, *rope), apply_rope(k_TKH, *rope), v_TKH


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        make = functools.partial(Linear, use_bias=config.mlp_bias, std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.gate_proj = make(d, f)
        self.up_proj = make(d, f)
        self.down_proj = make(f, d)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream. All but attention is token-wise: `before` and `behind`."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)


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


class BlockFunctions(NamedTuple):
    """A `Block` as pure functions of some tokens T and of one layer's weights (no L dim).

    before(h[T, D], weights, rope) -> q[T, N, H], k[T, K, H], v[T, K, H]; weights: (norm, q_proj, k_proj, v_proj), and
    any columns of the projections make that many heads. behind((h[T, D], o[T, N, H]), weights) -> the next h[T, D].
    split(layer) -> the weights of the two; join(before, behind) -> layer.
    """

    before: Callable
    behind: Callable
    split: Callable
    join: Callable


def block_functions(config: ModelConfig) -> BlockFunctions:
    """`Block` taken apart where its attention is."""
    # Dtypes and shapes of the abstract block do not matter: merge puts in the arrays it is given.
    block = nnx.eval_shape(lambda: Block(config, jnp.float32, nnx.Rngs(0)))
    attn = block.self_attn

    def project(norm, q_proj, k_proj, v_proj):
        return lambda h_TD, rope: attn.project(norm(h_TD), q_proj, k_proj, v_proj, rope)

    def add_attention_and_mlp(o_proj, norm, mlp):
        def behind(h_and_o):
            h_TD, o_TNH = h_and_o
            h_TD = h_TD + o_proj(o_TNH.reshape(o_TNH.shape[0], -1))
            return h_TD + mlp(norm(h_TD))

        return behind

    return BlockFunctions(
        _pure(project, block.input_layernorm, attn.q_proj, attn.k_proj, attn.v_proj),
        _pure(add_attention_and_mlp, attn.o_proj, block.post_attention_layernorm, block.mlp), _split, _join)


def _split(layer):
    attn = layer["self_attn"]
    return ((layer["input_layernorm"], attn["q_proj"], attn["k_proj"], attn["v_proj"]),
            (attn["o_proj"], layer["post_attention_layernorm"], layer["mlp"]))


def _join(before, behind):
    (norm, q_proj, k_proj, v_proj), (o_proj, post_norm, mlp) = before, behind
    attn = {"q_proj": q_proj, "k_proj": k_proj, "v_proj": v_proj, "o_proj": o_proj}
    return {"input_layernorm": norm, "self_attn": attn, "post_attention_layernorm": post_norm, "mlp": mlp}


def _pure(method: Callable, *modules: nnx.Module) -> Callable:
    """fn(x, weights, *args) = method(*modules)(x, *args), with a tree of weights for each of the modules."""
    parts = [nnx.split(module) for module in modules]

    def merge(part, weights):
        graphdef, state = part
        return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(weights)))

    return lambda x, weights, *args: method(*map(merge, parts, weights))(x, *args)
