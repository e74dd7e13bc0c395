"""Loops that read rows of arrays in host memory one trip ahead, so that the copies run beside the computation.

XLA lets the DMA engine copy a row, on a stream of its own, only if the row's offset is a function of the loop's counter
alone; other rows are read by a kernel, which takes the place of the computation. XLA counts a trip in place: what the
next count decides waits for all uses of this one, hence layers' numbers are read from an array.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alst_jax.xla import host
from alst_jax.xla.order import index_after

PyTree = Any


def loop_ahead(body: Callable, carry: PyTree, stacks: PyTree, rows: range, start_after: jax.Array) -> PyTree:
    """The last carry of body(carry, row, the row of each stack) -> carry, over some rows in their order.

    stacks: arrays in host memory; their rows are on the device in `body`, two at a time. start_after: an array that
    exists before the first row is read.
    """
    numbers = jnp.arange(rows.start, rows.stop, rows.step)

    def one(trip, state):
        carry, row, now = state
        following = rows.start + rows.step * (trip + 1)  # after the last row none: some row is read, and not used
        number = lax.dynamic_index_in_dim(numbers, trip + 1, keepdims=False, allow_negative_indices=False)
        return body(carry, row, now), number, _read(stacks, following)

    first = _read(stacks, index_after(start_after, rows[0]))
    return lax.fori_loop(0, len(rows), one, (carry, numbers[0], first))[0]


def _read(stacks: PyTree, row: jax.Array) -> PyTree:
    cut = lambda x: lax.dynamic_index_in_dim(x, row, keepdims=False, allow_negative_indices=False)
    return host.to_device(jax.tree.map(cut, stacks))
