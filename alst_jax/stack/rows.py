"""Loops over the rows of saved arrays, which may read the next row from host memory while one is worked on.

XLA lets the DMA engine copy a row, on a stream of its own, only if the row's offset is a function of the loop's counter
alone; other rows are read by a kernel, which takes the place of the computation. XLA counts a trip in place: what the
next count decides waits for all uses of this one, hence rows' numbers are read from an array, a trip ahead, too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alst_jax.xla import host
from alst_jax.xla.order import index_after

PyTree = Any


def over_rows(
    body: Callable, carry: PyTree, rows: range, stacks: tuple, on_host: tuple[bool, ...], waits: Callable, ahead: bool
) -> PyTree:
    """The last carry of body(carry, row, the row of each stack) -> carry, for rows in their order.

    stacks: trees of arrays whose dim 0 are rows, or None; on_host: whether they are in host memory. waits(carry) -> an
    array that must exist before a row is read: otherwise rows would be read all at once where one trip makes no loop.
    ahead: of stacks in host memory the next row is read during a trip, and two are on the device.
    """
    ahead = ahead and len(rows) > 1
    early = [stack if ahead and placed else None for stack, placed in zip(stacks, on_host)]
    late = [None if ahead and placed else stack for stack, placed in zip(stacks, on_host)]
    numbers = jnp.arange(rows.start, rows.stop, rows.step)

    def one(carry, row, now):
        at = index_after(waits(carry), row)
        read = [host.row(stack, at, placed) for stack, placed in zip(late, on_host)]
        return body(carry, row, [x if y is None else y for x, y in zip(read, now)])

    if not jax.tree.leaves(early):
        return lax.scan(lambda carry, row: (one(carry, row, early), None), carry, numbers)[0]

    def trip(number, state):
        carry, row, now = state
        # After the last row there is none: XLA reads the one that is nearest, and it is not used.
        following = _cut(numbers, number + 1), host.to_device(_cut(early, rows.start + rows.step * (number + 1)))
        return one(carry, row, now), *following

    first = host.row(early, index_after(waits(carry), rows[0]), True)
    return lax.fori_loop(0, len(rows), trip, (carry, numbers[0], first))[0]


def _cut(tree, row):
    """A row of each array. An index that may be negative would be compared with zero first."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, row, keepdims=False, allow_negative_indices=False), tree)
