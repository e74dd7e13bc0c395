"""AdamW: the state of a parameter, and one step on it. The arithmetic is optax's."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from alst_jax.models.tree import names
from alst_jax.optim.formats import Log8, Plain, block_of, join_float32, round_to_bfloat16, split_float32
from alst_jax.parallel.sharding import is_spec, sharded_dim
from alst_jax.xla.dtypes import accumulation_dtype


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay (arXiv 1711.05101) and global-norm clipping.

    State of a parameter: first and second moment and, for a parameter narrower than float32, the bits that make it
    float32 again (an update of 1e-5 would vanish in bfloat16's 8 bits):

    states: dtype of the moments. bfloat16 and int8 (see `formats.Log8`) are rounded stochastically; vectors stay
    float32. master: "float32" keeps a copy; "low-bits" keeps the 16 bits that a bfloat16 weight lacks, which is the
    same to the last bit in 2 bytes less; "none" keeps nothing and rounds the updated weight stochastically.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # 0: no clipping
    states: Literal["float32", "bfloat16", "int8"] = "float32"
    master: Literal["float32", "low-bits", "none"] = "float32"
    seed: int = 0  # of stochastic rounding

    def init(self, params: Any, specs: Any) -> dict[str, Any]:
        """State tree: mu, nu (and master where needed) for each parameter, and count, the steps taken."""
        state = self._per_parameter(self.init_one, params, specs)
        return state | {"count": jnp.zeros((), jnp.int32)}

    def init_one(self, param: jax.Array, spec: P) -> dict[str, Any]:
        """`init` for one parameter, whole or local."""
        state = {name: form.zeros(param.shape) for name, form in self.formats(param, spec).items()}
        if self.master == "none":
            return state
        if self.master == "low-bits" and needs_master(param.dtype):
            return state | {"master": jnp.zeros(param.shape, jnp.uint16)}
        return state | {"master": param.astype(accumulation_dtype(param.dtype))}

    def state_specs(self, specs: Any, params: Any) -> dict[str, Any]:
        """PartitionSpecs of `init`'s result: moments and master are sharded as their parameter."""
        moments = lambda p, spec: {name: form.specs(spec) for name, form in self.formats(p, spec).items()}
        one = lambda p, spec: moments(p, spec) | {"master": spec}
        return self._per_parameter(one, params, specs) | {"count": P()}

    def _per_parameter(self, one: Callable, params: Any, specs: Any) -> dict[str, Any]:
        """{name: tree over the parameters of one(param, spec)[name]}"""
        leaves, treedef = jax.tree.flatten(params)
        states = [one(p, spec) for p, spec in zip(leaves, jax.tree.leaves(specs, is_leaf=is_spec), strict=True)]
        return {name: treedef.unflatten([state[name] for state in states]) for name in self.state_names(leaves)}

    def state_names(self, params: list[Any]) -> tuple[str, ...]:
        """The state of each parameter."""
        keeps_master = self.master != "none" and any(needs_master(p.dtype) for p in params)
        return ("mu", "nu", "master") if keeps_master else ("mu", "nu")

    def formats(self, param: Any, spec: P) -> dict[str, Plain | Log8]:
        """How the moments of a parameter (an array or its shape and dtype, whole or local) are stored."""
        plain = Plain(str(accumulation_dtype(param.dtype)))
        if self.states == "bfloat16" and param.ndim > 1:
            plain = Plain("bfloat16")
        block = block_of(param.shape, sharded_dim(spec)) if self.states == "int8" else None
        if block is None:
            return {"mu": plain, "nu": plain}
        return {"mu": Log8(signed=True, block=block), "nu": Log8(signed=False, block=block)}

    def read_master(self, param: jax.Array, kept: jax.Array | None) -> jax.Array:
        """The float32 weight behind a parameter and its state."""
        if kept is None:
            return param.astype(accumulation_dtype(param.dtype))
        return join_float32(param, kept) if self.master == "low-bits" else kept

    def write_master(self, master: jax.Array, dtype: DTypeLike, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(parameter of `dtype`, the part of the float32 weight that is stored beside it)."""
        if not needs_master(dtype):
            return master.astype(dtype), None
        if self.master == "none":
            return round_to_bfloat16(master, key), None
        return split_float32(master) if self.master == "low-bits" else (master.astype(dtype), master)

    def update_values(self, master, gradient, mu, nu, count, learning_rate, decay: bool):
        """One elementwise step on arrays of one shape: (new master, new mu, new nu). `count` is the steps before."""
        adam = optax.scale_by_adam(self.beta1, self.beta2, self.eps)
        update, state = adam.update(gradient, optax.ScaleByAdamState(count, mu, nu))
        if decay:
            update = update + self.weight_decay * master
        return master - learning_rate * update, state.mu, state.nu


def needs_master(dtype: DTypeLike) -> bool:
    """Whether a parameter of this dtype is too narrow to be updated itself."""
    return jnp.dtype(dtype).itemsize < 4


def decays(path: tuple) -> bool:
    """Weight decay spares norms (`scale`) and biases (`bias`)."""
    return names(path)[-1] not in ("scale", "bias")
