# pytest tests/mesh/test_interfaces.py
"""The five interfaces by their users: layer kinds, a user's own attention, the reference twin, the block."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.config import UserError
from alst_jax.models import block
from alst_jax.models.block import Tokens, halves
from alst_jax.models.config import LayerKind
from alst_jax.ops.attention import Kernel, attention
from alst_jax.ops.cross_entropy import cross_entropy
from alst_jax.profile import Profile
from alst_jax.stack.plain import INPUT
from tests.helpers import (
    PLAIN,
    TINY,
    assert_trees_close,
    drawn,
    initial,
    leaves,
    loss_and_grad,
    make_step,
    random_batch,
    relative_error,
    tiny,
    train,
)

TILES = dict(loss_tile=7, mlp_tile=5)
HOST = dict(offload_activations=True, offload_weights=True, offload_optimizer=True)
MESHES = [(1, 1), (1, 4), (2, 2)]


def loop_loss(model, params, batch):
    """The loss by a Python loop over layers that calls `Block`, without anything of stack/ or parallel/."""
    h, tokens = params["embed_tokens"]["embedding"][batch["tokens"]], Tokens.of(model, batch["positions"])
    kinds = model.layer_kinds or (LayerKind(),) * model.num_layers
    for i, kind in enumerate(kinds):
        layer = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        h = layer(h, tokens, lambda *qkv, kind=kind: attention(*qkv, model.attention_spec(kind), kernel="xla"), kind)
    head = params["embed_tokens" if model.tie_word_embeddings else "lm_head"]["embedding"]
    total = cross_entropy(params["norm"](h).reshape(-1, h.shape[-1]), head, batch["labels"].reshape(-1))
    return total / np.count_nonzero(np.asarray(batch["labels"]) != -100)


def check_against_loop(model, mesh, **profile):
    batch = random_batch(model)
    params = drawn(model, jnp.dtype("float32"), 0)
    on_device = jax.tree.map(jnp.asarray, batch)
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: loop_loss(model, p, on_device)))(params)
    step = make_step(model, *mesh, profile=Profile(**profile))
    ours, first = loss_and_grad(step, initial(step), batch)
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    assert_trees_close(first, gradients, 1e-4)


# ------------------------------------------------------------------------------------------------------------ the block


def test_a_block_is_its_two_halves():
    """And its parts are disjoint: each parameter belongs to one half, so that none is without a gradient."""
    model = tiny(qkv_bias=True, attention_bias=False)
    params = drawn(model, jnp.dtype("float32"), 0)
    attend = lambda q, k, v: attention(q, k, v, kernel="xla")

    @jax.jit
    def both(one):
        h, tokens = jnp.ones((2, 6, 64)), Tokens.of(model, jnp.tile(jnp.arange(6), (2, 1)))
        return one(h, tokens, attend), one.after(h, attend(*one.before(h, tokens)))

    assert np.array_equal(*both(jax.tree.map(lambda w: w[1], params["layers"])))
    before, after = halves(model)
    assert not before & after
    assert before | after == {
        name[1:] for name in map(tuple, (n.split(".") for n in leaves(params))) if name[0] == "layers"
    }


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_heads_are_slices(chunks):
    """Eight query heads and two kv heads in groups: together they are all heads."""
    model = tiny()

    @jax.jit
    def whole_and_parts(layers):
        one = jax.tree.map(lambda w: w[0], layers)
        h, tokens = jax.random.normal(jax.random.key(1), (5, 64)), Tokens.of(model, jnp.arange(5)[None])
        tokens = Tokens(*(x[0] for x in tokens.rows))
        return one.before(h, tokens), [one.heads(i, chunks).before(h, tokens) for i in range(chunks)]

    (q, k, v), parts = whole_and_parts(drawn(model, jnp.dtype("float32"), 0)["layers"])
    assert relative_error(np.concatenate([part[0] for part in parts], 1), q) < 1e-6
    for whole, n in ((k, 1), (v, 2)):
        for i, part in enumerate(parts):
            at = i * 2 // chunks
            assert relative_error(part[n], whole[:, at : at + part[n].shape[1]]) < 1e-6


def test_six_calls_from_the_loss_to_the_product(monkeypatch):
    """Named functions of ours between `Model.loss` and `x @ w_q`."""
    seen, real = [], block.linear

    def watched(x, kernel):
        frames = [f.function for f in inspect.stack() if "alst_jax" in f.filename and "/tests/" not in f.filename]
        seen.append([name for name in frames if not name.startswith("<")])
        return real(x, kernel)

    monkeypatch.setattr(block, "linear", watched)
    step, _ = make_step(TINY, profile=Profile()), halves(TINY)
    step.loss.trace(step.trained, step.frozen, step.put_batch(**random_batch()), jnp.float32(1))
    path = next(path for path in seen if "attend" in path and "stream" in path)
    closures = {"one", "step", "project", "body", "in_tiles", "watched"}  # defined inside one of the others
    calls = [name for name in path[: path.index("loss")] if name not in closures]
    assert calls[0] == "__call__" and len(calls) <= 6, calls


# ---------------------------------------------------------------------------------------------------------- layer kinds


ALTERNATING = tuple(LayerKind(rope=i % 2 == 0, window=16 if i % 2 else None) for i in range(4))


@pytest.mark.parametrize(
    "mesh,profile",
    [
        ((1, 1), dict(remat=False, loss_tile=None, mlp_tile=None)),
        ((1, 1), dict(stack="plain")),
        ((1, 4), dict(segment_layers=(3, 1), keep_attention_on_device=1, **TILES, **HOST)),
        ((2, 2), dict(segment_layers=(2,), keep_attention_on_host=2, head_chunks=2)),
    ],
    ids=str,
)
def test_layers_of_two_kinds_equal_a_python_loop(mesh, profile):
    check_against_loop(tiny(num_layers=4, layer_kinds=ALTERNATING), mesh, **profile)


def test_kinds_matter_and_the_program_does_not_grow_with_depth():
    loss = lambda kinds: train(make_step(tiny(num_layers=4, layer_kinds=kinds), profile=Profile()), random_batch(), 1)[
        0
    ][0]
    assert abs(loss(ALTERNATING) - loss(())) > 1e-4
    assert abs(loss(ALTERNATING) - loss(ALTERNATING[::-1])) > 1e-4

    def size(layers):
        step = make_step(tiny(num_layers=layers, layer_kinds=ALTERNATING * (layers // 4)), profile=Profile())
        return (
            step.loss_and_grad.lower(step.trained, step.frozen, step.put_batch(**random_batch()), jnp.float32(1))
            .as_text()
            .count("\n")
        )

    assert size(12) == size(4)


# ------------------------------------------------------------------------------------------------------ own attention


def test_a_users_own_attention():
    """Half of the usual attention: a function that XLA's kernel is not."""
    calls = []

    def forward(q, k, v, spec, documents):
        calls.append("forward")
        scores = jnp.einsum("bsnh,btnh->bnst", q, jnp.repeat(k, q.shape[2] // k.shape[2], 2)) * spec.scale_of(
            q.shape[3]
        )
        scores = jnp.where(jnp.tril(jnp.ones((q.shape[1],) * 2, bool))[None, None], scores, -jnp.inf)
        o = jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(scores, -1), jnp.repeat(v, q.shape[2] // v.shape[2], 2))
        return o, jax.nn.logsumexp(scores, -1)

    def backward(q, k, v, o, lse, do, spec, documents):
        calls.append("backward")
        return jax.vjp(lambda *qkv: forward(*qkv, spec, documents)[0], q, k, v)[1](do)

    mine = Kernel("mine", forward, backward)
    model = tiny(attention_bias=False, mlp_bias=False)
    batch = random_batch(model)
    usual, own = (
        loss_and_grad(step, initial(step), batch)
        for step in (make_step(model), make_step(model, sp=2, profile=dataclasses.replace(PLAIN, attention=mine)))
    )
    assert {"forward", "backward"} <= set(calls)
    np.testing.assert_allclose(own[0], usual[0], rtol=1e-5)
    assert_trees_close(own[1], usual[1], 1e-5)
    with pytest.raises(UserError, match="--attention mine does not implement window.*use --attention xla"):
        make_step(tiny(layer_kinds=(LayerKind(window=4),) * 3), profile=Profile(attention=mine))


# ------------------------------------------------------------------------------------------------------ reference twin


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        TILES,
        dict(offload_activations=True),
        dict(offload_weights=True),
        dict(head_chunks=2),
        dict(head_chunks=2, **TILES, **HOST),
    ],
    ids=str,
)
def test_the_stack_equals_its_twin(mesh, changes):
    batch = random_batch()
    steps = [
        make_step(TINY, *mesh, profile=dataclasses.replace(PLAIN, remat=True, stack=stack, **changes))
        for stack in ("segments", "plain")
    ]
    one, other = (loss_and_grad(step, initial(step), batch) for step in steps)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    assert_trees_close(one[1], other[1], 1e-5)


def test_the_twin_keeps_inputs_alone(monkeypatch):
    """Each layer's input is its only residual, in host memory where activations are offloaded: no stack of the MLP's
    intermediates, which a policy that saves everything has."""

    def jaxpr(**changes):
        step = make_step(tiny(num_layers=4), profile=Profile(stack="plain", **changes))
        batch = step.put_batch(**random_batch(rows=1, length=256))
        return str(jax.make_jaxpr(step.loss_and_grad)(step.trained, step.frozen, batch, jnp.float32(1)))

    assert "f32<host>[4,1,256,64]" in jaxpr(offload_activations=True)
    assert "<host>" not in jaxpr()
    assert INPUT in jaxpr()
    intermediates = lambda: "[4,256,96]" in jaxpr(mlp_tile=None)
    assert not intermediates()
    monkeypatch.setattr("alst_jax.stack.plain.policy", lambda profile: jax.checkpoint_policies.everything_saveable)
    assert intermediates()


@pytest.mark.parametrize("changes", [dict(segment_layers=(3,)), dict(keep_attention_on_device=1)])
def test_what_the_twin_has_not_is_refused(changes):
    with pytest.raises(UserError, match="--stack plain saves each layer's input and nothing else"):
        make_step(profile=Profile(stack="plain", **changes))
