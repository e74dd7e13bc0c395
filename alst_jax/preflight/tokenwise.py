"""The token-wise halves of a layer (norms, projections, rotary embedding, MLP), forward and backward, in the run's
tiles.

Attention is replaced by given arrays. Outputs are compared at sampled tokens. Gradients of weights are sums over all
tokens, which are computed here in float32 blocks of rows. With inputs of +-64 the gradient of the value projection has
exact factors, whatever the dtype: its sums over tiles and devices must be right to float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from alst_jax.models.tree import as_dict
from alst_jax.ops.rope import inverse_frequencies
from alst_jax.parallel.sharding import drop_layer_dim, is_spec
from alst_jax.parallel.ulysses import Ulysses
from alst_jax.preflight import reference
from alst_jax.preflight.limits import FLOAT32, LAMBDA, Row, row, unit
from alst_jax.preflight.rope64 import cos_sin
from alst_jax.preflight.subject import Subject
from alst_jax.preflight.values import values
from alst_jax.stack.batch import BATCH_SPEC, Batch
from alst_jax.stack.layer import Weights
from alst_jax.xla import host

H, O, DH, DQ, DK, DV = range(21, 27)  # seeds  # noqa: E741
LOUD = 64  # beside its square the epsilon of a norm is nothing
DEEP = 10  # roundings on the longest way through a layer: two norms, six products, an activation, a sum


@dataclasses.dataclass(frozen=True)
class Given:
    """A `SequenceParallel` without attention: `attend` returns queries, and keys with values, `attend_backward` given
    gradients."""

    chunks: int
    kv_heads: int
    gradients: Callable
    check, traffic, work = map(staticmethod, (Ulysses.check, Ulysses.traffic, Ulysses.work))

    def attend(self, project, spec, ready, documents=None):
        parts = [project(i) for i in range(self.chunks)]
        q = jnp.concatenate([q for q, _, _ in parts], axis=2)
        every = max(1, self.chunks // self.kv_heads)  # chunks that read the same kv head
        return q, jnp.concatenate([part[n] for n in (1, 2) for part in parts[::every]], axis=2)

    def attend_backward(self, project, spec, results, do, documents=None):
        return self.gradients()


def check_tokenwise(subject: Subject) -> list[Row]:
    """Rows for each kind of layer: forward, backward, gradients of weights; and one for the float32 sums."""
    rows, kinds = [], subject.config.kinds
    run = _run(subject)
    own, own_sums = (reference.independent(functools.partial(fn, subject), static_argnums=0) for fn in (_rows, _sums))
    turns, blocks = rotations(subject), subject.blocks(subject.config.intermediate_size)
    trained, frozen = subject.few.split(subject.params)
    arguments = trained["layers"], frozen["layers"], subject.batch["positions"]
    for number, kind in enumerate(kinds):
        name = f" of layer kind {number}" if len(kinds) > 1 else ""
        weights = subject.layer_weights(number)
        mine, gradients = run(*arguments, np.int32(number), np.float32(0))
        theirs = own(kind, weights, turns[kind.table])
        width = subject.config.intermediate_size
        for part, at, roundings in (
            ("queries, keys, values", slice(0, 3), 4),
            ("MLP", slice(3, 4), DEEP),
            ("gradient of the input", slice(4, 5), 2 * DEEP),
        ):
            error = max(_worst(np.asarray(a), np.asarray(b)) for a, b in zip(mine[at], theirs[at], strict=True))
            rows.append(row(f"{part}{name}", error, subject.dtype, roundings, width))
        wanted = as_dict(own_sums(kind, weights, turns[kind.table], blocks, np.float32(0)))
        error = _gradients(gradients, wanted)
        rows.append(row(f"gradients of weights{name}", error, subject.dtype, 2 * DEEP, subject.rows * subject.length))
    _, gradients = run(*arguments, np.int32(0), np.float32(1))
    if (name := "self_attn.v_proj.kernel") in (found := flat(gradients)):
        wanted = own_sums(kinds[0], subject.layer_weights(0), turns[kinds[0].table], blocks, np.float32(1))
        rows.append(_sums_row(subject, _relative(found[name], flat(wanted)[name])))
    return rows


def _sums_row(subject, error):
    tokens, reduce = subject.rows * subject.length, subject.step.profile.reduce_dtype
    limit = LAMBDA * np.sqrt(tokens) * FLOAT32 + (subject.mesh.size * unit("bfloat16") if reduce == "bfloat16" else 0)
    return Row(
        "sums over tiles and devices",
        float(error),
        float(limit),
        f"exact factors, sums of {tokens:,} terms in float32, over devices in {reduce}",
    )


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted names."""
    found = {}
    for name, part in as_dict(tree).items():
        found |= {f"{name}.{key}": leaf for key, leaf in flat(part).items()} if isinstance(part, dict) else {name: part}
    return found


def _worst(a, b):
    """The largest error of a token and head, relative to its norm."""
    size = np.linalg.norm(b, axis=-1)
    return np.max(np.linalg.norm(a - b, axis=-1) / np.maximum(size, 1e-3 * np.max(size)))


def _relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def _gradients(mine, theirs):
    mine, theirs = flat(mine), flat(theirs)
    return max(_relative(mine[name], theirs[name]) for name in mine)


# ------------------------------------------------------------------------------------------------------------ the run's


def _run(subject):
    """(trained and frozen layers, positions, number, signs) -> (q, k, v, next h, gradient of h at the sampled tokens),
    float32 gradients of the layer's trained weights."""
    model, step, layer = subject.config, subject.few, subject.model.layer
    sizes = jnp.arange(model.hidden_size), jnp.arange(model.head_dim)
    heads, kv_heads = jnp.arange(model.num_heads), jnp.arange(model.num_kv_heads)

    def local(trained, frozen, positions, number, signs):
        b, t = subject.indices()
        made = lambda seed, *axes: values(seed, b, t, *axes).astype(subject.dtype)
        given = Given(
            layer.sequence.chunks,
            model.num_kv_heads,
            lambda: (made(DQ, heads, sizes[1]), made(DK, kv_heads, sizes[1]), made(DV, kv_heads, sizes[1])),
        )
        one = dataclasses.replace(layer, sequence=given)
        tokens = subject.model.tokens(Batch(positions, positions, positions))
        shards = Weights(*host.row((trained, frozen), number, step.profile.offload_weights))
        weights = one.load(shards)
        plain = made(H, sizes[0])
        h, o = jnp.where(signs > 0, LOUD * jnp.sign(plain), plain), made(O, heads, sizes[1])
        (q, kv), out = one.attend(number, h, weights, tokens), one.after(h, o, weights, tokens)
        dh, gradients = one.backward(number, h, weights, tokens, (o, None), made(DH, sizes[0]))
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), shards.trained)
        return tuple(map(subject.pick, (q, *jnp.split(kv, 2, axis=2), out, dh))), one.scatter(gradients, wide)

    split = step.split(step.specs)
    trained, frozen = (part["layers"] for part in split)
    one_layer = jax.tree.map(drop_layer_dim, trained, is_leaf=is_spec)
    return subject.on_mesh(local, (trained, frozen, BATCH_SPEC, P(), P()), (P(), one_layer))


# ------------------------------------------------------------------------------------------------------ the independent


def rotations(subject: Subject) -> list[tuple[np.ndarray, np.ndarray]]:
    """(cos, sin) float32[S, H/2] of each rotary embedding at positions 0, 1, ..., computed in float64 from the run's
    own frequencies, which `ends.check_rope` compares with theirs."""
    made, longest = [], int(subject.batch["positions"].max()) + 1
    for rope in subject.config.ropes:
        angles, _ = inverse_frequencies(rope, subject.config.head_dim, jnp.int32(longest))
        made.append(tuple(x.astype(np.float32) for x in cos_sin(rope, np.asarray(angles), np.arange(longest))))
    return made


def _inputs(subject, b, t, signs):
    """h, o, dh, dq, dk, dv of the tokens t of rows b."""
    model = subject.config
    d, size = jnp.arange(model.hidden_size), jnp.arange(model.head_dim)
    n, kv = jnp.arange(model.num_heads), jnp.arange(model.num_kv_heads)
    h = values(H, (b, t), d)
    return (
        jnp.where(signs > 0, LOUD * jnp.sign(h), h),
        values(O, (b, t), n, size),
        values(DH, (b, t), d),
        values(DQ, (b, t), n, size),
        values(DK, (b, t), kv, size),
        values(DV, (b, t), kv, size),
    )


def _both(subject, kind, turns, h, o, dh, dqkv, at):
    """(q, k, v, next h, pullbacks) with the weights as arguments of the pullbacks."""
    cos, sin = (jnp.asarray(x)[at] for x in turns)
    halves = lambda w, h: reference.before(subject.config, kind, w, h, cos, sin)
    rest = lambda w, h: reference.after(subject.config, w, h, o)
    return halves, rest


def _rows(subject, kind, weights, turns):
    rows = subject.sampled
    at = jnp.asarray(subject.batch["positions"])[rows.b, rows.t]
    h, o, dh, *dqkv = _inputs(subject, rows.b, rows.t, jnp.float32(0))
    halves, rest = _both(subject, kind, turns, h, o, dh, dqkv, at)
    qkv, back = jax.vjp(lambda h: halves(weights, h), h)
    out, back_after = jax.vjp(lambda h: rest(weights, h), h)
    return *qkv, out, back(tuple(dqkv))[0] + back_after(dh)[0]


def _sums(subject, kind, weights, turns, blocks, signs):
    """The gradients of one layer's weights, summed over all tokens."""
    positions = jnp.asarray(subject.batch["positions"])

    def add(sums, block):
        b, t = block
        counts = (t >= 0).astype(jnp.float32)
        t = jnp.maximum(t, 0)
        h, o, dh, *dqkv = _inputs(subject, b, t, signs)
        halves, rest = _both(subject, kind, turns, h, o, dh, dqkv, positions[b, t])
        _, back = jax.vjp(lambda w: (*halves(w, h), rest(w, h)), weights)
        masked = [d * counts.reshape(-1, *[1] * (d.ndim - 1)) for d in (*dqkv, dh)]
        return jax.tree.map(jnp.add, sums, back(tuple(masked))[0]), None

    return lax.scan(add, jax.tree.map(jnp.zeros_like, weights), blocks)[0]
