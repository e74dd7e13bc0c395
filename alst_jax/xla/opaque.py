"""Kernels that know nothing of mesh axes, inside a shard_map that checks over which of them values vary.

Pallas's GPU kernels refuse arguments that vary over devices. A primitive hides them: outside it the results vary as the
arguments do, inside they are plain arrays of one device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P


def opaque(kernel: Callable) -> Callable:
    """kernel(*arrays) -> arrays, callable inside a shard_map. `kernel` must be a module's function: it is a cache key."""
    def call(*arrays: jax.Array) -> Any:
        results = jax.tree.structure(jax.eval_shape(kernel, *map(_plain, arrays)))
        return jax.tree.unflatten(results, _primitive.bind(*arrays, kernel=kernel))

    return call


def _plain(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _flat(*arrays, kernel):
    return jax.tree.leaves(kernel(*arrays))


def _abstract(*avals, kernel):
    like = max(avals, key=lambda aval: len(aval.manual_axis_type.varying))
    made = jax.tree.leaves(jax.eval_shape(kernel, *map(_plain, avals)))
    return [like.update(shape=x.shape, dtype=x.dtype, sharding=like.sharding.update(spec=P(*[None] * len(x.shape))))
            for x in made]


def _lowering(ctx, *args, kernel):
    plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    return mlir.lower_fun(_flat, multiple_results=True)(ctx.replace(avals_in=plain), *args, kernel=kernel)


_primitive = Primitive("opaque_kernel")
_primitive.multiple_results = True
_primitive.def_impl(_flat)
_primitive.def_abstract_eval(_abstract)
mlir.register_lowering(_primitive, _lowering)
