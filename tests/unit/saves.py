"""Saves of small models."""

import jax
import jax.numpy as jnp
import numpy as np

from alst_jax.storage import checkpoint as ckpt
from alst_jax.storage import run_directory
from tests.helpers import make_step

LOOP = {"step": 3, "data": {"next_index": 2**40 - 1, "nested": [1, None, "é"]}, "seed": 0, "geometry": {"rows": 2}}


def filled(abstract, seed=0):
    """Arrays in the places `abstract` names, with the bit patterns that sloppy copies lose."""
    rng = np.random.default_rng(seed)

    def leaf(a):
        if a.dtype == jnp.int32:
            return jax.device_put(np.full(a.shape, 12345 + seed, np.int32), a.sharding)
        values = rng.standard_normal(a.shape).astype(a.dtype)
        values.reshape(-1)[:4] = [np.nan, -0.0, 1e-40, np.inf]
        return jax.device_put(values, a.sharding)

    return jax.tree.map(leaf, abstract)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), jax.tree_util.keystr(path)


def assert_placed(tree, abstract):
    for x, a in zip(jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True):
        assert x.sharding == a.sharding and x.dtype == a.dtype


def saved(run_dir, *steps, keep=None, made=None):
    """A run directory with checkpoints of the same weights at `steps`."""
    made = made or make_step(dp=2, sp=2)
    run_directory.write_run_file(run_dir, "training", {"flags": {}})
    params, optimizer = filled(made.params), filled(made.optimizer_state, seed=1)
    checkpoints = ckpt.Checkpoints(run_dir, keep)
    for step in steps:
        checkpoints.save(step, params, optimizer, LOOP | {"step": step})
    checkpoints.close()
    return params, optimizer
