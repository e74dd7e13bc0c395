# pytest tests/unit/test_order.py
"""Values that wait for an array: right whatever it holds, and not known to the compiler without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.xla.order import after, gradient_first, index_after, read_after, read_back, zeros_after


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -3e38, float("inf"), float("-inf"), float("nan")])
def test_values_do_not_depend_on_the_array(value, dtype):
    array = jnp.full((2, 3), value, dtype)
    assert jax.jit(lambda x: index_after(x, 3))(array) == 3
    np.testing.assert_array_equal(jax.jit(after)(array, jnp.arange(6.0).reshape(2, 3)), np.arange(6.0).reshape(2, 3))
    zeros = jax.jit(lambda x: zeros_after(x, (2, 5), jnp.float32))(array)
    np.testing.assert_array_equal(zeros, np.zeros((2, 5), np.float32))
    h, weight = jnp.ones((2, 2), dtype), array
    dh, dweight = jax.vjp(gradient_first, h, weight)[1]((h * 2, array))
    np.testing.assert_array_equal(dh, h * 2)
    np.testing.assert_array_equal(np.float32(dweight), np.float32(array))


def test_the_compiler_does_not_see_through():
    """Were the result a constant in the optimised program, nothing would wait."""
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    for fn in (
        lambda x: index_after(x, 4),
        lambda x: zeros_after(x, (4,), jnp.float32),
        lambda x: after(x, jnp.ones(4)),
    ):
        text = jax.jit(fn).lower(shape).compile().as_text()
        assert "bitcast-convert" in text, text
    there_and_back = lambda x: jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32), jnp.float32)
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        assert (
            "bitcast-convert" not in jax.jit(there_and_back).lower(shape).compile().as_text()
        )  # so it can be seen through
        for fn in (lambda x: index_after(x, 4), lambda x: zeros_after(x, (4,), jnp.float32)):
            assert "bitcast-convert" in jax.jit(fn).lower(shape).compile().as_text()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def test_read_back():
    array = jnp.arange(24.0).reshape(4, 3, 2)
    assert read_back(array, jnp.int32(2), False).ravel() == array[2, 0, 0]


def test_what_is_the_same_on_all_devices_stays_so():
    """A row read at an index that waits for an array of one device would count as that device's."""
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    P = jax.sharding.PartitionSpec
    table, shards = jnp.arange(6.0).reshape(3, 2), jnp.arange(24.0).reshape(3, 8)

    def local(array, table, shards):
        return read_after(array, lambda i: (table[i], shards[i]), 2)

    on_mesh = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P("seq"), P(), P(None, "seq")), out_specs=(P(), P("seq")))
    )
    rows = on_mesh(jnp.ones((4, 2)), table, shards)  # out_specs refuse a first row that varies
    np.testing.assert_array_equal(rows[0], table[2])
    np.testing.assert_array_equal(rows[1], shards[2])
