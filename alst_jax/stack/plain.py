"""All layers, as JAX differentiates them: the reference twin of `stack/stack.py`, and the stack without
rematerialisation.

`lax.scan` over blocks under `jax.checkpoint`, with a policy that keeps each layer's input, on the device or in host
memory.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from alst_jax.models.block import Tokens
from alst_jax.ops.tiling import even_tile, tiled, token_rows
from alst_jax.profile import DEVICE, HOST, Profile
from alst_jax.stack.layer import Layer, Weights
from alst_jax.xla import host

INPUT = "layer input"


def plain_stack(layer: Layer, h: jax.Array, layers: Weights, tokens: Tokens, profile: Profile) -> jax.Array:
    """h[B, T, D] through all layers."""

    def one(h, layer_and_number):
        shards, number = layer_and_number
        h = checkpoint_name(h, INPUT)  # on the first line: there it names the carry, which is the residual
        weights = layer.load_differentiable(host.to_device(shards) if profile.offload_weights else shards)
        here = tokens.in_layer(number)
        return layer.by_kind(number)(lambda kind: apply_block(layer, kind, h, weights, here)), None

    if profile.remat:
        one = jax.checkpoint(one, policy=policy(profile))
    return lax.scan(one, h, (layers, jnp.arange(layer.model.num_layers)))[0]


def policy(profile: Profile):
    """The residual of a layer: its input."""
    if profile.offload_activations:
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT], offload_src=DEVICE, offload_dst=HOST
        )
    return jax.checkpoint_policies.save_only_these_names(INPUT)


def apply_block(layer: Layer, kind, h: jax.Array, weights: Weights, tokens: Tokens) -> jax.Array:
    """`Block.__call__`, with attention over the whole sequence and its two halves in tiles of tokens."""
    block, chunks = weights.block, layer.sequence.chunks
    tile = layer.tile and even_tile(h.shape[0] * h.shape[1], layer.tile)
    h_TD, rows = token_rows(h), tuple(map(token_rows, tokens.rows))
    drawn = tuple(map(token_rows, tokens.drawn))
    squares_of = lambda h, block, *drawn: block.mean_squares(h, *drawn)
    squares = tiled(squares_of, h_TD, block, *drawn, tile=tile) if layer.shares_squares else ()

    def project(i):
        part = block if chunks == 1 else block.heads(i, chunks)
        before = lambda h_and_squares, block, *rows: block.before(
            h_and_squares[0], Tokens.of_rows(*rows), kind, h_and_squares[1:]
        )
        qkv = tiled(before, (h_TD, *squares), part, *rows, tile=tile)
        return tuple(x.reshape(*h.shape[:2], *x.shape[1:]) for x in qkv)

    o, _ = layer.sequence.attend(project, layer.model.attention_spec(kind), h, tokens.documents)
    after = lambda h_and_o, block, *drawn: block.after(*h_and_o, *drawn)
    return tiled(after, (h_TD, token_rows(o)), block, *drawn, tile=tile).reshape(h.shape)
