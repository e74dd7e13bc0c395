"""Attention as the run computes it, all-to-alls, groups of heads and kernel included, against float32 blocks of rows.

The output and the gradient of queries are compared at sampled tokens, for all heads. The gradients of keys and values
at sampled tokens, for the first and the last kv head: they need the softmax of every query, computed a block of queries
at a time. Positions, borders of documents and windows are computed here, from the offsets alone.

B rows, S tokens, T local tokens, N query heads, K kv heads, G = N / K, H head dim, R sampled tokens, C queries of a
block."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from alst_jax.preflight import reference
from alst_jax.preflight.limits import Row, row
from alst_jax.preflight.subject import Subject
from alst_jax.preflight.values import STD, values
from alst_jax.stack.batch import DOCUMENTS_SPEC

Q, K, V, DO = 11, 12, 13, 14  # seeds
BLOCK = 2**26  # scores of a block of queries


def check_attention(subject: Subject) -> list[Row]:
    """Four rows for each kind of layer that differs in its attention."""
    specs = dict.fromkeys(subject.config.attention_spec(kind) for kind in subject.config.kinds)
    return [row for spec in specs for row in _check(subject, spec)]


def _check(subject, spec):
    o, dq, dk, dv = (np.asarray(x) for x in _run(subject, spec))
    groups = sorted({0, subject.config.num_kv_heads - 1})
    heads = subject.config.num_heads // subject.config.num_kv_heads
    queries, keys = functools.partial(_of_queries, subject, spec), functools.partial(_of_keys, subject, spec)
    queries, keys = reference.independent(queries), reference.independent(keys)
    errors = {"output": [], "dq": [], "dk": [], "dv": []}
    for b in np.unique(subject.sampled.b):
        here = subject.sampled.b == b
        t = subject.sampled.t[here]
        for n in range(subject.config.num_kv_heads):
            of_group = slice(n * heads, (n + 1) * heads)
            for name, mine, (theirs, size) in zip(errors, (o, dq), queries(b, n, t)):
                errors[name].append(_error(mine[here][:, of_group], theirs, size))
            if n in groups and b == subject.rows - 1:
                for name, mine, (theirs, size) in zip(("dk", "dv"), (dk, dv), keys(b, n, t)):
                    errors[name].append(_error(mine[here][:, n], theirs, size))
    window = f", window {spec.window}" if spec.window else ""
    repeats = math.ceil(math.log2(max(1, subject.mesh.shape["seq"] // subject.config.num_kv_heads) + 1))
    roundings = {"output": 2, "dq": 4, "dk": 4 + repeats, "dv": 3 + repeats}
    return [
        row(f"attention{window}: {name}", max(found), subject.dtype, roundings[name], subject.length)
        for name, found in errors.items()
    ]


def _error(mine, theirs, size):
    """The largest error of a vector, relative to its norm or, where terms cancel, to the root of the sum of their
    squares."""
    theirs, size = np.asarray(theirs, np.float64), np.asarray(size, np.float64)
    wide = np.maximum(np.linalg.norm(theirs, axis=-1), np.linalg.norm(size, axis=-1))
    return np.max(np.linalg.norm(mine - theirs, axis=-1) / np.maximum(wide, 1e-30))


def _loudness(subject, spec):
    """A power of two for queries, so that scores have a standard deviation of about one."""
    scale = subject.config.head_dim**-0.5 if spec.scale is None else spec.scale
    return 2.0 ** round(-math.log2(scale * math.sqrt(subject.config.head_dim) * STD**2))


# ------------------------------------------------------------------------------------------------------------ the run's


def _run(subject, spec):
    """o and dq[R, N, H], dk and dv[R, K, H] at the sampled tokens."""
    model, sequence, loud = subject.config, subject.model.layer.sequence, _loudness(subject, spec)
    dtype, size = subject.dtype, jnp.arange(model.head_dim)

    def local(documents):
        b, t = subject.indices()
        documents = None if documents is None else documents[0]

        def project(i):
            chunks = sequence.chunks
            n, kv = model.num_heads // chunks, max(1, model.num_kv_heads // chunks)
            heads, kv_heads = i * n + jnp.arange(n), i * model.num_kv_heads // chunks + jnp.arange(kv)
            q = values(Q, b, t, heads, size) * loud
            return tuple(x.astype(dtype) for x in (q, values(K, b, t, kv_heads, size), values(V, b, t, kv_heads, size)))

        do = values(DO, b, t, jnp.arange(model.num_heads), size).astype(dtype)
        results = sequence.attend(project, spec, do, documents)
        o = subject.pick(results[0])
        return o, *map(subject.pick, sequence.attend_backward(project, spec, results, do, documents))

    return subject.on_mesh(local, (DOCUMENTS_SPEC,), P())(subject.offsets)


# ------------------------------------------------------------------------------------------------------ the independent


def _inputs(subject, spec, b, n):
    """The heads of kv head n, and functions of tokens t: q and do[t, G, H], k and v[t, H]."""
    model = subject.config
    heads = n * (model.num_heads // model.num_kv_heads) + jnp.arange(model.num_heads // model.num_kv_heads)
    size, row = jnp.arange(model.head_dim), jnp.reshape(b, (1,))
    of_heads = lambda seed, t: values(seed, row, t, heads, size)[0]
    of_kv = lambda seed, t: values(seed, row, t, jnp.reshape(n, (1,)), size)[0, :, 0]
    return (
        lambda t: of_heads(Q, t) * _loudness(subject, spec),
        lambda t: of_heads(DO, t),
        lambda t: of_kv(K, t),
        lambda t: of_kv(V, t),
    )


def _softmax(q, k, t, s, start, spec):
    scores, slope = reference.scores(q, k, t, s, start, spec)
    p = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return p / jnp.sum(p, axis=-1, keepdims=True), slope


def _delta(do, o):
    """(do . o, its size with the size of its terms), [..., 1] each."""
    terms = do * o
    delta = jnp.sum(terms, axis=-1, keepdims=True)
    return delta, jnp.abs(delta) + jnp.sqrt(jnp.sum(terms * terms, axis=-1, keepdims=True))


def _scale(subject, spec):
    return subject.config.head_dim**-0.5 if spec.scale is None else spec.scale


def _of_queries(subject, spec, b, n, t):
    """(o, its size), (dq, its size), each [R, G, H], of the queries at t[R] of row b that read kv head n."""
    q, do, k, v = _inputs(subject, spec, b, n)
    s = jnp.arange(subject.length)
    q, do, k, v = q(t), do(t), k(s), v(s)
    p, slope = _softmax(q, k, t, s, jnp.asarray(subject.starts)[b, t], spec)
    o = jnp.einsum("tgs,sh->tgh", p, v)
    dp, (delta, wide) = jnp.einsum("tgh,sh->tgs", do, v), _delta(do, o)
    back = lambda weights, keys: _scale(subject, spec) * jnp.einsum("tgs,sh->tgh", weights, keys)
    sizes = jnp.sqrt(jnp.einsum("tgs,sh->tgh", p * p, v * v)), p * slope * (jnp.abs(dp) + wide)
    dq_size = _scale(subject, spec) * jnp.sqrt(jnp.einsum("tgs,sh->tgh", sizes[1] ** 2, k * k))
    return (o, sizes[0]), (back(p * slope * (dp - delta), k), dq_size)


def _of_keys(subject, spec, b, n, at):
    """(dk, its size), (dv, its size), each [R, H], of the keys of kv head n at at[R] of row b."""
    q_of, do_of, k, v = _inputs(subject, spec, b, n)
    length, group = subject.length, subject.config.num_heads // subject.config.num_kv_heads
    block = max(1, min(length, BLOCK // (length * group)))
    s, scale, starts = jnp.arange(length), _scale(subject, spec), jnp.asarray(subject.starts)[b]
    k, v = k(s), v(s)

    def add(i, sums):
        t = i * block + jnp.arange(block)
        counts, t = t < length, jnp.minimum(t, length - 1)
        q, do = q_of(t), do_of(t) * counts[:, None, None]
        p, slope = _softmax(q, k, t, s, starts[t], spec)
        delta, wide = _delta(do, jnp.einsum("tgs,sh->tgh", p, v))
        p, slope = p[..., at] * counts[:, None, None], slope[..., at]
        dp = jnp.einsum("tgh,sh->tgs", do, v[at])
        size = p * slope * (jnp.abs(dp) + wide) * scale
        parts = (
            jnp.einsum("tgs,tgh->sh", p * slope * (dp - delta) * scale, q),
            jnp.einsum("tgs,tgh->sh", size**2, q * q),
            jnp.einsum("tgs,tgh->sh", p, do),
            jnp.einsum("tgs,tgh->sh", p * p, do * do),
        )
        return tuple(x + part for x, part in zip(sums, parts))

    zeros = jnp.zeros((len(at), subject.config.head_dim))
    dk, dk_size, dv, dv_size = lax.fori_loop(0, -(-length // block), add, (zeros,) * 4)
    return (dk, jnp.sqrt(dk_size)), (dv, jnp.sqrt(dv_size))
