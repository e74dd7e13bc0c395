"""AdamW on sharded parameters, on the device or streamed through it from host memory. The arithmetic is optax's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from alst_jax.memory import host
from alst_jax.ops.tiling import accumulation_dtype
from alst_jax.parallel.sharding import is_stacked
from alst_jax.parallel.vma import varying_axes


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay (arXiv 1711.05101) and global-norm clipping.

    State of a parameter: first and second moment and, for a parameter narrower than float32, a float32 master copy
    that the update is applied to (an update of 1e-5 would vanish in bfloat16's 8 bits).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # 0: no clipping

    def init(self, params: Any) -> dict[str, Any]:
        """State tree: mu, nu (and master where needed) like the parameters, and count, the steps taken."""
        wide = lambda p: jnp.zeros(p.shape, accumulation_dtype(p.dtype))
        state = {"mu": jax.tree.map(wide, params), "nu": jax.tree.map(wide, params), "count": jnp.zeros((), jnp.int32)}
        if any(needs_master(p.dtype) for p in jax.tree.leaves(params)):
            state["master"] = jax.tree.map(lambda p: p.astype(accumulation_dtype(p.dtype)), params)
        return state

    def state_specs(self, param_specs: Any, params: Any) -> dict[str, Any]:
        """PartitionSpecs of `init`'s result: moments and master are sharded as their parameter."""
        names = ("mu", "nu", "master") if any(needs_master(p.dtype) for p in jax.tree.leaves(params)) else ("mu", "nu")
        return {name: param_specs for name in names} | {"count": P()}

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


def _zero_like(leaf: jax.Array) -> jax.Array:
    axes = tuple(sorted(varying_axes(leaf)))
    zero = jnp.zeros((), jnp.float32)
    return lax.pcast(zero, axes, to="varying") if axes else zero


def apply_update(
    optimizer: AdamW, params: Any, gradients: Any, state: dict[str, Any], gradient_norm: jax.Array,
    learning_rate: jax.Array, params_on_host: bool, state_on_host: bool,
) -> tuple[Any, dict[str, Any]]:
    """Clip, then step every parameter. Runs inside the shard_map on local shards; gradients live where parameters do."""
    scale = jnp.ones((), jnp.float32)
    if optimizer.clip_norm > 0:
        scale = jnp.minimum(scale, optimizer.clip_norm / jnp.maximum(gradient_norm, 1e-30))
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    columns = {name: treedef.flatten_up_to(tree) for name, tree in state.items() if name != "count"}
    results = {name: [] for name in columns}
    new_params = []
    for i, ((path, param), gradient) in enumerate(zip(flat, treedef.flatten_up_to(gradients))):
        names = [name for name in columns if name != "master" or needs_master(param.dtype)]

        def step(carry, written, read, path=path, names=names):
            values = dict(zip(names, written[1:]))
            master, mu, nu = optimizer.update_values(
                values.get("master", written[0]), read[0].astype(values["mu"].dtype) * scale, values["mu"],
                values["nu"], state["count"], learning_rate, decays(path))
            new = {"master": master, "mu": mu, "nu": nu}
            return carry, (master.astype(written[0].dtype), *(new[name] for name in names))

        written = (param, *(columns[name][i] for name in names))
        if params_on_host or state_on_host:
            places = (params_on_host,) + (state_on_host,) * len(names) + (params_on_host,)
            rows = host.chunk_rows(param.shape, is_stacked(path))
            _, new = host.stream(step, (), written, (gradient,), rows, places)
        else:
            _, new = step((), written, (gradient,))
        new_params.append(new[0])
        for name in columns:
            results[name].append(new[1 + names.index(name)] if name in names else columns[name][i])
    new_state = {name: treedef.unflatten(leaves) for name, leaves in results.items()}
    return treedef.unflatten(new_params), new_state | {"count": state["count"] + 1}
