"""Kernels that know nothing of mesh axes, inside a shard_map that checks over which of them values vary.

Pallas's GPU kernels refuse arguments that vary over devices; a cutlass_call gives results that do not vary. A primitive
hides both: outside it the results vary as the arguments do, inside they are plain arrays of one device.
"""

import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P

_seconds: list[float] = []  # of each lowering


def seconds_compiled() -> float:
    """Seconds in which this process has compiled kernels: it does so each time that a program with a new shape is
    lowered."""
    return sum(_seconds, 0.0)


def opaque(kernel: Callable) -> Callable:
    """kernel(*arrays, **static) -> arrays, callable inside a shard_map.

    `kernel` must be a module's function and `static` hashable: together they are a cache key.
    """

    def call(*arrays: jax.Array, **static: Hashable) -> Any:
        shapes = jax.eval_shape(lambda *plain: kernel(*plain, **static), *map(_plain, arrays))
        results = _primitive.bind(*arrays, kernel=kernel, static=tuple(sorted(static.items())))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call


def _plain(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _flat(*arrays, kernel, static):
    return jax.tree.leaves(kernel(*arrays, **dict(static)))


def _abstract(*avals, kernel, static):
    like = max(avals, key=lambda aval: len(aval.manual_axis_type.varying))
    made = jax.eval_shape(lambda *plain: _flat(*plain, kernel=kernel, static=static), *map(_plain, avals))
    return [
        like.update(shape=x.shape, dtype=x.dtype, sharding=like.sharding.update(spec=P(*[None] * len(x.shape))))
        for x in made
    ]


def _lowering(ctx, *args, kernel, static):
    plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    lower, started = mlir.lower_fun(_flat, multiple_results=True), time.perf_counter()
    lowered = lower(ctx.replace(avals_in=plain), *args, kernel=kernel, static=static)
    _seconds.append(time.perf_counter() - started)
    return lowered


_primitive = Primitive("opaque_kernel")
_primitive.multiple_results = True
_primitive.def_impl(_flat)
_primitive.def_abstract_eval(_abstract)
mlir.register_lowering(_primitive, _lowering)
