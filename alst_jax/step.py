"""The training step: one shard_map around the whole loss and its gradient, one around the optimizer's update.

Everything inside works on local arrays; every collective is written down: an all-gather of each layer's weights (its
transpose is the reduce-scatter), four all-to-alls around attention, one psum for the loss.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from alst_jax.config import UserError
from alst_jax.in_backward import update_in_backward
from alst_jax.models.block import Params, abstract_params, init_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.lora import adapters_of, is_trained
from alst_jax.models.tree import combine, partition
from alst_jax.ops.attention import find_kernel
from alst_jax.ops.cross_entropy import TokenLosses
from alst_jax.ops.rope import MAX_POSITION
from alst_jax.optim.adamw import AdamW
from alst_jax.optim.streamed import add_gradients, apply_update, count_not_finite, global_norm
from alst_jax.parallel.mesh import SEQ
from alst_jax.parallel.program import program
from alst_jax.parallel.sharding import is_spec, param_specs, shardings
from alst_jax.profile import Profile
from alst_jax.stack.batch import BATCH_SPEC, Batch
from alst_jax.stack.check import check_profile
from alst_jax.stack.ends import Model, trained_ends
from alst_jax.xla import host
from alst_jax.xla.arrays import parts, put
from alst_jax.xla.dtypes import accumulation_dtype

PART_BYTES = 2**26  # of parameters whose optimizer state one program creates


class TrainStep:
    """Compiled functions of one model on one mesh under one memory profile, and where their arrays live.

    Parameters are two trees of the whole structure, `trained` and `frozen`, with None where a leaf belongs to the
    other. freeze: a regular expression; a parameter is frozen if it is found in its dotted name. None: all are trained,
    or the adapters alone where the model has some (models/lora.py).

    UserError if the profile does not go with the model and the mesh. Compose a step from `loss_and_grad` (one or more
    batches; `add_gradients` sums them), `gradient_norm` and `update`. Arguments that an update replaces are donated:
    their buffers are reused and must not be read again.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        profile: Profile,
        optimizer: AdamW,
        dtype: DTypeLike,
        freeze: str | None = None,
    ):
        check_profile(profile, model, mesh.shape[SEQ])
        profile.check(optimizer.clip_norm)
        find_kernel(profile.attention).prepare()
        self.model, self.mesh, self.profile, self.optimizer, self.freeze = model, mesh, profile, optimizer, freeze
        params = abstract_params(model, dtype)
        self.specs = param_specs(params, mesh)
        self.param_shardings = shardings(self.specs, mesh, host.memory_kind(profile.offload_weights))
        self.params = _with_shardings(params, self.param_shardings)
        self.trained, self.frozen = self.split(self.params)
        if freeze is not None and not (jax.tree.leaves(self.trained) and jax.tree.leaves(self.frozen)):
            raise UserError(f"--freeze {freeze!r}: must match some parameters of the model, and not all")
        self._trained_specs, self._frozen_specs = self.split(self.specs)
        self._trained_shardings = self.split(self.param_shardings)[0]
        state_specs = optimizer.state_specs(self._trained_specs, self.trained)
        state_shardings = shardings(state_specs, mesh, host.memory_kind(profile.offload_optimizer))
        state_shardings["count"] = NamedSharding(mesh, P())
        state = jax.eval_shape(lambda params: optimizer.init(params, self._trained_specs), self.trained)
        self.optimizer_state = _with_shardings(state, state_shardings)
        self._optimizer_shardings, self._state_specs = state_shardings, state_specs
        self._scalar = NamedSharding(mesh, P())
        self._local = Model(model, profile, self.specs, trained_ends(self.trained))  # the computation of one device

    def split(self, params: Any) -> tuple[Any, Any]:
        """(trained, frozen) of a tree over all parameters; `join` undoes it."""
        return partition(params, lambda path: is_trained(path, self.freeze, self.model.lora))

    def join(self, trained: Any, frozen: Any) -> Any:
        """The tree over all parameters."""
        return combine(trained, frozen)

    @program(
        lambda step: (step._trained_specs, step._frozen_specs, Batch.specs(), P()),
        lambda step: (P(), step._trained_specs),
        lambda step: (step._scalar, step._trained_shardings),
    )
    def loss_and_grad(
        self, trained: Params, frozen: Params, batch: Batch, scale: jax.Array
    ) -> tuple[jax.Array, Params]:
        """(scale x the loss summed over all labels of all devices, its gradients).

        scale: float32 scalar; 1 / labels gives the mean. The loss is a float32 scalar, in nats. Gradients have the
        shapes, dtypes, shardings and memory of `trained`. No argument is donated.
        """
        return jax.value_and_grad(self._local.loss)(trained, frozen, batch, scale)

    @program(
        lambda step: (step._trained_specs, step._trained_specs, step._frozen_specs, Batch.specs(), P()),
        lambda step: (P(), step._trained_specs),
        lambda step: (step._scalar, step._trained_shardings),
        donate=(0,),
    )
    def loss_and_sums(
        self, sums: Params, trained: Params, frozen: Params, batch: Batch, scale: jax.Array
    ) -> tuple[jax.Array, Params]:
        """(scale x the loss, sums + its gradients), in place: `sums` is donated. The layers' gradients of one batch are
        never stored. For profiles with `sums_in_place`.

        sums: as `zero_gradients` makes them.
        """
        ends = lambda tree: {name: part for name, part in tree.items() if name != "layers"}
        loss_of = lambda mine, layers: self._local.loss(
            mine | {"layers": trained["layers"]}, frozen, batch, scale, layers
        )
        loss, (dends, layers) = jax.value_and_grad(loss_of, argnums=(0, 1))(ends(trained), sums["layers"])
        added = add_gradients(ends(sums), dends, on_host=self.profile.offload_weights)
        return loss, added | {"layers": layers}

    @program(
        lambda step: (step._trained_specs, step._frozen_specs, Batch.specs(), P()),
        lambda step: P(),
        lambda step: step._scalar,
    )
    def loss(self, trained: Params, frozen: Params, batch: Batch, scale: jax.Array) -> jax.Array:
        """scale x the loss summed over all labels of all devices, in nats, float32; without gradients."""
        return self._local.loss(trained, frozen, batch, scale)

    @program(
        lambda step: (step._trained_specs, step._frozen_specs, Batch.specs()),
        lambda step: TokenLosses(BATCH_SPEC, BATCH_SPEC),
        lambda step: step._scalar,
    )
    def token_losses(self, trained: Params, frozen: Params, batch: Batch) -> TokenLosses:
        """The loss of each token [B, S] in nats, and whether its label has the largest logit; 0 and False without a
        label. Computed in shards, and then the same on all devices: S floats a sequence."""
        return self._local.loss(trained, frozen, batch, None)

    @program(lambda step: (step._trained_specs,), lambda step: P(), lambda step: step._scalar)
    def gradient_norm(self, gradients: Params) -> jax.Array:
        """The Euclidean norm over all gradients and devices, a float32 scalar."""
        return global_norm(gradients, on_host=self.profile.offload_weights)

    @program(lambda step: (step._trained_specs,), lambda step: P())
    def count_not_finite(self, gradients: Params) -> Params:
        """For each parameter, the number of elements that are not finite: int32[layers], int32[1] if not stacked."""
        return count_not_finite(gradients, on_host=self.profile.offload_weights)

    @program(places=lambda step: step._trained_shardings)
    def zero_gradients(self) -> Params:
        """Zeros in which gradients of several batches are summed: float32, shaped and placed like `trained`."""
        return jax.tree.map(lambda p: jnp.zeros(p.shape, accumulation_dtype(p.dtype)), self.trained)

    @program(
        lambda step: (step._trained_specs, step._trained_specs),
        lambda step: step._trained_specs,
        lambda step: step._trained_shardings,
        donate=(0,),
    )
    def add_gradients(self, sums: Params, gradients: Params) -> Params:
        """sums + gradients, in place: `sums` is donated."""
        return add_gradients(sums, gradients, on_host=self.profile.offload_weights)

    @program(
        lambda step: (step._trained_specs, step._trained_specs, step._state_specs, P(), P()),
        lambda step: (step._trained_specs, step._state_specs),
        lambda step: step._results,
        donate=(0, 2),
    )
    def update(
        self, trained: Params, gradients: Params, state: dict[str, Any], norm: jax.Array, learning_rate: jax.Array
    ) -> tuple[Params, dict[str, Any]]:
        """(trained, optimizer state) after one AdamW step, in place: `trained` and `state` are donated.

        norm: of the gradients, a float32 scalar; they are scaled down where it is above the optimizer's clip_norm.
        learning_rate: float32 scalar.
        """
        return apply_update(
            self.optimizer,
            trained,
            gradients,
            state,
            norm,
            learning_rate,
            specs=self._trained_specs,
            on_host=(self.profile.offload_weights, self.profile.offload_optimizer),
        )

    @program(
        lambda step: (step._trained_specs, step._frozen_specs, step._state_specs, Batch.specs(), P(), P()),
        lambda step: (P(),) * 4 + (step._trained_specs, step._state_specs),
        lambda step: (step._scalar,) * 4 + step._results,
        donate=(0, 2),
    )
    def update_in_backward(
        self,
        trained: Params,
        frozen: Params,
        state: dict[str, Any],
        batch: Batch,
        scale: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[Any, ...]:
        """The fields of `in_backward.Result`: a whole step in which each layer's gradient is used as soon as it is
        complete and never stored. In place: `trained` and `state` are donated.

        UserError, when the step is made, unless the profile and the optimizer allow it.
        """
        return tuple(
            update_in_backward(
                self._local, self.optimizer, self._trained_specs, trained, frozen, state, batch, (scale, learning_rate)
            )
        )

    @property
    def _results(self):
        return self._trained_shardings, self._optimizer_shardings

    def init_params(self, key: jax.Array, dtype: DTypeLike) -> Params:
        """Random weights of all parameters, created in their final memory; those in host memory one at a time."""
        draw, places = functools.partial(init_params, self.model, dtype), shardings(self.specs, self.mesh, host.DEVICE)
        if not self.profile.offload_weights:
            return jax.jit(draw, out_shardings=places)(key)
        targets, treedef = jax.tree.flatten(self.param_shardings)
        one = lambda n, place: jax.jit(lambda key: jax.tree.leaves(draw(key))[n], out_shardings=place)(key)
        pairs = enumerate(zip(jax.tree.leaves(places), targets, strict=True))
        return treedef.unflatten([jax.device_put(one(n, place), target) for n, (place, target) in pairs])

    def init_adapters(self, key: jax.Array, dtype: DTypeLike) -> Params:
        """The adapters that `init_params` draws, with None in the places of the other parameters."""
        targets, treedef = jax.tree.flatten(adapters_of(self.param_shardings)[0])
        places = jax.tree.leaves(adapters_of(shardings(self.specs, self.mesh, host.DEVICE))[0])
        draw = lambda key: jax.tree.leaves(adapters_of(init_params(self.model, dtype, key))[0])
        return treedef.unflatten(jax.device_put(jax.jit(draw, out_shardings=places)(key), targets))

    def init_optimizer(self, trained: Params) -> dict[str, Any]:
        """Zero moments and, for narrow weights, their float32 master. They are created in their final memory, those of
        few parameters at a time."""
        leaves, treedef = jax.tree.flatten(trained)
        specs = jax.tree.leaves(self._trained_specs, is_leaf=is_spec)
        names = self.optimizer.state_names(leaves)
        fetch = host.to_device if self.profile.offload_weights else lambda p: p
        made = lambda p, spec: {k: v for k, v in self.optimizer.init_one(fetch(p), spec).items() if k in names}
        states = []
        for part in parts(leaves, PART_BYTES):  # one program each
            columns = lambda tree, part=part: tuple(
                dict(zip(names, column)) for column in zip(*(treedef.flatten_up_to(tree[name])[part] for name in names))
            )
            make = jax.shard_map(
                lambda *parameters, part=part: tuple(map(made, parameters, specs[part])),
                mesh=self.mesh,
                in_specs=tuple(specs[part]),
                out_specs=columns(self._state_specs),
            )
            states += jax.jit(make, out_shardings=columns(self._optimizer_shardings))(*leaves[part])
        trees = {name: treedef.unflatten([state[name] for state in states]) for name in names}
        return trees | {"count": put(np.int32(0), self._optimizer_shardings["count"])}

    def put_batch(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        positions: np.ndarray,
        documents: np.ndarray | None = None,
        draws: np.ndarray | None = None,
    ) -> Batch:
        """numpy int32 -> a Batch on the mesh, with the shapes given there. B divides over data, S over seq: ValueError
        if not."""
        if positions.max(initial=0) >= MAX_POSITION:
            raise UserError(
                f"position {positions.max()}: rotary embedding is exact below {MAX_POSITION} tokens; "
                "use a shorter --seq-len"
            )
        arrays = Batch(tokens, labels, positions, documents, draws)
        return Batch(
            *(x if x is None else put(x, NamedSharding(self.mesh, spec)) for x, spec in zip(arrays, Batch.specs()))
        )


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
