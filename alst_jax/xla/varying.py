"""Inside a shard_map each value varies over some mesh axes and is the same over the others: helpers for that type."""

import jax
from jax import lax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which x may differ between devices; empty outside a shard_map."""
    aval = jax.typeof(x)
    if hasattr(aval, "vma"):  # jax before 0.12
        return frozenset(aval.vma)
    return frozenset(aval.manual_axis_type.varying)


def vary_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """x, marked as varying over every mesh axis over which any of the others varies. Moves no data."""
    wanted = frozenset().union(*(varying_axes(other) for other in others))
    missing = tuple(sorted(wanted - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x
