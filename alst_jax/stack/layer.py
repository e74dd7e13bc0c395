"""One layer's forward and backward pass: the token-wise halves of its block run in tiles, and overwrite their input.

B batch, T local tokens, D hidden, N query heads, K kv heads, H head dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from alst_jax.models.block import Block, Tokens, halves
from alst_jax.models.config import ModelConfig
from alst_jax.models.tree import combine, names, partition
from alst_jax.ops.attention import find_kernel, runs_where
from alst_jax.ops.linear import instead
from alst_jax.ops.tiling import even_tile, stream, token_rows
from alst_jax.parallel.sequence import SequenceParallel
from alst_jax.parallel.sharding import gather, is_spec, scatter, whole
from alst_jax.stack.kept import Kept, put_tile
from alst_jax.stack.sums import add_parts, widen, zero_sums
from alst_jax.xla import scopes
from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.order import zeros_after

PyTree = Any


class Weights(NamedTuple):
    """A block's parameters in two parts, with None where a leaf belongs to the other part (models/tree.py)."""

    trained: Block
    frozen: Block

    @property
    def block(self) -> Block:
        return combine(self.trained, self.frozen)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """How a layer of a model is computed.

    specs: shardings of one layer's parameters. reduce_dtype: in which gradients are summed over devices. tile: tokens
    worked on at a time in all that is token-wise (None: all).

    Weights keep their own dtype outside the loops over tiles and are widened to float32 inside (see ops/linear.py),
    where the compiler sees the conversion there and back and drops it: not one conversion of each weight for each tile.
    """

    model: ModelConfig
    sequence: SequenceParallel
    specs: PyTree
    reduce_dtype: str
    tile: int | None

    # --------------------------------------------------------------------------------------------- weights and shards

    def load(self, shards: Weights) -> Weights:
        """Whole weights on the device, from shards on the device: an all-gather (ZeRO-3)."""
        return self._with_specs(lambda shard, spec: whole(shard, spec), shards)

    def load_differentiable(self, shards: Weights) -> Weights:
        """`load`, widened to float32; its gradients go back to the shards by a reduce-scatter."""
        return self._with_specs(lambda shard, spec: gather(shard, spec, self.reduce_dtype), shards)

    def scatter(self, gradients: Block, shards: Block, wide: bool = False) -> Block:
        """The gradients of the trained shards, in their dtype or, if `wide`, in float32, from those of the whole
        weights."""
        dtype = lambda shard: accumulation_dtype(shard.dtype) if wide else shard.dtype
        one = lambda g, spec, shard: shard if shard is None else scatter(g, spec, self.reduce_dtype, dtype(shard))
        return jax.tree.map(one, gradients, self.specs, shards, is_leaf=_none_or_spec)

    def _with_specs(self, fn: Callable, shards: Weights) -> Weights:
        one = lambda shard, spec: shard if shard is None else fn(shard, spec)
        return Weights(*(jax.tree.map(one, part, self.specs, is_leaf=_none_or_spec) for part in shards))

    # -------------------------------------------------------------------------------------------------- the two halves

    def attend(
        self, number: Array | int, h: Float[Array, "B T D"], weights: Weights, tokens: Tokens
    ) -> tuple[Float[Array, "B T N H"], Array]:
        """The output of attention and its log-sum-exps, from the layer's input. number: the layer's."""
        with jax.named_scope(scopes.ATTENTION):
            return self.by_kind(number)(
                lambda kind: self._sequence(number).attend(
                    self._projector(kind, h, weights, tokens, self.sequence.chunks),
                    self.model.attention_spec(kind),
                    h,
                    tokens.documents,
                )
            )

    def attend_keeping(
        self, number: Array | int, h: Float[Array, "B T D"], weights: Weights, tokens: Tokens
    ) -> tuple[tuple[Float[Array, "B T N H"], Array], tuple]:
        """(the results of `attend`, q, k and v of all heads)"""

        def one(kind):
            qkv = self._projector(kind, h, weights, tokens, 1)(0)
            project = Kept(tuple(x[None] for x in qkv)).projector(self.sequence.chunks)
            spec = self.model.attention_spec(kind)
            return self._sequence(number).attend(project, spec, h, tokens.documents), qkv

        with jax.named_scope(scopes.ATTENTION):
            return self.by_kind(number)(one)

    def after(
        self,
        h: Float[Array, "B T D"],
        o: Float[Array, "B T N H"],
        weights: Weights,
        tokens: Tokens,
        kept: Kept = Kept(),
    ) -> Float[Array, "B T D"]:
        """The next h, from the layer's input and the output of attention.

        buffer | before | after
        h      | input  | the next h
        """

        def one(block, h, o, start, gated, draws=None):
            known = kept.tile(start, h.shape[0])
            return block.after_and_gated(h, o, known and (lambda x: known), draws)[0], gated

        return self._after(h, o, weights, tokens, one, None)[0]

    def after_keeping(
        self, h: Float[Array, "B T D"], o: Float[Array, "B T N H"], weights: Weights, tokens: Tokens, kept: Kept
    ) -> tuple[Float[Array, "B T D"], tuple]:
        """(the next h, the stacks of gate and up with this layer's row written)"""

        def one(block, h, o, start, gated, draws=None):
            out, new = block.after_and_gated(h, o, draws=draws)
            return out, put_tile(gated, new, kept.row, start)

        return self._after(h, o, weights, tokens, one, kept.gated)

    def backward(
        self,
        number: Array | int,
        h: Float[Array, "B T D"],
        weights: Weights,
        tokens: Tokens,
        results: tuple,
        dh: Float[Array, "B T D"],
        kept: Kept = Kept(),
    ) -> tuple[Float[Array, "B T D"], Block]:
        """The gradients of the layer's input h and of its trained weights, the latter float32. results: of `attend`.
        kept: arrays that are not computed again.

        buffer     | before               | after
        dh         | gradient of the next h | gradient of h
        (zeros)    | -                    | gradient of o, then of q

        Besides these, h and o, only the gradients of keys and values and one group of heads have the sequence's length.
        """
        o_BTNH, _ = results
        dafter, (dh_TD, do) = self._after_backward(weights, h, o_BTNH, tokens, dh, kept)

        def rest(kind):
            chunks = self.sequence.chunks
            with jax.named_scope(scopes.ATTENTION):
                project = kept.projector(chunks) if kept.qkv else self._projector(kind, h, weights, tokens, chunks)
                dqkv = self._sequence(number).attend_backward(
                    project, self.model.attention_spec(kind), results, do.reshape(o_BTNH.shape), tokens.documents
                )
            return self._before_backward(kind, weights, h, tokens, dqkv, dh_TD)

        dbefore, (dh_TD,) = self.by_kind(number)(rest)
        return dh_TD.reshape(h.shape), combine(dbefore, dafter)

    # ------------------------------------------------------------------------------------------------------ internals

    @property
    def shares_squares(self) -> bool:
        """Whether a group of heads needs `Block.mean_squares` of all heads."""
        return self.sequence.chunks > 1 and self.model.qk_norm == "all heads"

    def _after(self, h_BTD, o_BTNH, weights, tokens, one, gated):
        """one(block, h, o, start, gated, *draws) -> (the next h, gated), for the tokens of a tile; start: its first
        token."""
        block = self._half(weights.block, "after")[0]

        def body(carry, written, read):
            start, gated = carry
            out, gated = one(widen(block), written[0], read[0], start, gated, *read[1:])
            return (start + out.shape[0], gated), (out,)

        with jax.named_scope(scopes.MLP):
            (_, gated), (out,) = stream(
                body,
                (jnp.int32(0), gated),
                written=(token_rows(h_BTD),),
                read=tuple(map(token_rows, (o_BTNH, *tokens.drawn))),
                rows=self._rows(h_BTD),
            )
        return out.reshape(h_BTD.shape), gated

    def by_kind(self, number: Array | int) -> Callable:
        """apply(fn) = fn(kind of the layer `number`). Where layers differ, the compiled program has one branch a
        kind."""
        kinds = self.model.kinds
        if len(kinds) == 1:
            return lambda fn: fn(kinds[0])
        index = jnp.asarray(self.model.kind_numbers)[number]
        return lambda fn: lax.switch(index, [lambda kind=kind: fn(kind) for kind in kinds])

    def _sequence(self, number: Array | int) -> SequenceParallel:
        """The sequence parallelism of a layer. Where the model computes attention in some layers only, its kernel
        asks."""
        if self.model.attention_layers is None:
            return self.sequence
        kernel = runs_where(number < self.model.attention_layers, find_kernel(self.sequence.kernel))
        return dataclasses.replace(self.sequence, kernel=kernel)

    def _half(self, block: Block, half: str) -> tuple[Block, Block]:
        """(the parameters that this half of the block reads, the others)"""
        wanted = getattr(halves(self.model), half)
        return partition(block, lambda path: names(path) in wanted)

    def _projector(self, kind, h_BTD, weights, tokens, chunks):
        """project(i) -> q, k, v of chunk i, a tile of tokens at a time. Their buffers are allocated after h: those of a
        scan's results would be allocated long before, for all layers that no loop goes over at once."""
        before = self._half(weights.block, "before")[0]
        read = tuple(map(token_rows, (h_BTD, *tokens.rows)))
        last = len(read)  # squares may follow

        def in_tiles(one, read):
            places = tuple(zeros_after(h_BTD, x.shape, x.dtype) for x in jax.eval_shape(one, read))
            body = lambda _, written, rows: ((), one(rows))
            return stream(body, (), written=places, read=read, rows=self._rows(h_BTD))[1]

        if chunks > 1 and self.shares_squares:
            alone = (read[0], *map(token_rows, tokens.drawn))
            read += in_tiles(lambda rows: widen(before).mean_squares(*rows), alone)

        def project(i):
            block = before if chunks == 1 else before.heads(i, chunks)
            qkv = in_tiles(
                lambda rows: widen(block).before(rows[0], Tokens.of_rows(*rows[1:last]), kind, rows[last:]), read
            )
            return tuple(x.reshape(*h_BTD.shape[:2], *x.shape[1:]) for x in qkv)

        return project

    def _after_backward(self, weights, h_BTD, o_BTNH, tokens, dh_BTD, kept):
        trained, frozen = self._half(weights.trained, "after")[0], weights.frozen

        def body(carry, written, read):
            (sums, start), rows = carry, read[0].shape[0]
            known, draws = kept.tile(start, rows), read[2] if tokens.drawn else None

            def after(h, o, w):
                block = combine(w, frozen)
                return block.after_and_gated(
                    h, o, known and (lambda x: tuple(map(instead, known, block.mlp.gate_and_up(x, draws)))), draws
                )[0]

            _, pullback = jax.vjp(after, *read[:2], widen(trained))
            *written, dweights = pullback(written[0])
            return (add_parts(sums, dweights), start + rows), tuple(written)

        # The zeros are all overwritten: a place for the gradient of o.
        written = token_rows(dh_BTD), zeros_after(dh_BTD, token_rows(o_BTNH).shape, o_BTNH.dtype)
        read = tuple(map(token_rows, (h_BTD, o_BTNH, *tokens.drawn)))
        with jax.named_scope(scopes.MLP):
            (sums, _), written = stream(
                body, (zero_sums(dh_BTD, trained), jnp.int32(0)), written=written, read=read, rows=self._rows(h_BTD)
            )
        return sums, written

    def _before_backward(self, kind, weights, h_BTD, tokens, dqkv, dh_TD):
        trained, frozen = self._half(weights.trained, "before")[0], weights.frozen

        def body(sums, written, read):
            h, dqkv, rows = read[0], read[1:4], Tokens.of_rows(*read[4:])
            _, pullback = jax.vjp(lambda h, w: combine(w, frozen).before(h, rows, kind), h, widen(trained))
            dx, dweights = pullback(dqkv)
            return add_parts(sums, dweights), (written[0] + dx,)

        read = tuple(map(token_rows, (h_BTD, *dqkv, *tokens.rows)))
        with jax.named_scope(scopes.ATTENTION):
            return stream(body, zero_sums(dqkv[0], trained), written=(dh_TD,), read=read, rows=self._rows(h_BTD))

    def _rows(self, h_BTD):
        tokens = h_BTD.shape[0] * h_BTD.shape[1]
        return even_tile(tokens, self.tile) if self.tile else tokens


def _none_or_spec(x):
    return x is None or is_spec(x)
