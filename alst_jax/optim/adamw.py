"""AdamW on sharded parameters, on the device or streamed through it from host memory. The arithmetic is optax's."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from alst_jax.memory import host
from alst_jax.ops.tiling import accumulation_dtype
from alst_jax.optim.formats import Log8, Plain, block_of, join_float32, round_to_bfloat16, split_float32
from alst_jax.parallel.mesh import AXES
from alst_jax.parallel.sharding import is_stacked, sharded_dim
from alst_jax.parallel.vma import varying_axes


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


def is_spec(x: Any) -> bool:
    """Whether x is a leaf of a tree of PartitionSpecs."""
    return isinstance(x, P)


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
        square_sum = lambda total, _, chunk: (total + jnp.sum(jnp.square(chunk[0].astype(jnp.float32))), ())
        zero = _zero_like(leaf)
        if on_host:
            rows = host.chunk_rows(leaf.shape, is_stacked(path))
            part, _ = host.stream(square_sum, zero, (), (leaf,), rows, (True,))
        else:
            part, _ = square_sum(zero, (), (leaf,))
        axes = tuple(sorted(varying_axes(part)))  # empty for a replicated parameter, which counts once
        total += lax.psum(part, axes) if axes else part
    return jnp.sqrt(total)


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
        (_, counts), _ = host.stream(add, (jnp.int32(0), counts), (), (leaf,), rows, (on_host,))
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
    count = state["count"]
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    columns = {name: treedef.flatten_up_to(tree) for name, tree in state.items() if name != "count"}
    flat_specs = jax.tree.leaves(specs, is_leaf=is_spec)
    results, new_params = {name: [] for name in columns}, []
    for i, ((path, param), gradient, spec) in enumerate(zip(flat, treedef.flatten_up_to(gradients), flat_specs, strict=True)):
        formats, wide = optimizer.formats(param, spec), accumulation_dtype(param.dtype)
        names = [name for name in columns if name != "master" or needs_master(param.dtype)]
        stored, structure = jax.tree.flatten({name: columns[name][i] for name in names})
        leaf_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(optimizer.seed), count), i)
        if varying_axes(param):  # a replicated parameter is rounded alike everywhere
            leaf_key = jax.random.fold_in(leaf_key, lax.axis_index(AXES))

        def step(chunk, written, read):
            keys = jax.random.split(jax.random.fold_in(leaf_key, chunk), 3)
            old = structure.unflatten(written[1:])
            mu, nu = (formats[name].decode(old[name], wide) for name in ("mu", "nu"))
            master, mu, nu = optimizer.update_values(
                optimizer.read_master(written[0], old.get("master")), read[0].astype(wide) * scale, mu, nu, count,
                learning_rate, decays(path))
            new_param, kept = optimizer.write_master(master, written[0].dtype, keys[0])
            new = {"mu": formats["mu"].encode(mu, keys[1]), "nu": formats["nu"].encode(nu, keys[2])}
            if kept is not None:
                new["master"] = kept
            return chunk + 1, (new_param, *jax.tree.leaves(new))

        written, first = (param, *stored), jnp.int32(0)
        if params_on_host or state_on_host:
            places = (params_on_host,) + (state_on_host,) * len(stored) + (params_on_host,)
            rows = host.chunk_rows(param.shape, is_stacked(path))
            _, new = host.stream(step, first, written, (gradient,), rows, places)
        else:
            _, new = step(first, written, (gradient,))
        new_params.append(new[0])
        new_state = structure.unflatten(new[1:])
        for name in columns:
            results[name].append(new_state.get(name, columns[name][i]))
    new_state = {name: treedef.unflatten(leaves) for name, leaves in results.items()}
    return treedef.unflatten(new_params), new_state | {"count": count + 1}
