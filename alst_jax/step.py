"""The training step: one shard_map around the whole loss and its gradient, one around the optimizer's update.

Everything inside works on local arrays; every collective is written down: an all-gather of each layer's weights (its
transpose is the reduce-scatter), four all-to-alls around attention, one psum for the loss.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from alst_jax.config import IGNORED, UserError
from alst_jax.models.block import abstract_params, block_functions, init_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.tree import is_stacked
from alst_jax.ops.attention import import_kernel
from alst_jax.ops.cross_entropy import cross_entropy, default_tile, tiled_cross_entropy
from alst_jax.ops.linear import embed
from alst_jax.ops.norm import rms_norm
from alst_jax.ops.rope import MAX_POSITION, rope_tables
from alst_jax.ops.tiling import stream
from alst_jax.optim.adamw import (
    AdamW,
    apply_update,
    count_not_finite,
    global_norm,
    join_updates,
    parameter_updates,
    square_sum,
)
from alst_jax.parallel.mesh import AXES, SEQ
from alst_jax.parallel.sharding import (
    BATCH_SPEC,
    drop_layer_dim,
    gather,
    is_spec,
    param_specs,
    scatter,
    shardings,
    whole,
)
from alst_jax.parallel.ulysses import Ulysses, check_degree
from alst_jax.profile import Profile
from alst_jax.stack import stack as remat
from alst_jax.stack.layer import Layer
from alst_jax.stack.stack import scan_layers
from alst_jax.xla import host
from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.order import gradient_first

Params = Any


class Batch(NamedTuple):
    """int32 arrays [B, S], sharded over (data, seq). Labels are already shifted: labels[t] follows tokens[t]."""

    tokens: jax.Array
    labels: jax.Array
    positions: jax.Array


class TrainStep:
    """Compiled functions of one model on one mesh under one memory profile, and where their arrays live.

    UserError if the profile cannot be had. Compose a step from `loss_and_grad` (one or more batches; `add_gradients` sums them), `gradient_norm` and `update`.
    Arguments that an update replaces are donated: their buffers are reused and must not be read again.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, profile: Profile, optimizer: AdamW, dtype: DTypeLike):
        check_profile(profile, model, mesh.shape[SEQ])
        if profile.update_in_backward and optimizer.clip_norm > 0:
            raise UserError("--update-in-backward: gradients cannot be clipped by a norm that is not known yet (--clip-norm 0)")
        if profile.update_in_backward and not (profile.offload_weights and profile.offload_optimizer):
            raise UserError("--update-in-backward is for weights and optimizer in host memory (--offload-weights, "
                            "--offload-optimizer)")  # stacks on the device would be copied once for each loop
        import_kernel(profile.attention)
        self.model, self.mesh, self.profile, self.optimizer = model, mesh, profile, optimizer
        self.specs = param_specs(abstract_params(model, dtype), mesh)
        weights_kind = host.memory_kind(profile.offload_weights)
        self.param_shardings = shardings(self.specs, mesh, weights_kind)
        self.params = _with_shardings(abstract_params(model, dtype), self.param_shardings)
        state_specs = optimizer.state_specs(self.specs, self.params)
        state_shardings = shardings(state_specs, mesh, host.memory_kind(profile.offload_optimizer))
        state_shardings["count"] = NamedSharding(mesh, P())
        state = jax.eval_shape(lambda params: optimizer.init(params, self.specs), self.params)
        self.optimizer_state = _with_shardings(state, state_shardings)
        self._optimizer_shardings, self._state_specs = state_shardings, state_specs
        self._build()

    def _build(self):
        scalar = NamedSharding(self.mesh, P())
        on_mesh = functools.partial(jax.shard_map, mesh=self.mesh)
        grads = self.param_shardings
        batch = Batch(*[BATCH_SPEC] * 3)
        loss = functools.partial(local_loss, model=self.model, profile=self.profile, specs=self.specs)
        self.loss_and_grad = jax.jit(
            on_mesh(jax.value_and_grad(loss), in_specs=(self.specs, batch, P()), out_specs=(P(), self.specs)),
            out_shardings=(scalar, grads))
        """(params, batch, scale) -> (scale x summed loss over all devices, its gradients, placed like params)."""
        self.loss = jax.jit(on_mesh(loss, in_specs=(self.specs, batch, P()), out_specs=P()), out_shardings=scalar)
        """(params, batch, scale) -> scale x summed loss, without gradients."""
        self.gradient_norm = jax.jit(
            on_mesh(functools.partial(global_norm, on_host=self.profile.offload_weights),
                    in_specs=(self.specs,), out_specs=P()), out_shardings=scalar)
        """gradients -> their global norm, float32."""
        self.count_not_finite = jax.jit(
            on_mesh(functools.partial(count_not_finite, on_host=self.profile.offload_weights), in_specs=(self.specs,),
                    out_specs=P()))
        """gradients -> for each parameter, its elements that are no finite numbers: int32[layers], int32[1] if not stacked."""
        self.zero_gradients = jax.jit(
            lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, accumulation_dtype(p.dtype)), self.params),
            out_shardings=grads)
        """() -> zeros to sum the gradients of several batches in: float32, placed like params."""
        self.add_gradients = jax.jit(
            on_mesh(functools.partial(_add, on_host=self.profile.offload_weights),
                    in_specs=(self.specs, self.specs), out_specs=self.specs),
            donate_argnums=(0,), out_shardings=grads)
        """(sums, gradients) -> sums + gradients, in place."""
        update = functools.partial(
            apply_update, self.optimizer, specs=self.specs, params_on_host=self.profile.offload_weights,
            state_on_host=self.profile.offload_optimizer)
        self.update = jax.jit(
            on_mesh(update, in_specs=(self.specs, self.specs, self._state_specs, P(), P()),
                    out_specs=(self.specs, self._state_specs)),
            donate_argnums=(0, 2), out_shardings=(self.param_shardings, self._optimizer_shardings))
        """(params, gradients, optimizer state, gradient norm, learning rate) -> (params, optimizer state), in place."""
        in_backward = functools.partial(
            local_update_in_backward, model=self.model, profile=self.profile, specs=self.specs, optimizer=self.optimizer)
        self.update_in_backward = jax.jit(
            on_mesh(in_backward, in_specs=(self.specs, self._state_specs, batch, P(), P()),
                    out_specs=(P(), P(), P(), P(), self.specs, self._state_specs)),
            donate_argnums=(0, 1), out_shardings=(scalar,) * 4 + (self.param_shardings, self._optimizer_shardings))
        """(params, optimizer state, batch, scale, learning rate) -> (scale x summed loss, gradient norm, whether all
        gradients were finite, layers updated, params, optimizer state), in place: a whole step in which each layer's
        gradient is used as soon as it is there and never stored. Where something is not finite, nothing is updated from
        there on: layers that the backward pass had reached before have been."""

    def init_params(self, key: jax.Array, dtype: DTypeLike) -> Params:
        """Random weights, made where they will live."""
        made = jax.jit(functools.partial(init_params, self.model, dtype),
                       out_shardings=shardings(self.specs, self.mesh, host.DEVICE))(key)
        return jax.device_put(made, self.param_shardings)

    def init_optimizer(self, params: Params) -> dict[str, Any]:
        """Zero moments and, for narrow weights, their float32 master, made where they will live, a parameter at a time."""
        leaves, treedef = jax.tree.flatten(params)
        specs = jax.tree.leaves(self.specs, is_leaf=is_spec)
        names = self.optimizer.names(leaves)
        column = lambda tree, name, n: treedef.flatten_up_to(tree[name])[n]
        fetch = host.to_device if self.profile.offload_weights else lambda p: p
        states = []
        for n, (leaf, spec) in enumerate(zip(leaves, specs, strict=True)):
            made = jax.shard_map(
                lambda p, spec=spec: {k: v for k, v in self.optimizer.init_one(fetch(p), spec).items() if k in names},
                mesh=self.mesh, in_specs=(spec,), out_specs={name: column(self._state_specs, name, n) for name in names})
            places = {name: column(self._optimizer_shardings, name, n) for name in names}
            states.append(jax.jit(made, out_shardings=places)(leaf))
        trees = {name: treedef.unflatten([state[name] for state in states]) for name in names}
        return trees | {"count": jax.device_put(jnp.int32(0), self._optimizer_shardings["count"])}

    def put_batch(self, tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> Batch:
        """numpy int32 [B, S] -> a Batch on the mesh. B divides over data, S over seq: ValueError if not."""
        if positions.max(initial=0) >= MAX_POSITION:
            raise UserError(f"position {positions.max()}: rotary embedding is exact below {MAX_POSITION} tokens; "
                            "use a shorter --seq-len")
        return Batch(*jax.device_put((tokens, labels, positions), NamedSharding(self.mesh, BATCH_SPEC)))


def check_profile(profile: Profile, model: ModelConfig, sp: int) -> None:
    """UserError if the profile cannot be had with this model on this mesh."""
    if profile.head_chunks < 1:
        raise UserError(f"--head-chunks {profile.head_chunks}: must be at least 1")
    check_degree(sp, model.num_heads, profile.head_chunks)
    chunks, kv_heads = profile.head_chunks, model.num_kv_heads
    if min(profile.segment_layers, default=0) < 1:
        raise UserError(f"--segment-layers {' '.join(map(str, profile.segment_layers))}: must be at least 1 each")
    if min(profile.keep_attention_on_device, profile.keep_attention_on_host) < 0:
        raise UserError("--keep-attention-on-device and --keep-attention-on-host must be at least 0")
    if chunks % kv_heads and kv_heads % chunks:
        raise UserError(f"--head-chunks {chunks}: must divide the {kv_heads} kv heads or be a multiple of them")
    segments, layers = profile.segment_layers, model.num_layers
    if len(segments) != 1 and sum(segments) != layers:
        raise UserError(f"--segment-layers {' '.join(map(str, segments))}: {sum(segments)} layers in all, where the model has "
                        f"{layers}; give one number for all segments alike, or one each that add up to {layers}")
    kept = profile.keep_attention_on_device + profile.keep_attention_on_host
    if kept > layers:
        raise UserError(f"--keep-attention-on-device + --keep-attention-on-host = {kept} layers, where the model has {layers}")
    if not profile.remat and (kept or segments != (1,) or profile.offload_activations or profile.update_in_backward):
        raise UserError("--segment-layers, --keep-attention-on-device, --keep-attention-on-host, --offload-activations and "
                        "--update-in-backward are parts of rematerialisation; they need --remat, not --no-remat")


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def count_labels(labels: np.ndarray) -> int:
    """Labels that take part in the loss."""
    return int(np.count_nonzero(labels != IGNORED))


def local_loss(
    params: Params, batch: Batch, scale: jax.Array, *, model: ModelConfig, profile: Profile, specs: Any
) -> jax.Array:
    """scale x the loss summed over the valid labels of all devices, from local shards. Runs inside the shard_map."""
    parts = _Parts.of(batch, scale, model, profile, specs)
    # Brought to the device once: where it is the head too, the sum of its two gradients is no work for the host.
    embedding = parts.on_device(params["embed_tokens"]["embedding"])
    h_BTD = parts.look_up(embedding, batch.tokens)
    source = params["embed_tokens"]["embedding"], batch.tokens
    h_BTD = scan_layers(parts.layer, h_BTD, parts.look_up, source, params["layers"], parts.rope, profile)
    table = embedding if model.tie_word_embeddings else parts.on_device(params["lm_head"]["embedding"])
    return parts.loss(h_BTD, parts.on_device(params["norm"]), table)


def local_update_in_backward(
    params: Params, state: dict[str, Any], batch: Batch, scale: jax.Array, learning_rate: jax.Array, *,
    model: ModelConfig, profile: Profile, specs: Any, optimizer: AdamW,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Params, dict[str, Any]]:
    """`TrainStep.update_in_backward` from local shards. Runs inside the shard_map."""
    parts = _Parts.of(batch, scale, model, profile, specs)
    embedding = parts.on_device(params["embed_tokens"]["embedding"])
    h_BTD, back_to_embedding = jax.vjp(lambda table: parts.look_up(table, batch.tokens), embedding)
    source = params["embed_tokens"]["embedding"], batch.tokens
    h_BTD, saved = remat.forward(parts.layer, profile, parts.look_up, h_BTD, source, params["layers"], parts.rope)
    table = embedding if model.tie_word_embeddings else parts.on_device(params["lm_head"]["embedding"])
    loss, back_to_layers = jax.vjp(parts.loss, h_BTD, parts.on_device(params["norm"]), table)
    dh_BTD, dnorm, dtable = back_to_layers(jnp.ones_like(loss))

    updates = parameter_updates(optimizer, params, state, specs, learning_rate)
    of_layers = [update for update in updates if is_stacked(update.path)]
    on_host = (profile.offload_weights, profile.offload_optimizer)
    # A tied table's gradient counts when it is whole; that its first part is finite must be known now.
    progress = _Progress(jnp.float32(0), jnp.isfinite(loss) & jnp.isfinite(square_sum(dtable)), jnp.int32(0))
    progress = progress.after([dnorm["scale"]] if model.tie_word_embeddings else [dnorm["scale"], dtable], 0)
    layers = jax.tree.structure(params["layers"])

    def read(store, i):
        return layers.unflatten([host.row(written[0], i, on_host[0]) for written in store[0]])

    def write(store, i, shards, gradients):
        all_written, progress = store
        gradients = jax.tree.leaves(gradients)
        progress = progress.after(gradients, 1)
        result = []
        for update, written, gradient, old in zip(of_layers, all_written, gradients, jax.tree.leaves(shards), strict=True):
            kept = host.row(written[1:], i, on_host[1])
            rows = jax.tree.map(lambda x: x[None], (old, *kept))
            new = update.step(i, rows, gradient[None].astype(update.wide))
            new = [jnp.where(progress.finite, x, was)[0] for x, was in zip(new, rows, strict=True)]
            result.append((host.put_row(written[0], new[0], i, on_host[0]),
                           *host.put_row(written[1:], tuple(new[1:]), i, on_host[1])))
        return result, progress

    store = [update.written for update in of_layers], progress
    dh_BTD, (layers_written, progress) = remat.backward(
        parts.layer, profile, parts.look_up, saved, dh_BTD, store, read, write)
    (dembedding,) = back_to_embedding(dh_BTD)
    head = {} if model.tie_word_embeddings else {"lm_head": {"embedding": dtable}}
    dembedding = dembedding + dtable if model.tie_word_embeddings else dembedding
    gradients = {"embed_tokens": {"embedding": dembedding}, "norm": dnorm, **head}
    progress = progress.after([dembedding], 0)
    gradients = iter(jax.tree.leaves(gradients))
    layers_written, results = iter(layers_written), []
    for update in updates:
        if is_stacked(update.path):
            results.append(next(layers_written))
            continue
        step = lambda chunk, written, read, update=update: (chunk + 1, tuple(
            jnp.where(progress.finite, x, was)
            for x, was in zip(update.step(chunk, written, read[0].astype(update.wide)), written, strict=True)))
        rows = host.chunk_rows(update.param.shape, False)
        places = (on_host[0],) + (on_host[1],) * len(update.stored) + (False,)
        results.append(stream(step, jnp.int32(0), update.written, (next(gradients),), rows, places)[1])
    new_params, new_state = join_updates(params, state, updates, results)
    new_state["count"] = jnp.where(progress.finite, new_state["count"], state["count"])
    return loss, jnp.sqrt(progress.square), progress.finite, progress.layers, new_params, new_state


class _Progress(NamedTuple):
    """Of an update in the backward pass: sum of the squares of the gradients so far, whether all were finite numbers, and
    how many layers were updated."""

    square: jax.Array
    finite: jax.Array
    layers: jax.Array

    def after(self, gradients: list[jax.Array], layers: int) -> "_Progress":
        square = self.square + sum(map(square_sum, gradients), jnp.float32(0))
        finite = self.finite & jnp.isfinite(square)
        return _Progress(square, finite, self.layers + jnp.where(finite, layers, 0))


class _Parts(NamedTuple):
    """The model without its weights. look_up(embedding's shards, tokens) -> h; loss(h, norm's, head's shards on the
    device)."""

    layer: Layer
    rope: Any
    on_device: Callable
    look_up: Callable
    loss: Callable

    @staticmethod
    def of(batch: Batch, scale: jax.Array, model: ModelConfig, profile: Profile, specs: Any) -> "_Parts":
        dtype = jnp.dtype(profile.compute_dtype)
        gather_all = functools.partial(_gather_all, reduce_dtype=jnp.dtype(profile.reduce_dtype))
        layer_specs = jax.tree.map(drop_layer_dim, specs["layers"], is_leaf=is_spec)
        ulysses = Ulysses(model.num_heads, model.num_kv_heads, profile.attention, SEQ, profile.head_chunks)
        layer = Layer(
            block_functions(model), ulysses, load=lambda shards: jax.tree.map(whole, shards, layer_specs),
            scatter=lambda gradients, shards: jax.tree.map(
                lambda g, spec, shard: scatter(g, spec, profile.reduce_dtype, shard.dtype), gradients, layer_specs, shards),
            carriers=lambda shards: gather_all(shards, layer_specs), tile=_token_tile(model, profile))
        head = "embed_tokens" if model.tie_word_embeddings else "lm_head"

        def on_device(shards):
            return host.to_device(shards) if profile.offload_weights else shards

        def look_up(shards, tokens):
            return embed(gather_all(on_device(shards), specs["embed_tokens"]["embedding"]), tokens, dtype)

        def loss(h_BTD, norm, table):
            h_BTD = rms_norm(h_BTD, gather_all(norm, specs["norm"])["scale"], model.rms_norm_eps)
            h_BTD, table = gradient_first(h_BTD, table)  # its float32 sums do not outlive the loss
            table = gather_all(table, specs[head]["embedding"])
            h_TD, labels_T = h_BTD.reshape(-1, h_BTD.shape[-1]), batch.labels.reshape(-1)
            if profile.loss_tile is None:
                total = cross_entropy(h_TD, table, labels_T)
            else:
                total = tiled_cross_entropy(h_TD, table, labels_T, profile.loss_tile or default_tile(model.vocab_size))
            return lax.psum(total * scale, AXES)

        return _Parts(layer, rope_tables(model.rope, model.head_dim, batch.positions), on_device, look_up, loss)


def _token_tile(model: ModelConfig, profile: Profile) -> int | None:
    return profile.mlp_tile if profile.mlp_tile != 0 else model.hidden_size


def _gather_all(shards: Any, specs: Any, reduce_dtype: DTypeLike) -> Any:
    """Whole weights, as carriers, from local shards on the device."""
    return jax.tree.map(lambda shard, spec: gather(shard, spec, reduce_dtype), shards, specs)


def _add(sums: Any, gradients: Any, on_host: bool) -> Any:
    add = lambda carry, written, read: (carry, (written[0] + read[0].astype(written[0].dtype),))

    def leaf(path, total, gradient):
        if not on_host:
            return total + gradient.astype(total.dtype)
        rows = host.chunk_rows(total.shape, is_stacked(path))
        return stream(add, (), (total,), (gradient,), rows, (True, True))[1][0]

    return jax.tree_util.tree_map_with_path(leaf, sums, gradients)
