# pytest tests/unit/test_opaque.py
"""A kernel that knows nothing of mesh axes, with static arguments, inside a shard_map that checks them."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from alst_jax.xla.opaque import opaque, seconds_compiled

TRACED = []


def scaled(x, y, *, factor=1, both=False):
    """factor x y, and x with it if `both`. Refuses arrays that vary over devices, as Pallas's kernels do."""
    TRACED.append((factor, both, jax.typeof(x).manual_axis_type.varying | jax.typeof(y).manual_axis_type.varying))
    return (factor * x * y, x) if both else factor * x * y


def on_two_devices(fn, **options):
    mesh = Mesh(np.array(jax.devices()[:2]), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=(P("seq"), P()), out_specs=P("seq"), **options))


def test_static_arguments_reach_the_kernel_and_results_vary():
    x, y = jnp.arange(8.0), jnp.arange(1.0, 5.0)
    TRACED.clear()
    out, same = on_two_devices(lambda x, y: opaque(scaled)(x, y, factor=3, both=True))(x, y)
    np.testing.assert_array_equal(out, 3 * x * jnp.tile(y, 2))
    np.testing.assert_array_equal(same, x)
    assert TRACED and all(entry == (3, True, frozenset()) for entry in TRACED)  # inside, nothing varies


def test_without_static_arguments_and_outside_of_jit():
    np.testing.assert_array_equal(opaque(scaled)(jnp.arange(4.0), jnp.arange(4.0)), jnp.arange(4.0) ** 2)


def test_static_arguments_are_part_of_the_cache_key():
    run = jax.jit(lambda x, y: [opaque(scaled)(x, y, factor=n) for n in (2, 5, 2)])
    for found, n in zip(run(jnp.ones(3), jnp.ones(3)), (2, 5, 2)):
        np.testing.assert_array_equal(found, np.full(3, n))


def test_the_seconds_of_kernels_are_counted():
    def slow(x):
        time.sleep(0.2)  # as a compiler of kernels does when it is traced
        return 2 * x

    before = seconds_compiled()
    jax.jit(opaque(slow)).lower(jnp.ones(3))
    assert 0.2 <= seconds_compiled() - before < 5


def test_inside_scan_and_checkpoint():
    @functools.partial(jax.custom_vjp)
    def double(x, y):
        return opaque(scaled)(x, y, factor=2)

    double.defvjp(
        lambda x, y: (double(x, y), (x, y)),
        lambda kept, d: (opaque(scaled)(d, kept[1], factor=2), opaque(scaled)(d, kept[0], factor=2)),
    )

    def loss(x, y):
        y = jax.lax.pcast(y, "seq", to="varying")
        body = jax.checkpoint(lambda h, _: (double(h, y), None))
        return jax.lax.psum(jax.lax.scan(body, x, None, length=3)[0].sum(), "seq")

    x, y = jnp.arange(8.0), jnp.full(4, 0.5)
    grad = on_two_devices(jax.grad(loss))(x, y)
    np.testing.assert_array_equal(grad, np.ones(8))  # (2 * 0.5) ** 3
