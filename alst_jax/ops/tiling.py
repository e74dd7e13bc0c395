"""Work on a few tokens at a time: the one tiling primitive, for the MLP, the loss, attention queries or anything token-wise.

What is token-wise needs no whole sequence (ALST, arXiv 2506.13996, sequence tiling): memory for intermediates is that of
one tile, whatever the length. Tiles are cut from local arrays, never from an array that is sharded over devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.host import to_device, to_host
from alst_jax.xla.varying import vary_like

PyTree = Any


def scan_tiles(body: Callable, carry: PyTree, xs: PyTree, tile: int) -> tuple[PyTree, PyTree]:
    """`lax.scan` over tiles of `tile` rows of dim 0; a shorter last tile is a call of its own, not padded.

    body(carry, x_tile) -> (carry, y_tile) must accept any number of rows. Returns the carry and y for all rows.
    """
    rows = jax.tree.leaves(xs)[0].shape[0]
    whole = rows // tile
    if whole <= 1 and rows <= tile:
        return body(carry, xs)
    head = jax.tree.map(lambda x: x[: whole * tile].reshape(whole, tile, *x.shape[1:]), xs)
    carry, ys = lax.scan(body, carry, head)
    ys = jax.tree.map(lambda y: y.reshape(whole * tile, *y.shape[2:]), ys)
    if whole * tile < rows:
        carry, rest = body(carry, jax.tree.map(lambda x: x[whole * tile :], xs))
        ys = jax.tree.map(lambda y, r: jnp.concatenate([y, r]), ys, rest)
    return carry, ys


def tiled(fn: Callable, tile: int | None, x: PyTree, weights: PyTree, *fixed: PyTree) -> PyTree:
    """fn(x, weights, *fixed), computed for `tile` rows of dim 0 at a time; None computes it whole.

    fn must be row-wise: row i of each output depends on row i of each array in x and in fixed, and on all of the
    weights. Nothing inside fn is kept for the backward pass: it is computed again, tile by tile. The gradients of the
    weights are summed over tiles in float32 (or wider) whatever dtype the weights have; `fixed` gets no gradient.

    Example: tiled(lambda x, w: jax.nn.silu(x @ w), 4096, x_TD, w_DF)
    """
    rows = jax.tree.leaves(x)[0].shape[0]
    if tile is None or tile >= rows:
        return fn(x, weights, *jax.lax.stop_gradient(fixed))
    # Were a replicated weight made varying inside the loop, its gradient would be summed over devices once a tile.
    weights = jax.tree.map(lambda w: vary_like(w, *jax.tree.leaves(x)), weights)
    return _tiled(fn, tile, x, weights, fixed)


def even_tile(rows: int, at_most: int) -> int:
    """The largest tile of at most `at_most` rows that divides `rows`, for a ragged one costs copies; `at_most` if all that
    do are less than half of it."""
    return next((tile for tile in range(at_most, at_most // 2, -1) if rows % tile == 0), at_most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(fn, tile, x, weights, fixed):
    return scan_tiles(lambda carry, rows: (carry, fn(rows[0], weights, *rows[1])), (), (x, fixed), tile)[1]


def _tiled_fwd(fn, tile, x, weights, fixed):
    return _tiled(fn, tile, x, weights, fixed), (x, weights, fixed)


def _tiled_bwd(fn, tile, residuals, dy):
    x, weights, fixed = residuals

    def body(sums, rows):
        x_tile, fixed_tile, dy_tile = rows
        _, vjp = jax.vjp(lambda x, w: fn(x, w, *fixed_tile), x_tile, weights)
        dx, dweights = vjp(dy_tile)
        return jax.tree.map(lambda s, d: s + d.astype(s.dtype), sums, dweights), dx

    like = jax.tree.leaves(x)
    zeros = jax.tree.map(lambda w: vary_like(jnp.zeros(w.shape, accumulation_dtype(w.dtype)), w, *like), weights)
    sums, dx = scan_tiles(body, zeros, (x, fixed, dy), tile)
    return dx, jax.tree.map(lambda s, w: s.astype(w.dtype), sums, weights), None


_tiled.defvjp(_tiled_fwd, _tiled_bwd)


def stream(
    body: Callable, carry: Any, written: tuple, read: tuple, rows: int, on_host: tuple[bool, ...] | None = None
) -> tuple[Any, tuple]:
    """Update arrays in place, `rows` rows of dim 0 at a time, wherever they live. Runs inside jit.

    body(carry, written_chunk, read_chunk) -> (carry, new_written_chunk) sees device arrays. `on_host` says for each
    array of written + read whether it lives in host memory (None: none does). The buffers are the carry of a fori_loop
    and are written with dynamic_update_slice, which XLA does in place, in host memory at the speed of the bus; a scan
    with stacked outputs would make a second copy of everything at a quarter of the speed (measured).
    """
    length = (written + read)[0].shape[0]
    rows = min(rows, length)
    on_host = on_host or (False,) * len(written + read)
    written_host, read_host = on_host[: len(written)], on_host[len(written) :]

    def take(x, start, rows, in_host_memory):
        chunk = lax.dynamic_slice_in_dim(x, start, rows, axis=0)
        return to_device(chunk) if in_host_memory else chunk

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
