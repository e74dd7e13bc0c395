"""The scan over layers: what its backward pass finds kept, where, and how it makes the rest again.

Written out as forward and backward rules of a segment of layers rather than left to `jax.checkpoint`, because the order
matters at length: loops inside loops keep one layer's intermediates alive at a time, which a compiler that sees all
layers of a segment at once does not.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from alst_jax.memory import host
from alst_jax.memory.profile import Profile

PyTree = Any


def scan_layers(layer: Callable, h: jax.Array, layers: PyTree, rope: PyTree, profile: Profile) -> jax.Array:
    """h through all layers.

    layer(h, weights, rope, kept) -> (h, attention) is one of them; `attention` are its attention output and statistics,
    and where they are handed in again as `kept`, attention is not run. layers: weights stacked on dim 0, on the device or
    in host memory; rope gets no gradient.

    The layers are cut into segments of `profile.segment_layers`. The scan keeps each segment's input (on the device or,
    offloaded, in host memory) and the attention of as many of its layers as the profile says. Its backward pass rebuilds
    the inputs of a segment's layers one after the other (matrix products alone, where attention was kept), then goes back
    through one layer at a time.
    """
    fetch = host.to_device if profile.offload_weights else lambda tree: tree
    if not profile.remat:
        return lax.scan(lambda h, w: (layer(h, fetch(w), rope, None)[0], None), h, layers)[0]
    segment = functools.partial(_segment, layer, profile)
    layers = jax.tree.map(lambda w: w.reshape(-1, profile.segment_layers, *w.shape[1:]), layers)
    return lax.scan(lambda h, w: (segment(h, w, rope), None), h, layers)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _segment(layer, profile, h, layers, rope):
    return _segment_fwd(layer, profile, h, layers, rope)[0]


def _runs(profile: Profile) -> list[tuple[str | None, int, int]]:
    """(where attention is kept, first layer, last layer + 1) of the runs of like layers in a segment.

    Kept ones come first: the last layer's output is not needed to rebuild the input of a next one.
    """
    on_device = profile.keep_attention_on_device
    on_host = on_device + profile.keep_attention_on_host
    runs = [(host.DEVICE, 0, on_device), (host.HOST, on_device, on_host), (None, on_host, profile.segment_layers)]
    return [run for run in runs if run[1] < run[2]]


def _segment_fwd(layer, profile, h, layers, rope):
    weights, kept = _load(layers, profile.offload_weights), []
    first_input = h
    for place, start, stop in _runs(profile):

        def forward(h, w, place=place):
            h, attention = layer(h, w, rope, None)
            return h, None if place is None else attention

        h, attention = lax.scan(forward, h, _cut(weights, start, stop))
        kept.append(_store(attention, place == host.HOST))
    return h, (_store(first_input, profile.offload_activations), layers, rope, kept)


def _segment_bwd(layer, profile, residuals, dh):
    first_input, layers, rope, kept = residuals
    weights = _load(layers, profile.offload_weights)
    h = _load(first_input, profile.offload_activations)

    # Weights, input and attention of each layer; the last one's input is what comes out of the loops.
    rebuilt, last = [], profile.segment_layers - 1
    kept = [_load(attention, place == host.HOST) for (place, *_), attention in zip(_runs(profile), kept)]  # None: not kept
    for (place, start, stop), attention in zip(_runs(profile), kept):
        stop = min(stop, last)
        if start == stop:
            continue

        def rebuild(h, w_and_kept):
            w, kept = w_and_kept
            out, made = layer(h, w, rope, kept)
            return out, (h, made if kept is None else None)

        run, old = _cut(weights, start, stop), _cut(attention, 0, stop - start)
        h, (inputs, made) = lax.scan(rebuild, h, (run, old))
        rebuilt.append((run, inputs, made if place is None else old))

    def backward(dh, w_h_kept):
        w, h, kept = w_h_kept
        _, pullback = jax.vjp(lambda h, w: layer(h, w, rope, kept)[0], h, w)
        dh, dw = pullback(dh)
        return dh, dw

    only = lambda tree: jax.tree.map(lambda x: x.squeeze(0), tree)
    dh, dlast = backward(dh, (only(_cut(weights, last, last + 1)), h, only(_cut(kept[-1], -1, None))))
    dweights = [jax.tree.map(lambda g: g[None], dlast)]
    for run in reversed(rebuilt):
        dh, drun = lax.scan(backward, dh, run, reverse=True)
        dweights.insert(0, drun)
    dweights = jax.tree.map(lambda *runs: lax.concatenate(runs, 0), *dweights)
    return dh, _store(dweights, profile.offload_weights), None


_segment.defvjp(_segment_fwd, _segment_bwd)


def _cut(tree: PyTree, start: int, stop: int | None) -> PyTree:
    return jax.tree.map(lambda x: lax.slice_in_dim(x, start, stop, axis=0), tree)


def _load(tree: PyTree, on_host: bool) -> PyTree:
    return host.to_device(tree) if on_host else tree


def _store(tree: PyTree, on_host: bool) -> PyTree:
    return host.to_host(tree) if on_host else tree
