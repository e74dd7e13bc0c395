"""Collectives, which move numbers or add them: all-to-alls with the run's groups of heads, gather and reduce-scatter
with the run's shards. Each device checks its part of the result against its own indices."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alst_jax.parallel.mesh import AXES, DATA, SEQ
from alst_jax.parallel.sharding import drop_layer_dim, is_spec, sharded_dim
from alst_jax.parallel.ulysses import qkv_to_heads, to_tokens
from alst_jax.preflight.limits import Row, exact, unit
from alst_jax.preflight.subject import Subject
from alst_jax.preflight.values import values
from alst_jax.stack.layer import Weights

Q, K, V, W, G = range(41, 46)  # seeds


def check_collectives(subject: Subject) -> list[Row]:
    moved, back = subject.on_mesh(functools.partial(_all_to_all, subject), (), P())()
    gathered, scattered = _gather_scatter(subject)
    reduce = subject.step.profile.reduce_dtype
    # Sums of numbers of 8 bits are exact in float32.
    limit = subject.mesh.size * unit("bfloat16") * 2 * subject.mesh.size if reduce == "bfloat16" else 0.0
    return [
        exact("all-to-all to heads, elements that differ", moved),
        exact("all-to-all to tokens, elements that differ", back),
        exact("gather of weights", gathered),
        Row("reduce-scatter of gradients", float(scattered), limit, f"numbers of 8 bits, summed in {reduce}"),
    ]


def _all_to_all(subject):
    """Elements that are not where they belong, after the way to heads and after the way back."""
    model, chunks, size = subject.config, subject.model.layer.sequence.chunks, jnp.arange(subject.config.head_dim)
    n, kv = model.num_heads // chunks, max(1, model.num_kv_heads // chunks)
    b, t = subject.indices()
    made = lambda seed, t, heads: values(seed, b, t, heads, size).astype(subject.dtype)
    given = made(Q, t, jnp.arange(n)), made(K, t, jnp.arange(kv)), made(V, t, jnp.arange(kv))
    q, k, v = qkv_to_heads(*given, SEQ)
    heads = lax.axis_index(SEQ) * q.shape[2] + jnp.arange(q.shape[2])
    of_query = heads // (n // kv)  # the kv head that each query head of this device reads
    every, a_kv = jnp.arange(subject.length), q.shape[2] // k.shape[2]
    differ = jnp.sum(q != made(Q, every, heads))
    for x, seed in ((k, K), (v, V)):
        differ += jnp.sum(x[:, :, jnp.arange(q.shape[2]) // a_kv] != made(seed, every, of_query))
    return lax.psum(differ, AXES), lax.psum(jnp.sum(to_tokens(q, SEQ) != given[0]), AXES)


def _gather_scatter(subject):
    """The largest differences of gathered weights, and of summed gradients."""
    layer, step = subject.model.layer, subject.few
    specs = jax.tree.map(drop_layer_dim, step.specs["layers"], is_leaf=is_spec)
    params = step.params["layers"]
    places = jax.tree.map(lambda spec: NamedSharding(subject.mesh, spec), specs, is_leaf=is_spec)
    make = lambda: jax.tree.map(lambda p: values(W, *map(jnp.arange, p.shape[1:])).astype(p.dtype), params)
    shards = jax.jit(make, out_shardings=places)()

    def local(shards):
        rank = lax.axis_index(DATA) * subject.mesh.shape[SEQ] + lax.axis_index(SEQ)
        whole = layer.load(Weights(shards, jax.tree.map(lambda _: None, shards))).trained
        wanted = jax.tree.map(lambda w: values(W, *map(jnp.arange, w.shape)), whole)
        gathered = _largest(whole, wanted)
        gradients = jax.tree.map(lambda w: values(G + rank, *map(jnp.arange, w.shape)), whole)
        sums = layer.scatter(gradients, jax.tree.map(lambda s: s.astype(jnp.float32), shards))
        theirs = jax.tree.map(lambda s, spec: _sum_of_ranks(subject, s.shape, spec, rank), sums, specs)
        return lax.pmax(gathered, AXES), lax.pmax(_largest(sums, theirs), AXES)

    return subject.on_mesh(local, (specs,), P())(shards)


def _sum_of_ranks(subject, shape, spec, rank):
    """This device's part of the sum of all devices' gradients."""
    axes = [jnp.arange(n) for n in shape]
    if (dim := sharded_dim(spec)) is not None:
        axes[dim] = rank * shape[dim] + axes[dim]
    return sum(values(G + other, *axes) for other in range(subject.mesh.size))


def _largest(a, b):
    differences = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))), a, b)
    return functools.reduce(jnp.maximum, jax.tree.leaves(differences))
