# pytest tests/mesh/test_profiles.py
"""Segments, kept attention outputs and head chunks: equal to the plain step, and really kept, where they should be."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from alst_jax.config import UserError
from alst_jax.profile import Profile
from tests import stand_in
from tests.helpers import (
    PLAIN,
    assert_trains_alike,
    assert_trees_close,
    initial,
    loss_and_grad,
    make_step,
    random_batch,
    tiny,
    train,
)

MODEL = tiny(num_layers=4, attention_bias=False, mlp_bias=False)
TILES = dict(loss_tile=7, mlp_tile=5)
HOST = dict(offload_activations=True, offload_weights=True, offload_optimizer=True)
PROFILES = [
    dict(head_chunks=2),
    dict(head_chunks=4),
    dict(head_chunks=8),
    dict(segment_layers=(2,)),
    dict(segment_layers=(4,)),
    dict(segment_layers=(3,)),
    dict(keep_attention_on_device=4),
    dict(keep_attention_on_host=4),
    dict(segment_layers=(2,), keep_attention_on_host=4),
    dict(segment_layers=(4,), keep_attention_on_device=1, keep_attention_on_host=2, head_chunks=4),
    dict(segment_layers=(2, 1, 1), keep_attention_on_device=1, keep_attention_on_host=1),
    dict(segment_layers=(1, 3), keep_attention_on_device=3, offload_activations=True),
    dict(segment_layers=(2,), keep_attention_on_host=2, head_chunks=2, **TILES, **HOST),
    dict(offload_activations=True, keep_attention_on_host=3, keep_attention_on_device=1, prefetch_activations=True),
    dict(segment_layers=(4,), keep_attention_on_host=4, prefetch_activations=True, head_chunks=2, **TILES, **HOST),
    dict(
        segment_layers=(2, 1, 1), keep_attention_on_device=2, keep_attention_on_host=1, head_chunks=4, **TILES, **HOST
    ),
]
ON_MESHES = [
    ((1, 2), dict(head_chunks=2)),
    ((1, 2), dict(head_chunks=4)),  # 4: two chunks share each kv head
    ((1, 4), dict(head_chunks=2, segment_layers=(2,), keep_attention_on_host=2)),  # sp > kv heads of a chunk
    ((1, 4), dict(head_chunks=2, keep_attention_on_host=3, prefetch_activations=True, **TILES, **HOST)),
    (
        (2, 2),
        dict(
            segment_layers=(3, 1), keep_attention_on_host=1, keep_attention_on_device=1, head_chunks=2, **TILES, **HOST
        ),
    ),
]


def name(case):
    return "+".join(f"{key}={value}" for key, value in case.items()) if isinstance(case, dict) else str(case)


@pytest.fixture(scope="module")
def reference():
    return train(make_step(MODEL), random_batch(MODEL))


def check(reference, dp=1, sp=1, **changes):
    profile = dataclasses.replace(PLAIN, remat=True, **changes)
    assert_trains_alike(make_step(MODEL, dp=dp, sp=sp, profile=profile), random_batch(MODEL), reference)


@pytest.mark.parametrize("changes", PROFILES, ids=name)
def test_profile_equals_plain(changes, reference):
    check(reference, **changes)


@pytest.mark.parametrize("mesh,changes", ON_MESHES, ids=name)
def test_profile_on_a_mesh_equals_plain(mesh, changes, reference):
    check(reference, *mesh, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(segment_layers=(4,), keep_attention_on_host=2),
        dict(segment_layers=(2, 1, 1), keep_attention_on_device=1, head_chunks=4),
    ],
    ids=name,
)
@pytest.mark.parametrize("attention", ["cudnn", "flash"])
def test_with_a_kernel_that_lives_on_kept_statistics(attention, changes, reference, monkeypatch):
    calls = stand_in.install(monkeypatch)
    check(reference, sp=2, attention=attention, **changes)
    assert ("flash" in calls) == (attention == "flash")


# ------------------------------------------------------------------------------------------------------- what is kept


def traced(monkeypatch, **changes):
    """The jaxpr of loss and gradient with cuDNN attention, without dead code."""
    from jax._src.cudnn import fused_attention_stablehlo  # asks for cuDNN, which is not here; no public name

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91900)
    profile = Profile(**{"loss_tile": 64, "mlp_tile": 64, "attention": "cudnn", "compute_dtype": "bfloat16", **changes})
    step = make_step(MODEL, profile=profile, dtype=jnp.bfloat16)
    batch = step.put_batch(**random_batch(MODEL, rows=1, length=256))
    jaxpr = step.loss_and_grad.trace(
        step.trained, step.frozen, batch, jax.ShapeDtypeStruct((), jnp.float32)
    ).jaxpr.jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def executions(jaxpr, name) -> int:
    """How often primitives of this name run in a step: those in a scan as often as it has trips."""
    total = 0
    for eqn in jaxpr.eqns:
        trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        total += trips * sum(executions(x, name) for x in inner if hasattr(x, "eqns")) + (name in eqn.primitive.name)
    return total


@pytest.mark.parametrize(
    "changes,forwards",
    [
        ({}, 8),
        (dict(keep_attention_on_device=4), 4),
        (dict(keep_attention_on_host=3), 5),
        (dict(segment_layers=(2,)), 8),  # not 10: what is made while a segment is rebuilt serves its backward pass too
        (dict(segment_layers=(2,), keep_attention_on_host=2), 6),
        (dict(segment_layers=(2,), keep_attention_on_device=4), 4),
        (dict(segment_layers=(4,), keep_attention_on_device=1, keep_attention_on_host=2), 5),
        (dict(segment_layers=(3, 1), keep_attention_on_device=1), 7),
        (dict(head_chunks=4), 32),
        (dict(head_chunks=4, keep_attention_on_host=4), 16),
        (dict(head_chunks=4, segment_layers=(4,), keep_attention_on_host=2), 24),
    ],
    ids=name,
)
def test_kept_outputs_spare_attention_forwards(changes, forwards, monkeypatch):
    """4 layers: 4 forwards, and one again for each layer whose output was not kept; times the chunks."""
    jaxpr = traced(monkeypatch, **changes)
    assert executions(jaxpr, "dot_product_attention_fwd") == forwards
    assert executions(jaxpr, "dot_product_attention_bwd") == 4 * changes.get("head_chunks", 1)


def test_what_is_kept_on_the_host(monkeypatch):
    def host(**changes):
        """Shapes of host arrays of at least a layer's activations, without those of a single row on its way."""
        found = re.findall(r"<host>\[([\d,]+)\]", str(traced(monkeypatch, **changes)))
        return {
            shape for shape in found if not shape.startswith("1,1,") and shape not in ("1,256,64", output, statistics)
        }

    output, statistics, inputs = "1,256,8,16", "1,1,8,256", "1,256,64"
    assert host(keep_attention_on_device=2, segment_layers=(2,)) == set()
    # Of the three layers before the last: two of one segment, one of another.
    kept = dict(keep_attention_on_device=1, keep_attention_on_host=3)
    assert host(segment_layers=(2,), **kept) == {f"2,{output}", f"2,{statistics}"}
    assert host(segment_layers=(1,), **kept) == {f"3,{output}", f"3,{statistics}"}
    # Of 2 segments, of 4 layers, of the first and the last layer apart.
    assert host(offload_activations=True, segment_layers=(2,)) == {f"2,{inputs}"}
    assert host(offload_activations=True) == {f"4,{inputs}"}
    assert host(offload_activations=True, segment_layers=(2, 1, 1)) == {f"2,{inputs}"}


def test_the_input_of_the_first_segment_is_looked_up_again(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MODEL", dataclasses.replace(MODEL, num_layers=6))
    shapes = re.findall(r"<host>\[([\d,]+)\]", str(traced(monkeypatch, offload_activations=True, segment_layers=(2,))))
    assert "2,1,256,64" in shapes and "3,1,256,64" not in shapes  # of three segments


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(segment_layers=(3, 2)), "--segment-layers 3 2: 5 layers in all, where the model has 4"),
        (dict(keep_attention_on_device=2, keep_attention_on_host=3), "= 5 layers, where the model has 4"),
        (
            dict(keep_attention_on_host=1, remat=False),
            "--keep-attention-on-host is a part of rematerialisation; it needs --remat",
        ),
        (dict(head_chunks=3), "--head-chunks 3 must divide 8 query heads; use 1, 2, 4 or 8"),
    ],
    ids=name,
)
def test_impossible_profiles_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_step(MODEL, profile=Profile(**changes))


@pytest.mark.parametrize(
    "nonsense",
    [dict(segment_layers=(5, -1)), dict(segment_layers=()), dict(head_chunks=0), dict(keep_attention_on_device=-1)],
    ids=name,
)
def test_nonsense_is_refused_in_the_library_too(nonsense):
    with pytest.raises(UserError, match="must be at least"):
        make_step(MODEL, profile=Profile(**nonsense))


def test_tied_embeddings_are_summed_on_the_device():
    """The gradients of the two uses of one table, each of which would go to host memory by itself; and they are
    right."""
    model = tiny(num_layers=2, tie_word_embeddings=True)
    profile = Profile(loss_tile=7, mlp_tile=5, offload_weights=True)
    step = make_step(model, profile=profile)
    batch = step.put_batch(**random_batch(model))
    jaxpr = str(step.loss_and_grad.trace(step.trained, step.frozen, batch, jax.ShapeDtypeStruct((), jnp.float32)).jaxpr)
    assert "<host>" in jaxpr and not [line for line in jaxpr.splitlines() if "add_any" in line and "<host>" in line]
    one, many = (loss_and_grad(made, initial(made), random_batch(model)) for made in (make_step(model), step))
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    assert_trees_close(many[1], one[1], 1e-5)


def test_chunks_and_degree_must_fit_together():
    with pytest.raises(
        UserError, match=r"sp=4 must divide 2 query heads of each of 4 chunks \(--head-chunks\); use 1 or 2"
    ):
        make_step(MODEL, sp=4, profile=Profile(head_chunks=4))
