# pytest tests/unit/test_checkpoint_trees.py
"""Trees of parameters on disk, and orbax as it is patched."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from alst_jax.config import UserError
from alst_jax.models.tree import as_dict
from alst_jax.storage import checkpoint as ckpt
from tests.unit.saves import LOOP, assert_identical, assert_placed, filled


class Linear(nnx.Module):
    def __init__(self, shape):
        self.kernel = nnx.Param(jnp.zeros(shape))


class Block(nnx.Module):
    def __init__(self):
        self.q_proj, self.o_proj, self.heads = Linear((3, 8, 4)), Linear((3, 4, 8)), 2


def dicts_and_modules():
    """The same abstract weights, as nested dicts and with a module for the layers."""
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(jax.devices()[0])), tree
    )
    shapes = {"q_proj": {"kernel": jnp.zeros((3, 8, 4))}, "o_proj": {"kernel": jnp.zeros((3, 4, 8))}}
    table = {"embedding": jnp.zeros((16, 8))}
    return place({"embed_tokens": table, "layers": shapes}), place({"embed_tokens": table, "layers": Block()})


def test_modules_and_dicts_are_the_same_on_disk(tmp_path):
    dicts, modules = dicts_and_modules()
    for number, (written, read) in enumerate(((modules, dicts), (dicts, modules), (modules, modules))):
        params, optimizer = filled(written), {"mu": filled(written, seed=1), "count": jnp.int32(3)}
        checkpoints = ckpt.Checkpoints(tmp_path / str(number))
        checkpoints.save(1, params, optimizer, LOOP)
        abstract = {"mu": read, "count": jax.tree.leaves(read)[0].update(shape=(), dtype=jnp.int32)}
        back = checkpoints.restore_params(1, read), checkpoints.restore_optimizer(1, abstract)
        assert jax.tree.structure(back[0]) == jax.tree.structure(read)
        assert_identical(as_dict(back), as_dict((params, optimizer)))
        assert_placed(back[0], read)
        stored = dict(checkpoints.read_params(1))
        assert stored.keys() == {
            ("embed_tokens", "embedding"),
            ("layers", "q_proj", "kernel"),
            ("layers", "o_proj", "kernel"),
        }
        assert_identical(stored["layers", "q_proj", "kernel"], as_dict(params)["layers"]["q_proj"]["kernel"])
        tree = json.loads((tmp_path / str(number) / "checkpoints/1/params/_METADATA").read_text())["tree_metadata"]
        assert "('layers', 'q_proj', 'kernel')" in tree and not any("value" in name for name in tree)
        checkpoints.close()


def test_parameters_without_an_optimizer_state_are_not_stored(tmp_path):
    """A frozen parameter has None in the optimizer's trees."""
    _, modules = dicts_and_modules()
    trained = {"mu": modules | {"embed_tokens": {"embedding": None}}}
    checkpoints = ckpt.Checkpoints(tmp_path)
    checkpoints.save(1, filled(modules), filled(trained), LOOP)
    back = checkpoints.restore_optimizer(1, trained)
    assert jax.tree.structure(back) == jax.tree.structure(trained)
    with pytest.raises(UserError, match=r"mu.embed_tokens.embedding is none there and \(16, 8\) floats here"):
        checkpoints.restore_optimizer(1, {"mu": modules})


# -------------------------------------------------------------------------------------------------------- orbax's patch

PATCH = """
import logging
from orbax.checkpoint._src.serialization import serialization
original, filters = serialization.async_serialize_from_host, list(logging.getLogger("absl").filters)
from alst_jax.storage import checkpoint, orbax_limits
assert serialization.async_serialize_from_host is original
assert logging.getLogger("absl").filters == filters
orbax_limits.install()
patched = serialization.async_serialize_from_host
assert patched is not original and patched.__wrapped__ is original
orbax_limits.install()
assert serialization.async_serialize_from_host is patched
assert len(logging.getLogger("absl").filters) == len(filters) + 1
serialization.async_serialize_from_host = original
import sys
checkpoint.Checkpoints(sys.argv[1])
assert serialization.async_serialize_from_host is not original
"""


def test_orbax_is_patched_by_install_and_not_by_an_import(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PATCH, str(tmp_path)],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
