"""AdamW on sharded parameters, a layer at a time, wherever they live. The arithmetic is optax's."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from alst_jax.models.tree import is_stacked
from alst_jax.ops.tiling import stream
from alst_jax.optim.formats import Log8, Plain, block_of, join_float32, round_to_bfloat16, split_float32
from alst_jax.parallel.mesh import AXES
from alst_jax.parallel.sharding import is_spec, sharded_dim
from alst_jax.xla import host
from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.varying import varying_axes


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay (arXiv 1711.05101) and global-norm clipping.

    State of a parameter: first and second moment and, for a parameter narrower than float32, what makes it float32 again
    (an update of 1e-5 would vanish in bfloat16's 8 bits):

    states: dtype of the moments. bfloat16 and int8 (see `formats.Log8`) are rounded stochastically; vectors stay float32.
    master: "float32" keeps a copy; "low-bits" keeps the 16 bits that a bfloat16 weight lacks, which is the same to the
    last bit in 2 bytes less; "none" keeps nothing and rounds the updated weight stochastically.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # 0: no clipping
    states: Literal["float32", "bfloat16", "int8"] = "float32"
    master: Literal["float32", "low-bits", "none"] = "float32"
    seed: int = 0  # of stochastic rounding

    def init(self, params: Any, specs: Any) -> dict[str, Any]:
        """State tree: mu, nu (and master where needed) for each parameter, and count, the steps taken."""
        state = self._per_parameter(self.init_one, params, specs)
        return state | {"count": jnp.zeros((), jnp.int32)}

    def init_one(self, param: jax.Array, spec: P) -> dict[str, Any]:
        """`init` for one parameter, whole or local."""
        state = {name: form.zeros(param.shape) for name, form in self.formats(param, spec).items()}
        if self.master == "none":
            return state
        if self.master == "low-bits" and needs_master(param.dtype):
            return state | {"master": jnp.zeros(param.shape, jnp.uint16)}
        return state | {"master": param.astype(accumulation_dtype(param.dtype))}

    def state_specs(self, specs: Any, params: Any) -> dict[str, Any]:
        """PartitionSpecs of `init`'s result: moments and master are sharded as their parameter."""
        one = lambda p, spec: {name: form.specs(spec) for name, form in self.formats(p, spec).items()} | {"master": spec}
        return self._per_parameter(one, params, specs) | {"count": P()}

    def _per_parameter(self, one: Callable, params: Any, specs: Any) -> dict[str, Any]:
        """{name: tree over the parameters of one(param, spec)[name]}"""
        leaves, treedef = jax.tree.flatten(params)
        states = [one(p, spec) for p, spec in zip(leaves, jax.tree.leaves(specs, is_leaf=is_spec), strict=True)]
        return {name: treedef.unflatten([state[name] for state in states]) for name in self.names(leaves)}

    def names(self, params: list[Any]) -> tuple[str, ...]:
        """What is kept for each parameter."""
        keeps_master = self.master != "none" and any(needs_master(p.dtype) for p in params)
        return ("mu", "nu", "master") if keeps_master else ("mu", "nu")

    def formats(self, param: Any, spec: P) -> dict[str, Plain | Log8]:
        """How the moments of a parameter (an array or its shape and dtype, whole or local) are stored."""
        plain = Plain(str(accumulation_dtype(param.dtype)))
        if self.states == "bfloat16" and param.ndim > 1:
            plain = Plain("bfloat16")
        block = block_of(param.shape, sharded_dim(spec)) if self.states == "int8" else None
        if block is None:
            return {"mu": plain, "nu": plain}
        return {"mu": Log8(signed=True, block=block), "nu": Log8(signed=False, block=block)}

    def read_master(self, param: jax.Array, kept: jax.Array | None) -> jax.Array:
        """The float32 weight behind a parameter and what is kept of it."""
        if kept is None:
            return param.astype(accumulation_dtype(param.dtype))
        return join_float32(param, kept) if self.master == "low-bits" else kept

    def write_master(self, master: jax.Array, dtype: DTypeLike, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(parameter of `dtype`, what is kept of the float32 weight besides)."""
        if not needs_master(dtype):
            return master.astype(dtype), None
        if self.master == "none":
            return round_to_bfloat16(master, key), None
        return split_float32(master) if self.master == "low-bits" else (master.astype(dtype), master)

    def update_values(self, master, gradient, mu, nu, count, learning_rate, decay: bool):
        """One elementwise step on arrays of one shape: (new master, new mu, new nu). `count` is the steps before."""
        adam = optax.scale_by_adam(self.beta1, self.beta2, self.eps)
        update, state = adam.update(gradient, optax.ScaleByAdamState(count, mu, nu))
        if decay:
            update = update + self.weight_decay * master
        return master - learning_rate * update, state.mu, state.nu


def needs_master(dtype: DTypeLike) -> bool:
    """Whether a parameter of this dtype is too narrow to be updated itself."""
    return jnp.dtype(dtype).itemsize < 4


def decays(path: tuple) -> bool:
    """Weight decay spares norms (`scale`) and biases (`bias`)."""
    return path[-1].key not in ("scale", "bias")


def global_norm(gradients: Any, on_host: bool) -> jax.Array:
    """Norm over all parameters and devices, float32. Runs inside the shard_map; host gradients are streamed."""
    total = jnp.zeros((), jnp.float32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        rows = host.chunk_rows(leaf.shape, is_stacked(path)) if on_host else None
        total += square_sum(leaf, rows)
    return jnp.sqrt(total)


def square_sum(leaf: jax.Array, rows: int | None = None) -> jax.Array:
    """Sum of squares over all devices, float32. rows: the array is in host memory, and so many are brought at a time."""
    add = lambda total, _, chunk: (total + jnp.sum(jnp.square(chunk[0].astype(jnp.float32))), ())
    zero = _zero_like(leaf)
    part, _ = add(zero, (), (leaf,)) if rows is None else stream(add, zero, (), (leaf,), rows, (True,))
    axes = tuple(sorted(varying_axes(part)))  # empty for a replicated parameter, which counts once
    return lax.psum(part, axes) if axes else part


def count_not_finite(gradients: Any, on_host: bool) -> Any:
    """For each parameter int32[layers] (int32[1] where it is not stacked): its elements that are no finite numbers, over
    all devices. Runs inside the shard_map; host gradients are streamed."""
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
        (_, counts), _ = stream(add, (jnp.int32(0), counts), (), (leaf,), rows, (on_host,))
        return lax.psum(counts, varying) if varying else counts

    return jax.tree_util.tree_map_with_path(count, gradients)


def _zero_like(leaf: jax.Array) -> jax.Array:
    axes = tuple(sorted(varying_axes(leaf)))
    zero = jnp.zeros((), jnp.float32)
    return lax.pcast(zero, axes, to="varying") if axes else zero


def apply_update(
    optimizer: AdamW, params: Any, gradients: Any, state: dict[str, Any], gradient_norm: jax.Array,
    learning_rate: jax.Array, specs: Any, params_on_host: bool, state_on_host: bool,
) -> tuple[Any, dict[str, Any]]:
    """Clip, then step every parameter. Runs inside the shard_map on local shards; gradients live where parameters do."""
    scale = jnp.ones((), jnp.float32)
    if optimizer.clip_norm > 0:
        scale = jnp.minimum(scale, optimizer.clip_norm / jnp.maximum(gradient_norm, 1e-30))
    updates = parameter_updates(optimizer, params, state, specs, learning_rate)
    results = []
    for update, gradient in zip(updates, jax.tree.leaves(gradients), strict=True):
        step = lambda chunk, written, read, update=update: (
            chunk + 1, update.step(chunk, written, read[0].astype(update.wide) * scale))
        places = (params_on_host,) + (state_on_host,) * len(update.stored) + (params_on_host,)
        rows = host.chunk_rows(gradient.shape, is_stacked(update.path))
        _, new = stream(step, jnp.int32(0), update.written, (gradient,), rows, places)
        results.append(new)
    return join_updates(params, state, updates, results)


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterUpdate:
    """How one parameter is stepped. written: what a step replaces, the parameter and what is kept for it (`stored`)."""

    optimizer: AdamW
    path: tuple
    param: jax.Array
    stored: tuple
    structure: Any  # of what is kept: {"mu": ..., "nu": ..., maybe "master"}
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
        """New values of `written`, or of some rows of it, from the (clipped) gradient in `wide`. chunk: number of the rows,
        which draws the random bits of stochastic rounding."""
        keys = jax.random.split(jax.random.fold_in(self.key, chunk), 3)
        old = self.structure.unflatten(written[1:])
        mu, nu = (self.formats[name].decode(old[name], self.wide) for name in ("mu", "nu"))
        master = self.optimizer.read_master(written[0], old.get("master"))
        master, mu, nu = self.optimizer.update_values(
            master, gradient, mu, nu, self.count, self.learning_rate, decays(self.path))
        new_param, kept = self.optimizer.write_master(master, written[0].dtype, keys[0])
        new = {"mu": self.formats["mu"].encode(mu, keys[1]), "nu": self.formats["nu"].encode(nu, keys[2])}
        if kept is not None:
            new["master"] = kept
        return (new_param, *jax.tree.leaves(new))


def parameter_updates(
    optimizer: AdamW, params: Any, state: dict[str, Any], specs: Any, learning_rate: jax.Array
) -> list[ParameterUpdate]:
    """One for each parameter, in the order of the tree's leaves, of local shards. Runs inside the shard_map. state, specs: as
    `AdamW.init` and `AdamW.state_specs` give them."""
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
        updates.append(ParameterUpdate(optimizer, path, param, tuple(stored), structure, optimizer.formats(param, spec), key,
                                       count, learning_rate))
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
