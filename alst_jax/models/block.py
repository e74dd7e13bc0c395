"""The transformer block and the parameters of a model, as Flax NNX modules, which are pytrees.

B batch, T local tokens, D hidden, F ffn, N query heads, K kv heads, H head dim, V vocabulary, L layers. Modules see
whole weights and local tokens; sharding, gathering and placement are decided outside (step.py, stack/). One layer's
block is a slice of the stacked one: `jax.tree.map(lambda w: w[i], params["layers"])`, and so are its gradients.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from alst_jax.models.config import LayerKind, ModelConfig
from alst_jax.models.lora import DOWN, Lora, adapted
from alst_jax.models.tree import leaves_read_by, names
from alst_jax.ops.dropout import dropout, fold_in
from alst_jax.ops.linear import add_bias, linear, low_rank
from alst_jax.ops.norm import mean_square, rms_norm
from alst_jax.ops.rope import apply_rope, rope_tables
from alst_jax.ops.swiglu import GATED
from alst_jax.xla.dtypes import accumulation_dtype

Params = dict[str, Any]


class Tokens(NamedTuple):
    """The data of tokens that a block needs beside their hidden states, with the same leading dims.

    documents: offsets of the packed documents into the B S tokens of this device's sequences (see `Kernel`), the same
    on all devices that share them; None: each sequence is one document.

    draws: a key for each token, of the masks of the adapters' dropout; None: nothing is dropped.
    """

    cos: Float[Array, "*B R H2"]  # R rotary embeddings
    sin: Float[Array, "*B R H2"]
    documents: Int[Array, "D1"] | None = None
    draws: UInt32[Array, "*B 2"] | None = None

    @property
    def rows(self) -> tuple[Array, ...]:
        """The fields with one entry a token; `of_rows` undoes it."""
        return self.cos, self.sin, *self.drawn

    @property
    def drawn(self) -> tuple[Array, ...]:
        """The keys of dropout, if there is dropout."""
        return () if self.draws is None else (self.draws,)

    @staticmethod
    def of_rows(cos: Array, sin: Array, draws: Array | None = None) -> "Tokens":
        return Tokens(cos, sin, draws=draws)

    def in_layer(self, number: Array | int) -> "Tokens":
        """The tokens with the keys of this layer."""
        return self if self.draws is None else self._replace(draws=fold_in(self.draws, number))

    @staticmethod
    def of(config: ModelConfig, positions: Int[Array, "B T"], length: jax.Array | None = None) -> "Tokens":
        """From the positions of the tokens in their documents. length: see `rope_tables`."""
        tables = [rope_tables(rope, config.head_dim, positions, length) for rope in config.ropes]
        return Tokens(*tables[0]) if len(tables) == 1 else Tokens(*(jnp.concatenate(t, axis=-2) for t in zip(*tables)))

    def rope(self, number: int) -> tuple[Float[Array, "*B 1 H2"], Float[Array, "*B 1 H2"]]:
        """cos and sin of one of the model's rotary embeddings."""
        return tuple(x if x.shape[-2] == 1 else x[..., number : number + 1, :] for x in (self.cos, self.sin))


Draws = UInt32[Array, "*B 2"] | None  # of `Tokens`


class Linear(nnx.Module):
    """x @ kernel + bias, and the term of an adapter if it has one (models/lora.py)."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        std = jnp.asarray(config.initializer_range, dtype)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (in_dim, out_dim), dtype) * std)
        self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B I"], draws: Draws = None) -> Float[Array, "*B O"]:
        y = linear(x, self.kernel[...])  # x @ kernel
        y = y if self.bias is None else add_bias(y, self.bias[...])
        if self.lora is None:
            return y
        if draws is not None:
            x = dropout(x, fold_in(draws, self.number), self.lora.dropout)
        return y + low_rank(x, self.lora_A[...], self.lora_B[...], self.lora.scale)

    lora: Lora | None = None

    def adapt(self, lora: Lora, number: int, rngs: nnx.Rngs) -> None:
        """Add an adapter as PEFT begins it: uniform, then zeros. number: the layer's in a block, for dropout."""
        (rows, outputs), dtype = self.kernel.shape, accumulation_dtype(self.kernel.dtype)
        self.lora, self.number, bound = lora, number, rows**-0.5
        self.lora_A = nnx.Param(jax.random.uniform(rngs.params(), (rows, lora.rank), dtype, -bound, bound))
        self.lora_B = nnx.Param(jnp.zeros((lora.rank, outputs), dtype))


def columns(module: Any, i: jax.Array | int, n: int) -> Any:
    """A module with part i of n equal parts of its output columns."""
    size = lambda w: w.shape[-1] // n
    cut = lambda w: lax.dynamic_slice_in_dim(w, i * size(w), size(w), axis=-1)
    return jax.tree_util.tree_map_with_path(lambda path, w: w if names(path)[-1] == DOWN else cut(w), module)


class RMSNorm(nnx.Module):
    """x / rms(x) * (scale + offset)."""

    def __init__(self, dim: int, config: ModelConfig, dtype: DTypeLike):
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset
        self.scale = nnx.Param(jnp.full((dim,), 1 - self.offset, dtype))

    def __call__(self, x: Float[Array, "*B D"], square: Float[Array, "*B 1"] | None = None) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale[...], self.eps, self.offset, square)


class Attention(nnx.Module):
    """The four projections around attention, and norms of queries and keys."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        make = functools.partial(Linear, config=config, dtype=dtype, rngs=rngs)
        d, qkv_bias = config.hidden_size, config.attention_bias or config.qkv_bias
        self.q_proj = make(d, config.num_heads * config.head_dim, qkv_bias)
        self.k_proj = make(d, config.num_kv_heads * config.head_dim, qkv_bias)
        self.v_proj = make(d, config.num_kv_heads * config.head_dim, qkv_bias)
        self.o_proj = make(config.num_heads * config.head_dim, d, config.attention_bias or config.o_bias)
        heads = {"none": None, "head": (1, 1), "all heads": (config.num_heads, config.num_kv_heads)}[config.qk_norm]
        norm = lambda n: RMSNorm(n * config.head_dim, config, dtype)
        self.q_norm, self.k_norm = map(norm, heads) if heads else (None, None)


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        make = functools.partial(Linear, bias=config.mlp_bias, config=config, dtype=dtype, rngs=rngs)
        self.gate_proj = make(config.hidden_size, config.intermediate_size)
        self.up_proj = make(config.hidden_size, config.intermediate_size)
        self.down_proj = make(config.intermediate_size, config.hidden_size)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "*B D"], draws: Draws = None) -> Float[Array, "*B D"]:
        return self.down(*self.gate_and_up(x, draws), draws)

    def gate_and_up(
        self, x: Float[Array, "*B D"], draws: Draws = None
    ) -> tuple[Float[Array, "*B F"], Float[Array, "*B F"]]:
        return self.gate_proj(x, draws), self.up_proj(x, draws)

    def down(self, gate: Float[Array, "*B F"], up: Float[Array, "*B F"], draws: Draws = None) -> Float[Array, "*B D"]:
        return self.down_proj(GATED[self.activation](gate, up), draws)


class Block(nnx.Module):
    """Attention and MLP, each with a norm before it, after it or both, and each added to the residual stream.

    Norms have Hugging Face's names: `post_attention_layernorm` follows attention, or where no norm does, is the MLP's.

    All but attention is token-wise: `before` and `after`, which stack/layer.py runs in tiles of tokens.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = lambda there=True: RMSNorm(config.hidden_size, config, dtype) if there else None
        self.input_layernorm = norm(config.norms != "after")
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm(config.norms == "both")
        self.mlp = MLP(config, dtype, rngs)
        self.post_feedforward_layernorm = norm(config.norms != "before")
        self.head_dim, self.num_kv_heads = config.head_dim, config.num_kv_heads
        self.norms, self.qk_norm, self.residual_multiplier = config.norms, config.qk_norm, config.residual_multiplier
        for number, linear_layer in adapted(self, config.lora):  # last: weights are drawn as without adapters
            linear_layer.adapt(config.lora, number, rngs)

    def __call__(
        self, h: Float[Array, "*B D"], tokens: Tokens, attention: Callable, kind: LayerKind = LayerKind()
    ) -> Float[Array, "*B D"]:
        """The next hidden states. attention(q[*B, N, H], k[*B, K, H], v) -> o[*B, N, H]."""
        return self.after(h, attention(*self.before(h, tokens, kind)), tokens.draws)

    def before(
        self, h: Float[Array, "*B D"], tokens: Tokens, kind: LayerKind = LayerKind(), squares: tuple = ()
    ) -> tuple[Float[Array, "*B N H"], Float[Array, "*B K H"], Float[Array, "*B K H"]]:
        """Queries, keys and values, for as many heads as the projections have columns. squares: of `mean_squares`, if
        these are not all heads."""
        x, attn = self._attention_input(h), self.self_attn
        q, k, v = (part(x, tokens.draws) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        if self.qk_norm == "all heads":
            q_square, k_square = squares or (None, None)
            q, k = attn.q_norm(q, q_square), attn.k_norm(k, k_square)
        q, k, v = (y.reshape(*x.shape[:-1], -1, self.head_dim) for y in (q, k, v))
        if self.qk_norm == "head":
            q, k = attn.q_norm(q), attn.k_norm(k)
        if kind.rope:
            q, k = apply_rope(q, *tokens.rope(kind.table)), apply_rope(k, *tokens.rope(kind.table))
        return q, k, v

    def mean_squares(
        self, h: Float[Array, "*B D"], draws: Draws = None
    ) -> tuple[Float[Array, "*B 1"], Float[Array, "*B 1"]]:
        """Mean squares of the queries and of the keys over all heads. `before` needs them if it works on some heads and
        norms go over all."""
        x = self._attention_input(h)
        return mean_square(self.self_attn.q_proj(x, draws)), mean_square(self.self_attn.k_proj(x, draws))

    def _attention_input(self, h):
        return h if self.input_layernorm is None else self.input_layernorm(h)

    def after(self, h: Float[Array, "*B D"], o: Float[Array, "*B N H"], draws: Draws = None) -> Float[Array, "*B D"]:
        """The next hidden states, from the output of attention."""
        return self.after_and_gated(h, o, draws=draws)[0]

    def after_and_gated(
        self,
        h: Float[Array, "*B D"],
        o: Float[Array, "*B N H"],
        gate_and_up: Callable | None = None,
        draws: Draws = None,
    ) -> tuple[Float[Array, "*B D"], tuple[Array, Array]]:
        """(the next hidden states, the MLP's gate and up). gate_and_up(x) -> gate, up: instead of the MLP's."""
        add = lambda h, x: h + (x if self.residual_multiplier == 1 else x * self.residual_multiplier)
        before, apply = self.norms == "before", lambda norm, x: x if norm is None else norm(x)
        x = self.self_attn.o_proj(o.reshape(*o.shape[:-2], -1), draws)
        h = add(h, x if before else self.post_attention_layernorm(x))
        x = apply(self.post_attention_layernorm if before else self.pre_feedforward_layernorm, h)
        gated = gate_and_up(x) if gate_and_up else self.mlp.gate_and_up(x, draws)
        return add(h, apply(self.post_feedforward_layernorm, self.mlp.down(*gated, draws))), gated

    def heads(self, i: jax.Array | int, n: int) -> "Block":
        """The block whose `before` makes group i of n of the query heads, and the kv heads that they read."""
        part, kv = jax.tree.map(lambda w: w, self), min(n, self.num_kv_heads)
        attn = part.self_attn
        attn.q_proj = columns(attn.q_proj, i, n)
        attn.k_proj, attn.v_proj = (columns(proj, i * kv // n, kv) for proj in (attn.k_proj, attn.v_proj))
        if self.qk_norm == "all heads":
            attn.q_norm, attn.k_norm = columns(attn.q_norm, i, n), columns(attn.k_norm, i * kv // n, kv)
        return part


def init_params(config: ModelConfig, dtype: DTypeLike, key: jax.Array) -> Params:
    """Random weights: normal with `initializer_range`, norms one, biases zero; layers stacked on dim 0."""
    rngs = nnx.Rngs(params=key)
    table = lambda: {
        "embedding": jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), dtype)
        * jnp.asarray(config.initializer_range, dtype)
    }
    params = {"embed_tokens": table()}
    params["layers"] = nnx.vmap(lambda rngs: Block(config, dtype, rngs))(rngs.fork(split=config.num_layers))
    params["norm"] = RMSNorm(config.hidden_size, config, dtype)
    return params if config.tie_word_embeddings else params | {"lm_head": table()}


def abstract_params(config: ModelConfig, dtype: DTypeLike) -> Params:
    """The parameter tree as jax.ShapeDtypeStructs: from it derive shapes, shardings, optimizer state and converters."""
    leaves, treedef = _traced(config, jnp.dtype(dtype))
    return treedef.unflatten(leaves)  # a tree of the caller's own


@functools.lru_cache(64)
def _traced(config: ModelConfig, dtype: jnp.dtype) -> tuple[list[jax.ShapeDtypeStruct], jax.tree_util.PyTreeDef]:
    """Traced once: a run and its plan ask for the same model several times."""
    return jax.tree.flatten(jax.eval_shape(lambda: init_params(config, dtype, jax.random.key(0))))


class Halves(NamedTuple):
    """Names of a block's parameters by the half that reads them."""

    before: frozenset[tuple[str, ...]]
    after: frozenset[tuple[str, ...]]


@functools.cache
def halves(config: ModelConfig) -> Halves:
    """Which parameters `Block.before` reads and which `Block.after`. ValueError if a parameter is read by both or
    none."""
    block = jax.eval_shape(lambda: Block(config, jnp.float32, nnx.Rngs(0)))
    h, tokens = jnp.zeros((2, config.hidden_size)), Tokens.of(config, jnp.zeros((2, 1), jnp.int32))
    tokens = Tokens(*(x[:, 0] for x in tokens.rows))
    o = jnp.zeros((2, config.num_heads, config.head_dim))
    before = frozenset().union(
        *(leaves_read_by(lambda b, kind=kind: b.before(h, tokens, kind), block) for kind in config.kinds)
    )
    after = leaves_read_by(lambda b: b.after(h, o), block)
    if before & after or len(before | after) != len(jax.tree.leaves(block)):
        raise ValueError(f"each parameter of a block belongs to one half: before {before}, after {after}")
    return Halves(before, after)
