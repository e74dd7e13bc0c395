"""The stack of layers: what its backward pass finds kept, where, and how it makes the rest again.

Written out as forward and backward rules rather than left to `jax.checkpoint`, because the order matters at length: loops
keep one layer's intermediates alive at a time, which a compiler that sees several layers at once does not, and what is
kept is freed segment by segment.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from alst_jax.profile import Profile, Run, segment_inputs
from alst_jax.stack.layer import Layer
from alst_jax.xla import host
from alst_jax.xla.order import after, index_after, read_after, read_back, zeros_after
from alst_jax.xla.varying import vary_like

PyTree = Any


def scan_layers(
    layer: Layer, h: jax.Array, look_up: Callable, source: tuple[PyTree, jax.Array], layers: PyTree, rope: PyTree,
    profile: Profile,
) -> jax.Array:
    """h through all layers.

    look_up(*source) gives h again; source: (table, tokens). layers: their weights, as `layer.load` takes them, stacked on
    dim 0, on the device or in host memory, from where one layer at a time is brought to the device; their gradients go the
    same way back. source and rope get no gradient.

    Of each of `profile.segments` the input of the first layer (or of all) is kept, on the device or, offloaded, in host
    memory, and the attention outputs that the profile says. The backward pass rebuilds the other inputs of a segment one
    after the other (matrix products alone, where attention was kept), then goes back through one layer at a time. Where
    several layers make the first segment, its input is not kept: it is looked up again.
    """
    if not profile.remat:
        fetch = host.to_device if profile.offload_weights else lambda tree: tree
        return lax.scan(lambda h, w: (layer.plain(h, fetch(w), rope), None), h, layers)[0]
    return _stack(layer, profile, look_up, h, lax.stop_gradient(source), layers, rope)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _stack(layer, profile, look_up, h, source, layers, rope):
    weights = lambda i: layer.load(host.row(layers, i, profile.offload_weights))
    body = lambda h, i: (layer.forward(h, weights(i), rope)[0], None)
    return lax.scan(body, h, jnp.arange(_count(layers)))[0]


def _count(layers):
    return jax.tree.leaves(layers)[0].shape[0]


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass; segments: of each, inputs (or the row of `firsts`) and what
    is kept of attention, by run."""

    segments: list
    firsts: jax.Array | None
    source: PyTree
    layers: PyTree
    rope: PyTree


def forward(
    layer: Layer, profile: Profile, look_up: Callable, h: jax.Array, source: PyTree, layers: PyTree, rope: PyTree
) -> tuple[jax.Array, Saved]:
    """h[B, T, D] through all layers, and what `backward` needs. Arguments as those of `scan_layers`."""
    residuals, segments = [], profile.segments(_count(layers))
    number, firsts = 0, None
    if rows := segment_inputs(segments, profile.offload_activations):
        firsts = _store(zeros_after(h, (rows, *h.shape), h.dtype), profile.offload_activations)
    for segment in segments:
        inputs, kept = None, []
        if not segment.all_inputs and segment is not segments[0]:
            at = index_after(h, number)
            firsts = host.put_row(firsts, h, at, profile.offload_activations)
            h = after(read_back(firsts, at, profile.offload_activations), h)
            inputs, number = number, number + 1
        for run in segment.runs:

            def one(h, i, segment=segment, run=run):
                out, attention = layer.forward(h, layer.load(host.row(layers, i, profile.offload_weights)), rope)
                return out, (_store(h, profile.offload_activations) if segment.all_inputs else None,
                             _store(attention, run.place == host.HOST) if run.place else None)

            h, (all_inputs, attention) = lax.scan(one, h, jnp.arange(run.start, run.stop))
            kept.append(attention)
        residuals.append((all_inputs if segment.all_inputs else inputs, kept))
    return h, Saved(residuals, firsts, source, layers, rope)


def _stack_bwd(layer, profile, look_up, saved, dh):
    layers = saved.layers
    # Loops write into these, one layer at a time; in host memory they are not even cleared first.
    zeros = jax.tree.map(lambda w: vary_like(jnp.zeros(w.shape, w.dtype), w), layers)
    read = lambda _, i: host.row(layers, i, profile.offload_weights)
    write = lambda dlayers, i, shards, gradients: host.put_row(dlayers, gradients, i, profile.offload_weights)
    dh, dlayers = backward(layer, profile, look_up, saved, dh, _store(zeros, profile.offload_weights), read, write)
    return dh, None, dlayers, None


_stack.defvjp(forward, _stack_bwd)


def backward(
    layer: Layer, profile: Profile, look_up: Callable, saved: Saved, dh: jax.Array, store: PyTree, read: Callable,
    write: Callable,
) -> tuple[jax.Array, PyTree]:
    """Back through the stack: the gradient of its input h[B, T, D] from that of its output, and what became of `store`.

    store: what the loops carry from layer to layer, last to first. read(store, i) -> the weights of layer i;
    write(store, i, weights, gradients) -> the store, with what the layer's gradients are for.
    """
    rope = saved.rope

    def back_one(carry, i, h, attention):
        dh, store = carry
        shards = read_after(dh, functools.partial(read, store), i)
        weights = layer.load(shards)
        if attention is None:
            attention = layer.attend(h, weights, rope)
        dh, dweights = layer.backward(h, weights, rope, attention, dh)
        gradients = layer.scatter(dweights, shards)
        # Outside of a loop, the float32 sums of many layers would wait all together (on GPUs; not seen on a CPU).
        return after(gradients, dh), write(store, i, shards, gradients)

    def back_run(carry, run, inputs, inputs_on_host, attention, attention_on_host):
        """Back through the layers of a run, whose inputs and attention outputs (or None) are stacked."""
        def body(carry, i):
            row = index_after(carry[0], i - run.start)
            h = host.row(inputs, row, inputs_on_host)
            return back_one(carry, i, h, host.row(attention, row, attention_on_host)), None

        return lax.scan(body, carry, jnp.arange(run.start, run.stop), reverse=True)[0]

    # Rows are not known before the gradient is there: where no loop goes over layers (one of a single trip is none), all
    # weights would be gathered at once, and what is kept in host memory would never go there.
    carry = dh, store
    segments = profile.segments(_count(saved.layers))
    for segment, (inputs, kept) in reversed(list(zip(segments, saved.segments, strict=True))):
        if segment.all_inputs:
            (run,) = segment.runs
            carry = back_run(carry, run, inputs, profile.offload_activations, kept[0], run.place == host.HOST)
            continue
        (dh, store), last, rebuilt = carry, segment.runs[-1].stop - 1, []
        if segment is segments[0]:
            table, tokens = saved.source
            h = look_up(table, after(dh, tokens))
        else:
            h = host.row(saved.firsts, index_after(dh, inputs), profile.offload_activations)
        for run, attention in zip(segment.runs, kept, strict=True):

            def rebuild(carry, i, run=run, attention=attention, store=store, dh=dh):
                h, stacks = carry
                old = host.row(attention, index_after(dh, i - run.start), run.place == host.HOST)
                weights = layer.load(read_after(dh, functools.partial(read, store), i))
                out, made = layer.forward(h, weights, rope, old)
                return (out, host.put_row(stacks, (h, made if old is None else None), i - run.start, False)), None

            if run.start < last:
                stop = min(run.stop, last)
                attend = lambda h, store=store: layer.attend(h, layer.load(read(store, 0)), rope)
                made = None if run.place else jax.eval_shape(attend, h)
                stack = lambda x: zeros_after(dh, (stop - run.start, *x.shape), x.dtype, h)
                stacks = jax.tree.map(stack, (h, made))
                (h, stacks), _ = lax.scan(rebuild, (h, stacks), jnp.arange(run.start, stop))
                rebuilt.append((Run(run.start, stop, run.place), stacks[0], attention if run.place else stacks[1]))
        # The last layer's output is needed by nobody, so its attention was not made again; its input is in h.
        run, attention = segment.runs[-1], kept[-1]
        carry = back_one(carry, jnp.int32(last), h, host.row(attention, last - run.start, run.place == host.HOST))
        for run, all_inputs, attention in reversed(rebuilt):
            carry = back_run(carry, run, all_inputs, False, attention, run.place == host.HOST)
    return carry


def _store(tree: PyTree, on_host: bool) -> PyTree:
    return host.to_host(tree) if on_host else tree
