"""Work on a few rows of dim 0 at a time: the only tiling code, for the MLP, projections, loss, attention and optimizer.

A token-wise function needs no whole sequence (ALST, arXiv 2506.13996, sequence tiling): its intermediates have the size
of one tile, whatever the length. Tiles are cut from local arrays, never from an array that is sharded over devices.

`stream` is the loop: it overwrites arrays in place, on the device or in host memory. `tiled` is a differentiable
function built on it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.host import to_device, to_host
from alst_jax.xla.varying import vary_like

PyTree = Any


def stream(
    body: Callable, carry: PyTree, *, written: tuple, read: tuple, rows: int, on_host: tuple[bool, ...] | None = None
) -> tuple[PyTree, tuple]:
    """Overwrite arrays, `rows` rows of dim 0 at a time. Runs inside jit. Returns the last carry and the new `written`.

    body(carry, written_rows, read_rows) -> (carry, new_written_rows) sees device arrays; a shorter last tile is a
    separate call, not padded. on_host: for each array of written + read, whether it is in host memory; None: none is.

    buffer  | before            | after
    written | the old values    | the new values, in the same memory
    read    | the values        | unchanged

    The arrays are the carry of a fori_loop and are updated with dynamic_update_slice, which XLA does in place, in host
    memory at the speed of the bus. A scan with stacked outputs makes a second copy at a quarter of the speed
    (measured).
    """
    length = (written + read)[0].shape[0]
    rows = min(rows, length)
    on_host = on_host or (False,) * len(written + read)
    written_host, read_host = on_host[: len(written)], on_host[len(written) :]

    def take(x, start, rows, in_host_memory):
        part = lax.dynamic_slice_in_dim(x, start, rows, axis=0)
        return to_device(part) if in_host_memory else part

    def step(start, rows, carry, buffers):
        old = tuple(take(x, start, rows, host) for x, host in zip(buffers, written_host))
        inputs = tuple(take(x, start, rows, host) for x, host in zip(read, read_host))
        carry, new = body(carry, old, inputs)
        new = [to_host(x) if host else x for x, host in zip(new, written_host)]
        return carry, tuple(lax.dynamic_update_slice_in_dim(b, x, start, axis=0) for b, x in zip(buffers, new))

    whole = length // rows
    state = lax.fori_loop(0, whole, lambda i, state: step(i * rows, rows, *state), (carry, written))
    if whole * rows < length:
        state = step(whole * rows, length - whole * rows, *state)
    return state


def tiled(fn: Callable, x: PyTree, weights: PyTree, *fixed: PyTree, tile: int | None) -> PyTree:
    """fn(x, weights, *fixed), computed for `tile` rows of dim 0 at a time; None computes it whole.

    fn must be row-wise: row i of each output depends on row i of each array in x and in fixed, and on all of the
    weights. Nothing inside fn is kept for the backward pass: it is computed again, tile by tile. The gradients of the
    weights are summed over tiles in float32 (or wider) whatever dtype the weights have; `fixed` gets no gradient.

    Example: tiled(lambda x, w: jax.nn.silu(x @ w), x_TD, w_DF, tile=4096)
    """
    rows = jax.tree.leaves(x)[0].shape[0]
    if tile is None or tile >= rows:
        return fn(x, weights, *lax.stop_gradient(fixed))
    # Were a replicated weight made varying inside the loop, its gradient would be summed over devices once a tile.
    weights = jax.tree.map(lambda w: vary_like(w, *jax.tree.leaves(x)), weights)
    return _tiled(fn, tile, x, weights, fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(fn, tile, x, weights, fixed):
    body = lambda carry, rows: (carry, fn(rows[0], weights, *rows[1]))
    like = jax.eval_shape(lambda x, fixed: fn(x, weights, *fixed), *_first_rows((x, fixed), tile))
    return _map_tiles(body, (), (x, fixed), like, tile, jax.tree.leaves(weights))[1]


def _tiled_fwd(fn, tile, x, weights, fixed):
    value = lambda tree: jax.tree.map(lambda each: each.value, tree)
    pick = lambda trained: jax.tree.map(lambda w: w.value if w.perturbed == trained else None, weights)
    return _tiled(fn, tile, value(x), value(weights), value(fixed)), (value(x), pick(True), pick(False), value(fixed))


def _tiled_bwd(fn, tile, residuals, dy):
    x, weights, frozen, fixed = residuals  # frozen weights have no gradient, and no sum over tiles
    dy = jax.tree.map(_instantiated, dy)

    def body(sums, rows):
        x_tile, fixed_tile, dy_tile = rows
        whole = lambda w: jax.tree.map(lambda a, b: b if a is None else a, w, frozen, is_leaf=lambda x: x is None)
        _, vjp = jax.vjp(lambda x, w: fn(x, whole(w), *fixed_tile), x_tile, weights)
        dx, dweights = vjp(dy_tile)
        return jax.tree.map(lambda s, d: s + d.astype(s.dtype), sums, dweights), dx

    like = jax.tree.leaves(x)
    zeros = jax.tree.map(lambda w: vary_like(jnp.zeros(w.shape, accumulation_dtype(w.dtype)), w, *like), weights)
    sums, dx = _map_tiles(body, zeros, (x, fixed, dy), x, tile, jax.tree.leaves((weights, frozen)))
    return dx, jax.tree.map(lambda s, w: s.astype(w.dtype), sums, weights), None


_tiled.defvjp(_tiled_fwd, _tiled_bwd, symbolic_zeros=True)


def _instantiated(gradient):
    """A gradient that is known to be zero, as an array."""
    zero = isinstance(gradient, SymbolicZero)
    return jnp.zeros(gradient.shape, gradient.dtype) if zero else gradient


def _first_rows(tree, rows):
    return jax.tree.map(lambda x: x[:rows], tree)


def _map_tiles(body, carry, read, like, tile, others):
    """body(carry, rows of `read`) -> (carry, rows of a tree like `like`), as one `stream` into zeros."""
    leaves, treedef = jax.tree.flatten(read)
    length = leaves[0].shape[0]
    zeros = tuple(
        vary_like(jnp.zeros((length, *s.shape[1:]), s.dtype), *leaves, *others) for s in jax.tree.leaves(like)
    )

    def step(carry, _, rows):
        carry, new = body(carry, treedef.unflatten(rows))
        return carry, tuple(jax.tree.leaves(new))

    carry, new = stream(step, carry, written=zeros, read=tuple(leaves), rows=tile)
    return carry, jax.tree.unflatten(jax.tree.structure(like), new)


def even_tile(rows: int, at_most: int) -> int:
    """The largest tile of at most `at_most` rows that divides `rows`, because a ragged tile costs copies; `at_most` if
    all divisors are below half of it."""
    return next((tile for tile in range(at_most, at_most // 2, -1) if rows % tile == 0), at_most)


def token_rows(x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B T, ...]"""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
