"""The step that updates each layer during the backward pass, as soon as its gradient is complete.

Gradients are never stored. They cannot be clipped by their global norm, which is known only at the end. Built from the
same parts as the loss (stack/) and the update (optim/streamed.py). Runs inside the shard_map, on local shards.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alst_jax.models.block import Params
from alst_jax.models.tree import combine, is_stacked
from alst_jax.ops.tiling import stream
from alst_jax.optim.adamw import AdamW
from alst_jax.optim.streamed import ParameterUpdate, join_updates, parameter_updates, square_sum
from alst_jax.stack.batch import Batch
from alst_jax.stack.ends import Model
from alst_jax.stack.layer import Weights
from alst_jax.xla import host, scopes


class Result(NamedTuple):
    """loss: scale x summed loss. norm: of all gradients. finite: whether all gradients were finite. layers: updated.
    Where a gradient is not finite, nothing is updated from there on: layers that the backward pass had reached before
    have been."""

    loss: jax.Array
    norm: jax.Array
    finite: jax.Array
    layers: jax.Array
    params: Params
    state: dict[str, Any]


class Progress(NamedTuple):
    """Of the backward pass so far: the sum of the squares of its gradients, whether all were finite, and how many
    layers were updated."""

    square: jax.Array
    finite: jax.Array
    layers: jax.Array

    def after(self, gradients: list[jax.Array], layers: int) -> "Progress":
        square = self.square + sum(map(square_sum, gradients), jnp.float32(0))
        finite = self.finite & jnp.isfinite(square)
        return Progress(square, finite, self.layers + jnp.where(finite, layers, 0))


@dataclasses.dataclass(frozen=True, eq=False)
class LayerUpdates:
    """Updates of the stacked parameters. Their arrays, in `store`, are overwritten one layer at a time."""

    updates: list[ParameterUpdate]
    structure: Any  # of the trained layers
    frozen: Any
    on_host: tuple[bool, bool]

    def read(self, store: tuple, i: jax.Array | int) -> Weights:
        """The shards of layer i."""
        trained = self.structure.unflatten([host.row(arrays[0], i, self.on_host[0]) for arrays in store[0]])
        return Weights(trained, host.row(self.frozen, i, self.on_host[0]))

    @jax.named_scope(scopes.UPDATE)
    def write(self, store: tuple, i: jax.Array, shards: Any, gradients: Any) -> tuple:
        """The store with layer i stepped."""
        arrays, progress = store
        gradients = jax.tree.leaves(gradients)
        progress = progress.after(gradients, 1)
        result = []
        for update, written, gradient, old in zip(
            self.updates, arrays, gradients, jax.tree.leaves(shards), strict=True
        ):
            kept = host.row(written[1:], i, self.on_host[1])
            rows = jax.tree.map(lambda x: x[None], (old, *kept))
            new = update.step(i, rows, gradient[None].astype(update.wide))
            new = [jnp.where(progress.finite, x, was)[0] for x, was in zip(new, rows, strict=True)]
            result.append(
                (
                    host.put_row(written[0], new[0], i, self.on_host[0]),
                    *host.put_row(written[1:], tuple(new[1:]), i, self.on_host[1]),
                )
            )
        return result, progress


def update_in_backward(
    model: Model,
    optimizer: AdamW,
    trained_specs: Params,
    trained: Params,
    frozen: Params,
    state: dict[str, Any],
    batch: Batch,
    rates: tuple[jax.Array, jax.Array],
) -> Result:
    """One optimizer step. rates: (scale of the loss, learning rate)."""
    scale, learning_rate = rates
    table, head = _ends_of(model, trained)
    table, frozen_ends = model.on_device(table), model.on_device(model.ends(frozen))
    look_up = lambda t: model.embed(combine(t, frozen_ends["embed_tokens"])["embedding"], batch.tokens)
    h_BTD, back_to_embedding = jax.vjp(look_up, table)
    tokens, layers = model.tokens(batch), Weights(trained["layers"], frozen["layers"])
    source = combine(trained["embed_tokens"], frozen["embed_tokens"])["embedding"], batch.tokens
    h_BTD, saved = model.stack.forward(h_BTD, source, layers, tokens)
    loss_of = lambda h, head: model.head_loss(h, combine(head, {n: frozen_ends[n] for n in head}), batch.labels, scale)
    loss, back_to_layers = jax.vjp(loss_of, h_BTD, model.on_device(head))
    dh_BTD, dhead = back_to_layers(jnp.ones_like(loss))

    updates = parameter_updates(optimizer, trained, state, trained_specs, learning_rate)
    on_host = (model.profile.offload_weights, model.profile.offload_optimizer)
    of_layers = [update for update in updates if is_stacked(update.path)]
    # A tied table's gradient counts when it is whole; that its first part is finite must be known now.
    tied = model.config.tie_word_embeddings
    dnorm, dtables = jax.tree.leaves(dhead["norm"]), jax.tree.leaves([dhead[n] for n in dhead if n != "norm"])
    finite = jnp.isfinite(loss) & jnp.isfinite(sum(map(square_sum, dtables), jnp.float32(0)))
    progress = Progress(jnp.float32(0), finite, jnp.int32(0)).after(dnorm if tied else dnorm + dtables, 0)
    loops = LayerUpdates(of_layers, jax.tree.structure(trained["layers"]), frozen["layers"], on_host)
    store = [update.written for update in of_layers], progress
    dh_BTD, (layers_written, progress) = model.stack.backward(saved, dh_BTD, store, loops.read, loops.write)

    (dtable,) = back_to_embedding(dh_BTD)
    if tied:
        dtable = jax.tree.map(jnp.add, dtable, dhead.pop("embed_tokens"))
    progress = progress.after(jax.tree.leaves(dtable), 0)
    gradients = iter(jax.tree.leaves({"embed_tokens": dtable, **dhead}))
    layers_written = iter(layers_written)
    result_of = lambda update: (
        next(layers_written) if is_stacked(update.path) else _step_end(update, next(gradients), progress, on_host)
    )
    results = list(map(result_of, updates))
    params, new_state = join_updates(trained, state, updates, results)
    new_state["count"] = jnp.where(progress.finite, new_state["count"], state["count"])
    return Result(loss, jnp.sqrt(progress.square), progress.finite, progress.layers, params, new_state)


def _ends_of(model, trained):
    """The trained parameters outside of the layers: (the embedding, the parameters that the loss reads)."""
    ends = model.ends(trained)
    head = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    return ends["embed_tokens"], {name: ends[name] for name in ("norm", head)}


@jax.named_scope(scopes.UPDATE)
def _step_end(update, gradient, progress, on_host):
    """`update.written` of a parameter outside of the layers, stepped where all gradients are finite."""

    def step(chunk, written, read):
        new = update.step(chunk, written, read[0].astype(update.wide))
        return chunk + 1, tuple(jnp.where(progress.finite, x, was) for x, was in zip(new, written, strict=True))

    rows = host.chunk_rows(update.param.shape, False)
    places = (on_host[0],) + (on_host[1],) * len(update.stored) + (False,)
    return stream(step, jnp.int32(0), written=update.written, read=(gradient,), rows=rows, on_host=places)[1]
