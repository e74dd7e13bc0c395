"""All layers: which residuals are saved, where, and how the backward pass recomputes the others.

The forward and backward rules are written by hand, because the order of operations decides the peak memory. In a loop
over layers, one layer's intermediates are alive at a time; a compiler that sees several layers at once keeps more of
them. Saved residuals are freed segment by segment. `stack/plain.py` computes the same with `jax.checkpoint`, in twenty
lines.

B batch, T local tokens, D hidden.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from alst_jax.models.block import Tokens
from alst_jax.profile import HOST, Profile
from alst_jax.segments import segment_inputs
from alst_jax.stack.kept import Kept, places
from alst_jax.stack.layer import Layer, Weights
from alst_jax.stack.rows import over_rows
from alst_jax.stack.shared import SharedRows
from alst_jax.xla import host
from alst_jax.xla.order import after, index_after, read_after, read_back, zeros_after
from alst_jax.xla.varying import vary_like

PyTree = Any


class Saved(NamedTuple):
    """The residuals that the forward pass saves. segments: for each segment, its inputs (or their row in `firsts`)
    and, for each run of layers, the results of attention and the `Kept` arrays. stacks: the gradient stacks, if inputs
    of segments are stored in them; else None."""

    segments: list
    firsts: jax.Array | None
    stacks: PyTree
    source: PyTree
    layers: Weights
    tokens: Tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """The layers of a model under a memory profile, without their weights.

    embed(*source) -> h[B, T, D], the input of the first layer; source: (embedding's shards, token numbers). layers: the
    weights, stacked on dim 0, on the device or in host memory, from where one layer at a time is copied to the device;
    their gradients go the same way back.

    Each of `profile.segments` saves the input of its first layer (or of all its layers), on the device or, offloaded,
    in host memory, and the attention outputs, q, k, v, gate and up that the profile names. The backward pass recomputes
    the other inputs of a segment one after the other (matrix products alone, where attention was saved), then goes back
    through one layer at a time. Where several layers make the first segment, its input is not saved: `embed` recomputes
    it.
    """

    layer: Layer
    profile: Profile
    embed: Callable

    def forward(self, h: jax.Array, source: PyTree, layers: Weights, tokens: Tokens) -> tuple[jax.Array, Saved]:
        """h[B, T, D] through all layers, and the residuals for `backward`."""
        offload, residuals, segments = self.profile.offload_activations, [], self.profile.segments(_count(layers))
        number, firsts, shared = 0, None, self.shared(h, layers)
        stacks = self.places(layers) if shared else None
        if rows := segment_inputs(segments, offload, len(shared.first) if shared else 0):
            firsts = _place(zeros_after(h, (rows, *h.shape), h.dtype), offload)
        for n, segment in enumerate(segments):
            inputs, saved = None, []
            if shared and n in shared.first:
                stacks, h = shared.put(stacks, h, n)
            elif not segment.all_inputs and n:
                at = index_after(h, number)
                firsts = host.put_row(firsts, h, at, offload)
                h = after(read_back(firsts, at, offload), h)
                inputs, number = number, number + 1
            for run in segment.runs:

                def one(carry, i, segment=segment, run=run):
                    (h, gated), weights = carry, self.layer.load(self._shards(layers, i))
                    out, gated, results, qkv = self._forward_one(run, i, h, weights, tokens.in_layer(i), gated)
                    return (out, gated), (
                        _place(h, offload) if segment.all_inputs else None,
                        _place(results, run.place == HOST) if run.place else None,
                        qkv,
                    )

                carry = h, places(run, h, self.layer.model.intermediate_size)
                (h, gated), (all_inputs, results, qkv) = lax.scan(one, carry, jnp.arange(run.start, run.stop))
                saved.append((results, Kept(qkv, gated)))
            residuals.append((all_inputs if segment.all_inputs else inputs, saved))
        return h, Saved(residuals, firsts, stacks, source, layers, tokens)

    def backward(
        self, saved: Saved, dh: jax.Array, store: PyTree, read: Callable, write: Callable, wide: bool = False
    ) -> tuple[jax.Array, PyTree]:
        """The gradient of h[B, T, D] before the first layer from the gradient after the last, and the last `store`.

        store: the carry of the loop over layers, last to first: gradient stacks, or weights and moments when the update
        runs in the backward pass. read(store, i) -> shards of layer i. write(store, i, shards, gradients) -> the store.
        wide: gradients are written in float32, not in the weights' dtype.
        """
        # Row indices depend on dh: where no loop goes over layers (a loop of one trip is none), all weights would be
        # gathered at once, and residuals for the host would never be copied there.
        back, carry = BackwardLoop(self, saved, read, write, wide), (dh, store)
        segments = self.profile.segments(_count(saved.layers))
        for n, (segment, (inputs, results)) in reversed(list(enumerate(zip(segments, saved.segments, strict=True)))):
            if segment.all_inputs:
                (run,) = segment.runs
                carry = back.run(carry, run, inputs, self.profile.offload_activations, *results[0])
                continue
            carry, h = back.first_input(carry, n, inputs)
            h, rebuilt = back.rebuild(carry, segment, h, results)
            # The last layer's output is not needed, so its attention was not recomputed; its input is h.
            run, last = segment.runs[-1], segment.runs[-1].stop - 1
            (made, kept), row = results[-1], last - run.start
            carry = back.one(carry, jnp.int32(last), h, host.row(made, row, run.place == HOST), kept._replace(row=row))
            for run, all_inputs, run_results, kept in reversed(rebuilt):
                if run_results is None:  # in a run of one layer, XLA would keep the zeros of o from `rebuild` to here
                    all_inputs = after(carry[0], all_inputs)
                carry = back.run(carry, run, all_inputs, False, run_results, kept)
        return carry

    def _forward_one(self, run, i, h, weights, tokens, gated):
        """(the next h, the stacks of gate and up, the results of attention, q, k and v where the run keeps them)"""
        results, qkv = (self.layer.attend_keeping if run.qkv else lambda *layer: (self.layer.attend(*layer), None))(
            i, h, weights, tokens
        )
        if not run.mlp:
            return self.layer.after(h, results[0], weights, tokens), None, results, qkv
        out, gated = self.layer.after_keeping(h, results[0], weights, tokens, Kept(None, gated, i - run.start))
        return out, gated, results, qkv

    def shared(self, h: jax.Array, layers: Weights) -> SharedRows | None:
        """Where inputs of segments are kept in the memory of gradients; None: nowhere."""
        if not self.profile.share_gradients:
            return None
        rows = SharedRows.of(self.profile.segments(_count(layers)), h, layers.trained)
        return rows if rows.first else None

    def places(self, layers: Weights) -> PyTree:
        """Stacks for the gradients of the layers, which loops write one layer at a time. Stacks in host memory are not
        cleared."""
        zeros = jax.tree.map(lambda w: vary_like(jnp.zeros(w.shape, w.dtype), w), layers.trained)
        return _place(zeros, self.profile.offload_weights)

    def _shards(self, layers, i):
        return host.row(layers, i, self.profile.offload_weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_stack(
    stack: Stack, h: jax.Array, source: PyTree, layers: Weights, tokens: Tokens, sums: PyTree = None
) -> jax.Array:
    """h[B, T, D] through all layers, differentiable in h and the trained weights.

    sums: float32 stacks of gradients of earlier batches. With them the weights have no gradient; the "gradient" of
    `sums` is the sums with this batch's gradients added, in the same memory.
    """

    def body(h, i):
        weights = stack.layer.load(stack._shards(layers, i))
        here = tokens.in_layer(i)
        return stack.layer.after(h, stack.layer.attend(i, h, weights, here)[0], weights, here), None

    return lax.scan(body, h, jnp.arange(_count(layers)))[0]


def _stack_fwd(stack, h, source, layers, tokens, sums):
    h, saved = stack.forward(h, source, layers, tokens)
    return h, (saved, sums)


def _stack_bwd(stack, residuals, dh):
    (saved, sums), offload = residuals, stack.profile.offload_weights
    layers = saved.layers
    read = lambda _, i: stack._shards(layers, i)
    write = lambda dlayers, i, shards, gradients: host.put_row(dlayers, gradients, i, offload)
    if sums is not None:
        dh, sums = stack.backward(saved, dh, sums, read, _add_to_row(offload), wide=True)
        return dh, None, None, None, sums
    stacks = stack.places(layers) if saved.stacks is None else saved.stacks
    dh, dlayers = stack.backward(saved, dh, stacks, read, write)
    return dh, None, Weights(dlayers, None), None, None


def _add_to_row(offload):
    def write(sums, i, shards, gradients):
        added = jax.tree.map(lambda s, g: s + g.astype(s.dtype), host.row(sums, i, offload), gradients)
        return host.put_row(sums, added, i, offload)

    return write


run_stack.defvjp(_stack_fwd, _stack_bwd)


@dataclasses.dataclass(frozen=True, eq=False)
class BackwardLoop:
    """The loops of `Stack.backward`. carry: (dh, store)."""

    stack: Stack
    saved: Saved
    read: Callable
    write: Callable
    wide: bool = False  # gradients are written in float32

    def one(self, carry, i, h, results, kept):
        """Back through layer i, from its input, the results of its attention (None: they are recomputed) and its kept
        arrays."""
        layer, tokens, (dh, store) = self.stack.layer, self.saved.tokens.in_layer(i), carry
        shards = read_after(dh, functools.partial(self.read, store), i)
        weights = layer.load(shards)
        if results is None:
            results = layer.attend(i, h, weights, tokens)
        dh, dweights = layer.backward(i, h, weights, tokens, results, dh, kept)
        gradients = layer.scatter(dweights, shards.trained, self.wide)
        # Outside of a loop, the float32 sums of many layers would wait all together (on GPUs; not seen on a CPU).
        return after(gradients, dh), self.write(store, i, shards.trained, gradients)

    def run(self, carry, run, inputs, inputs_on_host, results, kept):
        """Back through the layers of a run, whose inputs, attention results (or None) and kept arrays are stacked."""

        def body(carry, row, read):
            h, results = read
            return self.one(carry, run.start + row, h, results, kept._replace(row=index_after(carry[0], row)))

        on_host = inputs_on_host, results is not None and run.place == HOST
        return self._over_rows(body, carry, range(run.layers)[::-1], (inputs, results), on_host, lambda carry: carry[0])

    def rebuild(self, carry, segment, h, results):
        """(the input of a segment's last layer, [(run, inputs, attention results, kept arrays) of the layers before]),
        from the segment's input h"""
        (dh, store), layer, tokens = carry, self.stack.layer, self.saved.tokens
        last, rebuilt = segment.runs[-1].stop - 1, []
        hold = lambda run: not (run.place or self.stack.profile.rebuild_inputs_alone)
        for run, (saved, kept) in zip(segment.runs, results, strict=True):
            if run.start >= last:
                continue

            def one(carry, row, read, run=run, kept=kept):
                (h, stacks), (made,), i = carry, read, run.start + row
                weights = layer.load(read_after(dh, functools.partial(self.read, store), i))
                here = tokens.in_layer(i)
                if not run.place:
                    made = layer.attend(i, h, weights, here)
                out = layer.after(h, made[0], weights, here, kept._replace(row=index_after(dh, row)))
                return out, host.put_row(stacks, (h, made if hold(run) else None), row, False)

            stop = min(run.stop, last)
            attend = lambda h, run=run: layer.attend(run.start, h, layer.load(self.read(store, 0)), tokens)
            made = jax.eval_shape(attend, h) if hold(run) else None
            stacks = jax.tree.map(lambda x: zeros_after(dh, (stop - run.start, *x.shape), x.dtype, h), (h, made))
            kept_here = (saved,) if run.place else (None,)
            on_host, rows = (run.place == HOST,), range(stop - run.start)
            h, stacks = self._over_rows(one, (h, stacks), rows, kept_here, on_host, lambda _: dh)
            rebuilt.append((dataclasses.replace(run, stop=stop), stacks[0], saved if run.place else stacks[1], kept))
        return h, rebuilt

    def first_input(self, carry, segment, row):
        """(carry, the input of a segment): from the memory of gradients, from its row among the saved inputs, or
        embedded again (the first segment)."""
        dh, store = carry
        shared = self.stack.shared(dh, self.saved.layers)
        if shared and segment in shared.first:
            store, h = shared.take(store, dh, segment)
            return (dh, store), h
        if row is None:
            table, numbers = self.saved.source
            return carry, self.stack.embed(table, after(dh, numbers))
        return carry, host.row(self.saved.firsts, index_after(dh, row), self.stack.profile.offload_activations)

    def _over_rows(self, *args):
        return over_rows(*args, self.stack.profile.prefetch_activations)


def _count(layers):
    return jax.tree.leaves(layers)[0].shape[0]


def _place(tree: PyTree, on_host: bool) -> PyTree:
    return host.to_host(tree) if on_host else tree
