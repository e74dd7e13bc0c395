"""What a step will need, known before anything is allocated: the compiler's bytes for the working set, shapes for the rest."""

import dataclasses
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from alst_jax.memory import host
from alst_jax.parallel.sharding import BATCH_SPEC
from alst_jax.step import Batch, TrainStep

GIB = 2**30
COLLECTIVES = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one device, and of host memory for that device; FLOPs of one step of the whole mesh.

    `collectives` counts instructions in the compiled program, of which those in a loop run once a trip.
    """

    device: dict[str, int]
    host: dict[str, int]
    flops: float
    collectives: dict[str, int]
    device_limit: int | None
    device_kind: str

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    def to_json(self) -> str:
        """One JSON object, bytes as integers."""
        return json.dumps(dataclasses.asdict(self) | {"device_bytes": self.device_bytes, "host_bytes": self.host_bytes})

    def table(self) -> str:
        """The same for people, in GiB."""
        rows = [f"{'':24}{'device GiB':>12}{'host GiB':>12}"]
        for part in dict.fromkeys((*self.device, *self.host)):
            rows.append(f"{part:24}{self.device.get(part, 0) / GIB:12.2f}{self.host.get(part, 0) / GIB:12.2f}")
        rows.append(f"{'total':24}{self.device_bytes / GIB:12.2f}{self.host_bytes / GIB:12.2f}")
        if self.device_limit is not None:
            rows.append(f"{'the device has':24}{self.device_limit / GIB:12.2f}   {self.device_kind}")
        named = ", ".join(f"{count} {name}" for name, count in self.collectives.items() if count)
        rows.append(f"model FLOPs a step: {self.flops:.3e}; collectives in the program: {named or 'none'}")
        return "\n".join(rows)


def plan_step(step: TrainStep, rows: int, length: int, grad_accum: int = 1) -> Plan:
    """The plan of a step over `rows` sequences of `length` tokens, `grad_accum` times. Compiles; allocates nothing.

    On a CPU all memory is one: what would be in host memory on a GPU is counted there by its shapes, while the working
    set counts the copies that a GPU would not have.
    """
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=NamedSharding(step.mesh, BATCH_SPEC))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = step.loss_and_grad.lower(step.params, Batch(tokens, tokens, tokens), scalar).compile()
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    device, on_host = {}, {}
    for part, tree in (("weights", step.params), ("gradients", step.params), ("optimizer", step.optimizer_state)):
        for leaf in jax.tree.leaves(tree):
            size = shard_bytes(leaf)
            if part == "gradients" and grad_accum > 1:  # and the float32 sums beside those of one batch
                size += math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
            place = on_host if leaf.sharding.memory_kind == host.HOST else device
            place[part] = place.get(part, 0) + size
    device["working set"] = memory.temp_size_in_bytes
    device["batch"] = 3 * shard_bytes(tokens)
    on_host["activations"] = memory.host_temp_size_in_bytes
    first = step.mesh.devices.flat[0]
    limit = (first.memory_stats() or {}).get("bytes_limit")
    return Plan(
        device, on_host, grad_accum * rows * step.model.flops_per_sequence(length),
        {name: len(re.findall(rf"= [^=]*\b{name}(?:-start)?\(", text)) for name in COLLECTIVES}, limit, first.device_kind)


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's shard of an array or abstract array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
