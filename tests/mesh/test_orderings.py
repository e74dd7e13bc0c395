# pytest tests/mesh/test_orderings.py
"""Two orderings that GPU memory depends on and no result shows, pinned in the jaxpr: without them many float32 sums of
weight gradients are alive at once (docs/log.md)."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from alst_jax.models.block import Tokens
from alst_jax.profile import Profile
from alst_jax.stack import ends, stack
from alst_jax.stack.ends import Model
from alst_jax.stack.kept import Kept
from alst_jax.stack.layer import Weights
from alst_jax.stack.stack import BackwardLoop, Saved
from tests.helpers import make_step, random_batch, tiny

H = jnp.zeros((1, 32, 64))


@functools.cache
def step():
    return make_step(tiny(num_layers=2), 1, 2, Profile(loss_tile=8, mlp_tile=8))


def ancestors(jaxpr, var) -> set:
    """All variables from which `var` is computed."""
    made_by = {id(out): eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    found, waiting = set(), [var]
    while waiting:
        for x in made_by[id(v)].invars if id(v := waiting.pop()) in made_by else ():
            if id(x) not in found:
                found.add(id(x))
                waiting.append(x)
    return found


def waits(fn) -> bool:
    """Whether the first result of fn(h), in a shard_map, is computed from each of its other results."""
    sharded = jax.shard_map(fn, mesh=step().mesh, in_specs=P("data", "seq"), out_specs=P(("data", "seq")))
    (eqn,) = (e for e in jax.make_jaxpr(sharded)(H).jaxpr.eqns if e.primitive.name == "shard_map")
    jaxpr = eqn.params["jaxpr"]
    first, *others = jaxpr.outvars
    behind = ancestors(jaxpr, first)
    assert others
    return all(id(other) in behind for other in others)


def head(h):
    """The gradients of the last hidden state and of the head's table."""
    model = Model(step().model, step().profile, step().specs)
    shard = lambda p, spec: jnp.zeros(p.sharding.shard_shape(p.shape), p.dtype) + h[0, 0, 0]
    end = jax.tree.map(shard, model.ends(step().params), model.ends(step().specs))
    loss = lambda h, table: model.head_loss(
        h, end | {"lm_head": {"embedding": table}}, jnp.zeros(h.shape[:2], jnp.int32), jnp.float32(1)
    )
    dh, dtable = jax.grad(loss, argnums=(0, 1))(h, end["lm_head"]["embedding"])
    return dh, dtable


def backward(h):
    """The gradients of a layer's input and of its weights."""
    model = Model(step().model, step().profile, step().specs)
    shard = lambda p: jnp.zeros((p.sharding.shard_shape(p.shape))[1:], p.dtype) + h[0, 0, 0]
    shards = Weights(*(jax.tree.map(shard, part["layers"]) for part in (step().trained, step().frozen)))
    tokens = Tokens.of(step().model, jnp.zeros(h.shape[:2], jnp.int32))
    saved = Saved([], None, None, (), shards, tokens)
    loop = BackwardLoop(model.stack, saved, lambda store, i: shards, lambda store, i, shards, gradients: gradients)
    dh, gradients = loop.one((h, ()), 1, h, None, Kept())
    return dh, *jax.tree.leaves(gradients)


@pytest.mark.parametrize(
    "fn,module,name,identity",
    [(head, ends, "gradient_first", lambda h, table: (h, table)), (backward, stack, "after", lambda arrays, x: x)],
    ids=["the loss", "the loop over layers"],
)
def test_the_gradient_of_the_input_waits_for_those_of_the_weights(fn, module, name, identity, monkeypatch):
    assert waits(fn)
    monkeypatch.setattr(module, name, identity)
    assert not waits(fn)


def test_stages_have_names():
    """`jax.named_scope`s, which profilers show."""
    made, number = step(), jax.ShapeDtypeStruct((), jnp.float32)
    batch = made.put_batch(**random_batch(made.model, rows=1, length=16))
    gradient = made.loss_and_grad.lower(made.trained, made.frozen, batch, jnp.float32(1)).as_text(debug_info=True)
    update = made.update.lower(made.trained, made.trained, made.optimizer_state, number, number).as_text(
        debug_info=True
    )
    for name, text in dict.fromkeys(("embed", "layer/attention", "layer/mlp", "loss"), gradient).items() | {
        ("update", update)
    }:
        assert re.search(rf'["(/]{name}[)/]', text), name
