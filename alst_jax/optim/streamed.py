"""The optimizer's work on local shards, one parameter at a time, wherever it lives: norm, sums and update.

Everything here runs inside the shard_map.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alst_jax.models.tree import is_stacked
from alst_jax.ops.tiling import stream
from alst_jax.optim.adamw import AdamW, decays, needs_master
from alst_jax.optim.formats import Log8, Plain
from alst_jax.parallel.mesh import AXES
from alst_jax.parallel.sharding import is_spec
from alst_jax.xla import host, scopes
from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.varying import varying_axes


@jax.named_scope(scopes.NORM)
def global_norm(gradients: Any, on_host: bool) -> jax.Array:
    """Norm over all parameters and devices, float32. Runs inside the shard_map; host gradients are streamed."""
    total = jnp.zeros((), jnp.float32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        rows = host.chunk_rows(leaf.shape, is_stacked(path)) if on_host else None
        total += square_sum(leaf, rows)
    return jnp.sqrt(total)


def square_sum(leaf: jax.Array, rows: int | None = None) -> jax.Array:
    """Sum of squares over all devices, float32. rows: the array is in host memory, and this many rows are copied
    at a time."""
    add = lambda total, _, chunk: (total + jnp.sum(jnp.square(chunk[0].astype(jnp.float32))), ())
    zero = _zero_like(leaf)
    if rows is None:
        part, _ = add(zero, (), (leaf,))
    else:
        part, _ = stream(add, zero, written=(), read=(leaf,), rows=rows, on_host=(True,))
    axes = tuple(sorted(varying_axes(part)))  # empty for a replicated parameter, which counts once
    return lax.psum(part, axes) if axes else part


def count_not_finite(gradients: Any, on_host: bool) -> Any:
    """For each parameter int32[layers] (int32[1] where it is not stacked): its elements that are no finite numbers,
    over all devices. Runs inside the shard_map; host gradients are streamed."""

    def count(path, leaf):
        rows = host.chunk_rows(leaf.shape, is_stacked(path))
        layers = leaf.shape[0] if is_stacked(path) else 1
        varying = tuple(sorted(varying_axes(leaf)))

        def add(carry, _, chunk):
            at, counts = carry
            bad = jnp.sum(~jnp.isfinite(chunk[0].astype(jnp.float32)), dtype=jnp.int32)
            return (at + 1, counts.at[jnp.minimum(at, layers - 1)].add(bad)), ()

        counts = jnp.zeros(layers, jnp.int32)
        counts = lax.pcast(counts, varying, to="varying") if varying else counts
        (_, counts), _ = stream(add, (jnp.int32(0), counts), written=(), read=(leaf,), rows=rows, on_host=(on_host,))
        return lax.psum(counts, varying) if varying else counts

    return jax.tree_util.tree_map_with_path(count, gradients)


def _zero_like(leaf: jax.Array) -> jax.Array:
    axes = tuple(sorted(varying_axes(leaf)))
    zero = jnp.zeros((), jnp.float32)
    return lax.pcast(zero, axes, to="varying") if axes else zero


@jax.named_scope(scopes.UPDATE)
def apply_update(
    optimizer: AdamW,
    params: Any,
    gradients: Any,
    state: dict[str, Any],
    gradient_norm: jax.Array,
    learning_rate: jax.Array,
    specs: Any,
    on_host: tuple[bool, bool],
) -> tuple[Any, dict[str, Any]]:
    """Clip, then step every parameter. on_host: whether parameters (and their gradients), and optimizer state, live in
    host memory."""
    scale = jnp.ones((), jnp.float32)
    if optimizer.clip_norm > 0:
        scale = jnp.minimum(scale, optimizer.clip_norm / jnp.maximum(gradient_norm, 1e-30))
    updates = parameter_updates(optimizer, params, state, specs, learning_rate)
    results = []
    for update, gradient in zip(updates, jax.tree.leaves(gradients), strict=True):
        step = lambda chunk, written, read, update=update: (
            chunk + 1,
            update.step(chunk, written, read[0].astype(update.wide) * scale),
        )
        places = (on_host[0],) + (on_host[1],) * len(update.stored) + (on_host[0],)
        rows = host.chunk_rows(gradient.shape, is_stacked(update.path))
        _, new = stream(step, jnp.int32(0), written=update.written, read=(gradient,), rows=rows, on_host=places)
        results.append(new)
    return join_updates(params, state, updates, results)


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterUpdate:
    """The update of one parameter. written: the arrays that a step replaces: the parameter and its state (`stored`)."""

    optimizer: AdamW
    path: tuple
    param: jax.Array
    stored: tuple
    structure: Any  # of the state: {"mu": ..., "nu": ..., maybe "master"}
    formats: dict[str, Plain | Log8]
    key: jax.Array
    count: jax.Array
    learning_rate: jax.Array

    @property
    def written(self) -> tuple:
        return (self.param, *self.stored)

    @property
    def wide(self) -> jnp.dtype:
        return accumulation_dtype(self.param.dtype)

    def step(self, chunk: jax.Array | int, written: tuple, gradient: jax.Array) -> tuple:
        """New values of `written`, or of some rows of it, from the (clipped) gradient in `wide`. chunk: number of the
        rows, which draws the random bits of stochastic rounding."""
        keys = jax.random.split(jax.random.fold_in(self.key, chunk), 3)
        old = self.structure.unflatten(written[1:])
        mu, nu = (self.formats[name].decode(old[name], self.wide) for name in ("mu", "nu"))
        master = self.optimizer.read_master(written[0], old.get("master"))
        master, mu, nu = self.optimizer.update_values(
            master, gradient, mu, nu, self.count, self.learning_rate, decays(self.path)
        )
        new_param, kept = self.optimizer.write_master(master, written[0].dtype, keys[0])
        new = {"mu": self.formats["mu"].encode(mu, keys[1]), "nu": self.formats["nu"].encode(nu, keys[2])}
        if kept is not None:
            new["master"] = kept
        return (new_param, *jax.tree.leaves(new))


def parameter_updates(
    optimizer: AdamW, params: Any, state: dict[str, Any], specs: Any, learning_rate: jax.Array
) -> list[ParameterUpdate]:
    """One for each parameter, in the order of the tree's leaves, of local shards. Runs inside the shard_map. state,
    specs: as `AdamW.init` and `AdamW.state_specs` give them."""
    count = state["count"]
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    columns = {name: treedef.flatten_up_to(tree) for name, tree in state.items() if name != "count"}
    updates = []
    for i, ((path, param), spec) in enumerate(zip(flat, jax.tree.leaves(specs, is_leaf=is_spec), strict=True)):
        names = [name for name in columns if name != "master" or needs_master(param.dtype)]
        stored, structure = jax.tree.flatten({name: columns[name][i] for name in names})
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(optimizer.seed), count), i)
        if varying_axes(param):  # a replicated parameter is rounded alike everywhere
            key = jax.random.fold_in(key, lax.axis_index(AXES))
        updates.append(
            ParameterUpdate(
                optimizer,
                path,
                param,
                tuple(stored),
                structure,
                optimizer.formats(param, spec),
                key,
                count,
                learning_rate,
            )
        )
    return updates


def join_updates(
    params: Any, state: dict[str, Any], updates: list[ParameterUpdate], results: list[tuple]
) -> tuple[Any, dict[str, Any]]:
    """(params, state) after a step: results are new values of each update's `written`."""
    treedef = jax.tree.structure(params)
    new = {}
    for name, tree in state.items():
        if name != "count":
            columns = zip(updates, results, treedef.flatten_up_to(tree), strict=True)
            kept = [update.structure.unflatten(result[1:]).get(name, old) for update, result, old in columns]
            new[name] = treedef.unflatten(kept)
    return treedef.unflatten([result[0] for result in results]), new | {"count": state["count"] + 1}


def add_gradients(sums: Any, gradients: Any, on_host: bool) -> Any:
    """sums + gradients, in the dtype of the sums."""
    add = lambda carry, written, read: (carry, (written[0] + read[0].astype(written[0].dtype),))

    def leaf(path, total, gradient):
        if not on_host:
            return total + gradient.astype(total.dtype)
        rows = host.chunk_rows(total.shape, is_stacked(path))
        return stream(add, (), written=(total,), read=(gradient,), rows=rows, on_host=(True, True))[1][0]

    return jax.tree_util.tree_map_with_path(leaf, sums, gradients)
