"""The two ends of a model, embedding and loss, and the local loss that puts all parts together.

Everything here runs inside the shard_map, on local arrays. B batch, T local tokens, D hidden, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alst_jax.models.block import Params, Tokens
from alst_jax.models.config import ModelConfig
from alst_jax.models.tiles import tile_sizes
from alst_jax.models.tree import combine
from alst_jax.ops.cross_entropy import LogitScaling, TokenLosses, cross_entropy, tiled_cross_entropy, token_losses
from alst_jax.ops.linear import embed
from alst_jax.parallel.mesh import AXES, SEQ
from alst_jax.parallel.sharding import drop_layer_dim, gather, is_spec
from alst_jax.parallel.ulysses import Ulysses
from alst_jax.profile import Profile
from alst_jax.stack.batch import Batch
from alst_jax.stack.layer import Layer, Weights
from alst_jax.stack.plain import plain_stack
from alst_jax.stack.stack import Stack, run_stack
from alst_jax.xla import host, scopes
from alst_jax.xla.order import gradient_first


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model under a memory profile, without its weights. specs: PartitionSpec of each parameter. trained: names of
    the tables and norms outside of the layers that are trained, in part or whole."""

    config: ModelConfig
    profile: Profile
    specs: Params
    trained: frozenset[str] = frozenset({"embed_tokens", "norm", "lm_head"})

    def loss(
        self, trained: Params, frozen: Params, batch: Batch, scale: jax.Array | None, sums: Any = None
    ) -> jax.Array | TokenLosses:
        """scale x the loss summed over the valid labels of all devices, from local shards; scale None: the loss of each
        local token [B, T], and whether its label has the largest logit. sums: of the gradients of the layers (see
        `run_stack`)."""
        ends = combine(self.ends(trained), self.ends(frozen))
        tokens, layers = self.tokens(batch), Weights(trained["layers"], frozen["layers"])
        # Brought to the device once: the sum of a tied table's two gradients is no work for the host.
        table = self.on_device(ends["embed_tokens"])
        h_BTD = self.embed(table["embedding"], batch.tokens)
        if self.profile.remat and self.profile.stack == "segments":
            # The shards, not their copy on the device, which would stay until the first segment is recomputed.
            source = ends["embed_tokens"]["embedding"], batch.tokens
            h_BTD = run_stack(self.stack, h_BTD, source, layers, tokens, sums)
        else:
            h_BTD = plain_stack(self.layer, h_BTD, layers, tokens, self.profile)
        head = {name: self.on_device(part) for name, part in ends.items() if name != "embed_tokens"}
        ends = {"embed_tokens": table, **head}
        if scale is None:
            return self.token_losses(h_BTD, ends, batch.labels)
        return self.head_loss(h_BTD, ends, batch.labels, scale)

    @staticmethod
    def ends(params: Params) -> Params:
        """All parameters outside of the layers."""
        return {name: part for name, part in params.items() if name != "layers"}

    def on_device(self, shards: Any) -> Any:
        """Shards outside of the layers, on the device."""
        return host.to_device(shards) if self.profile.offload_weights else shards

    @functools.cached_property
    def layer(self) -> Layer:
        """How one layer is computed."""
        config, profile = self.config, self.profile
        specs = jax.tree.map(drop_layer_dim, self.specs["layers"], is_leaf=is_spec)
        ulysses = Ulysses(config.num_heads, config.num_kv_heads, profile.attention, SEQ, profile.head_chunks)
        return Layer(config, ulysses, specs, profile.reduce_dtype, tile_sizes(profile, config).mlp)

    @functools.cached_property
    def stack(self) -> Stack:
        """All layers, with the hand-written backward pass."""
        return Stack(self.layer, self.profile, lambda table, tokens: self.embed(self.on_device(table), tokens))

    @jax.named_scope(scopes.EMBED)
    def embed(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """h[B, T, D], from the embedding's shards on the device and token numbers[B, T]."""
        table_VD = self._gather(table, self.specs["embed_tokens"]["embedding"])
        h_BTD, multiplier = embed(table_VD, tokens, self.profile.compute_dtype), self.config.embedding_multiplier
        return h_BTD if multiplier == 1 else h_BTD * jnp.asarray(multiplier, h_BTD.dtype)

    def tokens(self, batch: Batch) -> Tokens:
        """The rotary embeddings of the positions [B, T] of tokens in their documents, and the documents."""
        length = None
        if any(rope.needs_length for rope in self.config.ropes):
            length = lax.pmax(jnp.max(batch.positions) + 1, AXES)
        documents = None if batch.documents is None else batch.documents[0]
        return Tokens.of(self.config, batch.positions, length)._replace(documents=documents)

    @jax.named_scope(scopes.LOSS)
    def head_loss(self, h_BTD: jax.Array, ends: Params, labels_BT: jax.Array, scale: jax.Array) -> jax.Array:
        """scale x the loss summed over all devices, from the output of the last layer and shards on the device."""
        h_TD, table_VD, tile, scaling = self.head(h_BTD, ends)
        labels_T = labels_BT.reshape(-1)
        if tile is None:
            total = cross_entropy(h_TD, table_VD, labels_T, scaling)
        else:
            total = tiled_cross_entropy(h_TD, table_VD, labels_T, tile, scaling)
        return lax.psum(total * scale, AXES)

    @jax.named_scope(scopes.LOSS)
    def token_losses(self, h_BTD: jax.Array, ends: Params, labels_BT: jax.Array) -> TokenLosses:
        """The loss of each token, from the output of the last layer and shards on the device."""
        h_TD, table_VD, tile, scaling = self.head(h_BTD, ends)
        found = token_losses(h_TD, table_VD, labels_BT.reshape(-1), tile, scaling)
        return TokenLosses(*(x.reshape(labels_BT.shape) for x in found))

    def head(self, h_BTD: jax.Array, ends: Params) -> tuple[jax.Array, jax.Array, int | None, LogitScaling]:
        """The factors of the logits: the normed output of the last layer [B T, D], the whole table of the head
        [V, D], the tokens of a tile (None: all), the scaling."""
        norm = jax.tree.map(self._gather, ends["norm"], self.specs["norm"])
        h_BTD = norm(h_BTD)
        head = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        table = ends[head]["embedding"]
        if head in self.trained:  # the float32 sums of its gradient do not outlive the loss
            h_BTD, table = gradient_first(h_BTD, table)
        table_VD = self._gather(table, self.specs[head]["embedding"])
        scaling = LogitScaling(self.config.logits_divisor, self.config.logits_soft_cap)
        return h_BTD.reshape(-1, h_BTD.shape[-1]), table_VD, tile_sizes(self.profile, self.config).loss, scaling

    def _gather(self, shard, spec):
        return gather(shard, spec, self.profile.reduce_dtype)


def trained_ends(trained: Params) -> frozenset[str]:
    """Names of the parts outside of the layers that have trained parameters."""
    return frozenset(name for name, part in Model.ends(trained).items() if jax.tree.leaves(part))
