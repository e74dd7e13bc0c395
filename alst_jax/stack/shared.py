"""Inputs of segments in the memory of the gradients.

The stacks of the layers' gradients are written from the last layer to the first, while the backward pass reads the
inputs of segments in the same order. A stack's row is free until the backward pass reaches its layer.

rows of layers | forward pass           | backward pass
first, ...     | the input of a segment | is read before the segment is recomputed; later the layers' gradients

B batch, T local tokens, D hidden.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alst_jax.ops.tiling import token_rows
from alst_jax.segments import Segment, shared_inputs
from alst_jax.xla import host
from alst_jax.xla.order import after, index_after, read_back, zeros_after
from alst_jax.xla.varying import varying_axes

PyTree = Any


@dataclasses.dataclass(frozen=True)
class SharedRows:
    """Where the inputs h[B, T, D] of some segments are kept in stacks [layers, ...] of gradients in host memory.

    first: the first layer whose rows hold the input of a segment, by the segment's number. pieces: for each stack that
    is used, its number among the leaves, the first token that it holds and how many. tokens: of one layer's rows.
    """

    first: dict[int, int]
    pieces: tuple[tuple[int, int, int], ...]
    tokens: int

    @staticmethod
    def of(segments: list[Segment], h: jax.Array, stacks: PyTree) -> "SharedRows":
        """The places of inputs like h in stacks of such shapes."""
        pieces, tokens = [], 0
        for number, stack in enumerate(jax.tree.leaves(stacks)):
            if holds(stack.shape, h.shape[-1]) and stack.dtype == h.dtype and varying_axes(h) <= varying_axes(stack):
                pieces.append((number, tokens, stack.size // stack.shape[0] // h.shape[-1]))
                tokens += pieces[-1][-1]
        return SharedRows(shared_inputs(segments, h.shape[0] * h.shape[1], tokens), tuple(pieces), tokens)

    def put(self, stacks: PyTree, h: jax.Array, segment: int) -> tuple[PyTree, jax.Array]:
        """(the stacks with h as the input of a segment, h, but not before it was copied)"""
        leaves, tree = jax.tree.flatten(stacks)
        h_TD, first = token_rows(h), index_after(h, self.first[segment])
        count = self._layers(h_TD)

        def one(i, leaves):
            leaves = list(leaves)
            for number, offset, tokens in self.pieces:
                piece = lax.dynamic_slice_in_dim(h_TD, self._start(i, h_TD) + offset, tokens)
                piece = piece.reshape(leaves[number].shape[1:])
                leaves[number] = host.put_row(leaves[number], piece, first + i, True)
            return leaves

        leaves = lax.fori_loop(0, count, one, leaves)
        return tree.unflatten(leaves), after(read_back(leaves[self.pieces[-1][0]], first + count - 1, True), h)

    def take(self, stacks: PyTree, dh: jax.Array, segment: int) -> tuple[PyTree, jax.Array]:
        """(the stacks, the input of a segment on the device), read after dh, which has the input's shape."""
        leaves, tree = jax.tree.flatten(stacks)
        first, h_TD = index_after(dh, self.first[segment]), token_rows(zeros_after(dh, dh.shape, dh.dtype))

        def one(i, carry):
            h_TD, leaves = carry
            for number, offset, tokens in self.pieces:
                piece = host.row(leaves[number], first + i, True).reshape(tokens, h_TD.shape[-1])
                h_TD = lax.dynamic_update_slice_in_dim(h_TD, piece, self._start(i, h_TD) + offset, 0)
            return h_TD, leaves

        # The stacks go through the loop, so that what writes them later comes after it.
        h_TD, leaves = lax.fori_loop(0, self._layers(h_TD), one, (h_TD, leaves))
        return tree.unflatten(leaves), h_TD.reshape(dh.shape)

    def _layers(self, h_TD):
        return -(-h_TD.shape[0] // self.tokens)

    def _start(self, i, h_TD):
        """The first token in the rows of the i-th layer. The last layer's begin earlier, so that they are full."""
        return jnp.minimum(i * self.tokens, h_TD.shape[0] - self.tokens)


def holds(shape: tuple[int, ...], hidden: int) -> bool:
    """Whether a layer's part of a stack of this shape, one device's, is a matrix with room for whole tokens."""
    return len(shape) == 3 and shape[1] * shape[2] % hidden == 0
