"""The interface of sequence parallelism: attention over a whole sequence, from and to local tokens of it."""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from alst_jax.models.config import ModelConfig
from alst_jax.ops.attention import AttentionSpec, find_kernel
from alst_jax.parallel.costs import Shapes, Traffic, Work
from alst_jax.profile import Profile


@runtime_checkable
class SequenceParallel(Protocol):
    """Runs inside a shard_map whose mesh has an axis over which sequences are sharded.

    chunks: groups of heads that are worked on one after the other. project(i) -> q[B, S/seq, N/chunks, H],
    k[B, S/seq, K/chunks or 1, H], v: queries, keys and values of chunk i, from local tokens.
    """

    chunks: int

    def attend(
        self, project: Callable, spec: AttentionSpec, ready: jax.Array, documents: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """o[B, S/seq, N, H], and the log-sum-exps that `attend_backward` needs. ready: an array that `project` reads.
        Output buffers are allocated only after it. documents: offsets into the B S tokens of whole sequences, the same
        on all devices that share them (see `Kernel`); None: each sequence is one document."""

    def attend_backward(
        self,
        project: Callable,
        spec: AttentionSpec,
        results: tuple[jax.Array, Any],
        do: jax.Array,
        documents: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gradients of q, k and v of all heads, from the results of `attend` and the gradient of o.

        buffer | before        | after
        do     | gradient of o | gradient of q
        """

    @staticmethod
    def check(model: ModelConfig, degree: int, chunks: int) -> None:
        """UserError if this many devices and chunks cannot share the model's heads."""

    @staticmethod
    def traffic(shapes: Shapes) -> Traffic:
        """Calls and bytes of its collectives, for plans."""

    @staticmethod
    def work(shapes: Shapes) -> Work:
        """Bytes of its buffers, for plans."""


def padded_length(seq_len: int, sp: int, profile: Profile) -> int:
    """seq_len, rounded up to a multiple for the mesh and the attention kernel; the rest is padding without labels."""
    multiple = math.lcm(sp, find_kernel(profile.attention).multiple)
    return -(-seq_len // multiple) * multiple
