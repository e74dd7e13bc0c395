"""One layer's forward and backward pass, written out: what is token-wise runs in tiles, and writes over what it has read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from alst_jax.models.block import BlockFunctions
from alst_jax.ops.tiling import even_tile, stream, tiled
from alst_jax.parallel.ulysses import Ulysses
from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.order import zeros_after

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """How a layer is computed, without changing what.

    functions: the block as pure functions of tokens. ulysses: its attention. load(shards) -> whole weights, on the device;
    scatter(gradients, shards) -> the gradients of the shards; carriers(shards) -> whole weights in float32, differentiable.
    tile: tokens worked on at a time in all that is token-wise (None: all).

    Weights stay in their own dtype outside the loops over tiles and are widened to carriers (see ops/linear.py) inside,
    where the compiler sees the conversion there and back and drops it: not one of each weight for each tile.
    """

    functions: BlockFunctions
    ulysses: Ulysses
    load: Callable
    scatter: Callable
    carriers: Callable
    tile: int | None

    def plain(self, h: Float[Array, "B T D"], shards: PyTree, rope: PyTree) -> Float[Array, "B T D"]:
        """The next h, differentiable as it stands; `forward` and `backward` are this with less memory."""
        before, behind = self.functions.split(self.carriers(shards))
        tokens, tile = _tokens(h), self._tile(h)

        def project(weights):
            qkv = tiled(self._before, tile, tokens, weights, tuple(map(_tokens, rope)))
            return tuple(x.reshape(*h.shape[:2], *x.shape[1:]) for x in qkv)

        o, _ = self.ulysses.attend(project, before, h)
        return tiled(self.functions.behind, tile, (tokens, _tokens(o)), behind).reshape(h.shape)

    def attend(self, h: Float[Array, "B T D"], weights: PyTree, rope: PyTree) -> tuple[Float[Array, "B T N H"], PyTree]:
        """The attention's output and statistics, from the layer's input."""
        before, _ = self.functions.split(weights)
        return self.ulysses.attend(lambda w: self._project(h, w, rope), before, h)

    def forward(
        self, h: Float[Array, "B T D"], weights: PyTree, rope: PyTree, kept: PyTree = None
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """The next h, and what `attend` gives; where that is handed in as `kept`, attention is not run."""
        kept = self.attend(h, weights, rope) if kept is None else kept
        _, behind = self.functions.split(weights)
        body = lambda _, written, read: ((), (self._behind((written[0], read[0]), behind),))
        _, (out,) = stream(body, (), (_tokens(h),), (_tokens(kept[0]),), self._rows(h))
        return out.reshape(h.shape), kept

    def backward(
        self, h: Float[Array, "B T D"], weights: PyTree, rope: PyTree, kept: PyTree, dh: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """The gradients of the layer's input h and of its weights, the latter float32, from that of its output.

        The gradient of h is written over that of the output, that of q over that of the attention's output; beside them
        and h and o only keys' and values' gradients and one group of heads are of the sequence's length.
        """
        before, behind = self.functions.split(weights)
        o, _ = kept

        def back_behind(sums, written, read):
            _, pullback = jax.vjp(self.functions.behind, read, _widen(behind))
            (dh, do), dweights = pullback(written[0])
            return _add(sums, dweights), (dh, do)

        # The zeros are all overwritten: a place for the gradient of o.
        written = _tokens(dh), zeros_after(dh, _tokens(o).shape, o.dtype, o)
        dbehind, (dh_TD, do) = stream(
            back_behind, _zeros_after(dh, behind, h), written, (_tokens(h), _tokens(o)), self._rows(h))
        dqkv = self.ulysses.attend_backward(lambda w: self._project(h, w, rope), before, kept, do.reshape(o.shape))

        def back_before(sums, written, read):
            h, dqkv, rope = read[0], read[1:4], read[4:]
            _, pullback = jax.vjp(lambda h, w: self.functions.before(h, w, rope), h, _widen(before))
            dx, dweights = pullback(dqkv)
            return _add(sums, dweights), (written[0] + dx,)

        read = (h, *dqkv, *rope)
        dbefore, (dh_TD,) = stream(
            back_before, _zeros_after(dqkv[0], before, h), (dh_TD,), tuple(map(_tokens, read)), self._rows(h))
        return dh_TD.reshape(h.shape), self.functions.join(dbefore, dbehind)

    def _behind(self, h_and_o, behind):
        return self.functions.behind(h_and_o, _widen(behind))

    def _before(self, h, before, rope):
        return self.functions.before(h, _widen(before), rope)

    def _project(self, h, before, rope):
        """q, k and v, a tile at a time, written into places that are made after h: those of a scan's results would be
        made long before, for all layers that no loop goes over at once."""
        read = (_tokens(h), *map(_tokens, rope))
        one = lambda rows: self._before(rows[0], before, rows[1:])
        places = [zeros_after(h, x.shape, x.dtype, *jax.tree.leaves(before)) for x in jax.eval_shape(one, read)]
        _, qkv = stream(lambda _, written, rows: ((), one(rows)), (), tuple(places), read, self._rows(h))
        return tuple(x.reshape(*h.shape[:2], *x.shape[1:]) for x in qkv)

    def _tile(self, h):
        return self.tile and even_tile(h.shape[0] * h.shape[1], self.tile)

    def _rows(self, h):
        return self._tile(h) or h.shape[0] * h.shape[1]


def _tokens(x):
    """[B, T, ...] -> [B T, ...]"""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _widen(weights):
    return jax.tree.map(lambda w: w.astype(accumulation_dtype(w.dtype)), weights)


def _zeros_after(array, weights, *others):
    return jax.tree.map(lambda w: zeros_after(array, w.shape, accumulation_dtype(w.dtype), w, *others), weights)


def _add(sums, parts):
    return jax.tree.map(lambda s, d: s + d.astype(s.dtype), sums, parts)
