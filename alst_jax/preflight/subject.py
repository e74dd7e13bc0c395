"""The subject of the checks: the run's shapes and mesh, and a step of a few layers of its model.

B rows, S tokens, T local tokens, D hidden, N query heads, K kv heads, H head dim, R sampled tokens.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alst_jax.config import IGNORED
from alst_jax.models.config import ModelConfig
from alst_jax.models.tree import as_dict
from alst_jax.parallel.mesh import AXES, DATA, SEQ
from alst_jax.preflight.values import bits, numbers
from alst_jax.profile import Profile
from alst_jax.stack.ends import Model, trained_ends
from alst_jax.step import TrainStep

SAMPLED = 64  # tokens
WRAPS = (2**31, 2**32)  # elements at which indices of a kernel may wrap


class Rows(NamedTuple):
    """Sampled tokens: row b[R], token t[R]."""

    b: np.ndarray
    t: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """step: the run's. rows, length: of its batches, whole. documents: of a replica at most; 0: not packed."""

    step: TrainStep
    rows: int
    length: int
    documents: int = 0

    @functools.cached_property
    def few(self) -> TrainStep:
        """The step of the same model with two layers, or one of each kind: all else as in the run."""
        step = self.step
        return TrainStep(
            few_layers(step.model),
            step.mesh,
            few_layers_of(step.profile),
            step.optimizer,
            self.weight_dtype,
            step.freeze,
        )

    @functools.cached_property
    def model(self) -> Model:
        return Model(self.few.model, self.few.profile, self.few.specs, trained_ends(self.few.trained))

    @property
    def config(self) -> ModelConfig:
        return self.few.model

    @property
    def weight_dtype(self) -> str:
        return str(jax.tree.leaves(self.step.params)[0].dtype)

    @property
    def dtype(self) -> str:
        return self.step.profile.compute_dtype

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.step.mesh

    @property
    def replicas(self) -> int:
        return self.mesh.shape[DATA]

    # ------------------------------------------------------------------------------------------------------- documents

    @functools.cached_property
    def offsets(self) -> np.ndarray | None:
        """int32[replicas, documents + 1]: borders in the middle of each sequence, off all powers of two, and documents
        of a token and of a few. Each replica has the same."""
        if not self.documents:
            return None
        local, length = self.rows // self.replicas, self.length
        cuts = sorted(
            {
                c
                for c in (length // 2 - 3, length // 2 - 2, length // 2 + 11, length - length // 8 + 1)
                if 0 < c < length
            }
        )[: self.documents // local - 1]
        borders = [row * length + cut for row in range(local) for cut in (0, *cuts)]
        borders += [local * length] * (self.documents + 1 - len(borders))
        return np.tile(np.asarray(borders, np.int32), (self.replicas, 1))

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """int32[B, S]: the token at which the document of a token begins, in its sequence."""
        local = self.rows // self.replicas
        starts = np.zeros((local, self.length), np.int32)
        for border in [] if self.offsets is None else self.offsets[0][:-1]:
            if border < local * self.length:
                row, at = divmod(int(border), self.length)
                starts[row, at:] = at
        return np.tile(starts, (self.replicas, 1))

    @functools.cached_property
    def batch(self) -> dict[str, np.ndarray]:
        """Arrays for `put_batch`. Labels are tokens one later; fewer and fewer have one, so that no two tiles have as
        many."""
        b, t = np.arange(self.rows), np.arange(self.length)
        tokens = numbers(1, self.config.vocab_size, b, np.arange(self.length + 1))
        has = (bits(2, b, t, xp=np) >> 24).astype(np.int64) * self.length >= np.minimum(t, self.length - 16)[None] * 256
        ends = np.roll(self.starts, -1, axis=1) != self.starts
        labels = np.where(has & ~ends, tokens[:, 1:], IGNORED).astype(np.int32)
        positions = (t[None] - self.starts).astype(np.int32)
        made = {"tokens": np.ascontiguousarray(tokens[:, :-1]), "labels": labels, "positions": positions}
        return made if self.offsets is None else made | {"documents": self.offsets}

    # --------------------------------------------------------------------------------------------------------- sampling

    @functools.cached_property
    def sampled(self) -> Rows:
        """Tokens of the first and the last row: the ends, both sides of borders of shards and documents, both sides of
        the indices at which 32 bits end, the middle, and others by chance."""
        length, model = self.length, self.config
        width = max(model.num_heads * model.head_dim, model.hidden_size)
        interesting = [0, 1, length - 1, length - 2, length // 2]
        interesting += [k * length // self.mesh.shape[SEQ] for k in range(1, self.mesh.shape[SEQ])]
        interesting += [wrap // width // n for wrap in WRAPS for n in (1, self.rows // self.replicas)]
        interesting += np.unique(self.starts[-1]).tolist()[-8:]
        near = [t + d for t in interesting for d in (-1, 0) if 0 <= t + d < length]
        chance = numbers(3, length, np.arange(8 * SAMPLED)).tolist()
        t = np.asarray(list(dict.fromkeys([*near, *chance]))[: min(SAMPLED, length)])
        both = sorted({0, self.rows - 1})
        return Rows(np.repeat(both, len(t)).astype(np.int32), np.tile(t, len(both)).astype(np.int32))

    # -------------------------------------------------------------------------------------------------- on the devices

    def on_mesh(self, fn, in_specs: Any, out_specs: Any):
        """fn on local arrays, compiled."""
        return jax.jit(jax.shard_map(fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs))

    def indices(self) -> tuple[jax.Array, jax.Array]:
        """Inside of `on_mesh`: the rows and tokens of this device."""
        b, t = self.rows // self.replicas, self.length // self.mesh.shape[SEQ]
        return lax.axis_index(DATA) * b + jnp.arange(b), lax.axis_index(SEQ) * t + jnp.arange(t)

    def pick(self, x: jax.Array) -> jax.Array:
        """Inside of `on_mesh`: the sampled tokens of x[B/data, T, ...], float32[R, ...] on all devices."""
        rows = self.sampled
        b = rows.b - lax.axis_index(DATA) * x.shape[0]
        t = rows.t - lax.axis_index(SEQ) * x.shape[1]
        here = (b >= 0) & (b < x.shape[0]) & (t >= 0) & (t < x.shape[1])
        got = x[jnp.clip(b, 0, x.shape[0] - 1), jnp.clip(t, 0, x.shape[1] - 1)].astype(jnp.float32)
        return lax.psum(jnp.where(here.reshape(-1, *[1] * (x.ndim - 2)), got, 0), AXES)

    @functools.cached_property
    def params(self) -> Any:
        """Random weights of `few`; norms and biases too are no constants."""
        made = self.few.init_params(jax.random.key(7), jnp.dtype(self.weight_dtype))

        def spread(leaf, place):
            if leaf.ndim > 2 or leaf.ndim == 2 and leaf.shape[0] != self.config.num_layers:
                return leaf
            noise = (bits(8, *map(np.arange, leaf.shape), xp=np) % 33).astype(np.float32) / 64 - 0.25
            return jax.device_put((np.asarray(leaf, np.float32) + noise).astype(leaf.dtype), place)

        return jax.tree.map(spread, made, self.few.param_shardings)

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """The same as plain dicts of float32 arrays, sharded like the parameters, in device memory."""
        places = jax.tree.map(lambda s: NamedSharding(self.mesh, s.spec), self.few.param_shardings)
        on_device = jax.tree.map(jax.device_put, self.params, places)
        return as_dict(jax.jit(lambda params: jax.tree.map(lambda w: w.astype(jnp.float32), params))(on_device))

    def layer_weights(self, number: int) -> dict[str, Any]:
        return self._layer(self.weights["layers"], number)

    @functools.cached_property
    def _layer(self):
        return jax.jit(lambda layers, number: jax.tree.map(lambda w: w[number], layers))

    def blocks(self, columns: int) -> tuple[jax.Array, jax.Array]:
        """(b, t) of all tokens, int32[blocks, rows of a block] each, sharded over all devices: about 64 MiB of
        `columns` float32 values a block and device. Past the last token t is -1."""
        total, devices = self.rows * self.length, self.mesh.size
        size = devices * max(1, min(2**24 // columns, -(-total // devices)))
        index = np.arange(-(-total // size) * size).reshape(-1, size)
        b, t = np.where(index < total, index // self.length, 0), np.where(index < total, index % self.length, -1)
        return tuple(jax.device_put(x.astype(np.int32), NamedSharding(self.mesh, P(None, AXES))) for x in (b, t))


def few_layers(model: ModelConfig) -> ModelConfig:
    """The model with one layer of each kind, two at least."""
    kinds = model.kinds if len(model.kinds) > 1 else model.kinds * 2
    return dataclasses.replace(
        model, num_layers=len(kinds), layer_kinds=kinds if model.layer_kinds else (), attention_layers=None
    )


def few_layers_of(profile: Profile) -> Profile:
    """The profile for `few_layers`: segments and kept attention outputs, cut to their number."""
    return dataclasses.replace(
        profile,
        segment_layers=(min(2, max(profile.segment_layers)),),
        keep_attention_on_device=min(1, profile.keep_attention_on_device),
        keep_attention_on_host=min(1, profile.keep_attention_on_host),
        keep_qkv_on_device=min(1, profile.keep_qkv_on_device),
        keep_mlp_on_device=min(1, profile.keep_mlp_on_device),
    )
