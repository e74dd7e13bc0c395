"""The one place that decides how parameters are sharded, and the collective that undoes it inside the step (ZeRO-3)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from alst_jax.models.tree import is_stacked
from alst_jax.parallel.mesh import AXES
from alst_jax.xla import scopes
from alst_jax.xla.dtypes import accumulation_dtype


def param_specs(params: Any, mesh: Mesh) -> Any:
    """PartitionSpec of each parameter: its first dim that the device count divides goes over both mesh axes at once.

    Gradients and optimizer state follow their parameter. A parameter none of whose dims divides is replicated.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(leaf.shape, is_stacked(path), mesh.size), params)


def is_spec(x: Any) -> bool:
    """Whether x is a leaf of a tree of PartitionSpecs."""
    return isinstance(x, P)


def _spec(shape: tuple[int, ...], stacked: bool, devices: int) -> P:
    for dim in range(int(stacked), len(shape)):
        if shape[dim] % devices == 0:
            return P(*[None] * dim, AXES)
    return P()


def sharded_dim(spec: P) -> int | None:
    """The dim that `param_specs` sharded, or None for a replicated parameter."""
    return next((dim for dim, axes in enumerate(spec) if axes is not None), None)


def drop_layer_dim(spec: P) -> P:
    """The spec of one layer's slice of a stacked parameter."""
    return P(*spec[1:])


def shardings(specs: Any, mesh: Mesh, memory_kind: str) -> Any:
    """NamedShardings for a tree of specs; memory_kind is "device" or "pinned_host"."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec, memory_kind=memory_kind), specs, is_leaf=lambda x: isinstance(x, P)
    )


@jax.named_scope(scopes.GATHER)
def whole(shard: jax.Array, spec: P) -> jax.Array:
    """A whole weight from its shards, w[D/(data x seq), F] -> all-gather -> w[D, F]. Runs inside the shard_map.

    Not to be differentiated: `scatter` is the way back of its gradient.
    """
    dim = sharded_dim(spec)
    if dim is None:
        return lax.pcast(shard, AXES, to="varying")
    if lax.axis_size(AXES) == 1:
        return shard  # not every backend removes a collective among one
    return lax.all_gather(shard, AXES, axis=dim, tiled=True)


@jax.named_scope(scopes.SCATTER)
def scatter(gradient: jax.Array, spec: P, reduce_dtype: DTypeLike, dtype: DTypeLike) -> jax.Array:
    """The shard's gradient, of `dtype`, from each device's gradient of the whole weight.

    A reduce-scatter in `reduce_dtype` (an all-reduce for a replicated weight), then into the weight's own dtype.
    """
    gradient, dim = gradient.astype(reduce_dtype), sharded_dim(spec)
    if dim is None:
        return lax.psum(gradient, AXES).astype(dtype)
    if lax.axis_size(AXES) == 1:
        return gradient.astype(dtype)
    return lax.psum_scatter(gradient, AXES, scatter_dimension=dim, tiled=True).astype(dtype)


def gather(shard: jax.Array, spec: P, reduce_dtype: DTypeLike) -> jax.Array:
    """`whole` as a float32 carrier (see ops/linear.py), differentiable: its gradient goes back by `scatter`."""
    return _gather(spec, jnp.dtype(reduce_dtype), jnp.dtype(shard.dtype), shard)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(spec, reduce_dtype, dtype, shard):
    return whole(shard, spec).astype(accumulation_dtype(dtype))


def _gather_fwd(spec, reduce_dtype, dtype, shard):
    return _gather(spec, reduce_dtype, dtype, shard), None


def _gather_bwd(spec, reduce_dtype, dtype, _, gradient):
    return (scatter(gradient, spec, reduce_dtype, dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)
