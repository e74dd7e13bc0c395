"""Packed documents for a kernel that serves single sequences only: a loop of dense causal calls on slices.

Slices have a few fixed sizes. A document runs in a slice of the smallest size that holds it, from the slice's first row
on. The tokens behind the document in the slice change nothing: causal attention hides them from its queries, and their
own rows are not written. Small documents of one size run several at a time, as the rows of one call; the last few of
that size, too few for such a call, run one at a time. Each kind of call has a separate loop, so that one compiled
program serves any number of documents.

B rows, S tokens, P = B S packed tokens, D documents at most, G documents in a call, L tokens of a slice, N query heads,
K kv heads, H head dim.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alst_jax.xla.varying import vary_like

SMALLEST = 512  # tokens of the smallest slice
TOGETHER = 4096  # tokens of the slices of one call at most, where it holds several
UNREACHABLE = 1e30  # log-sum-exp of rows behind a document: their softmax weights become exactly 0
# TFLOP/s of useful work by the sum of the documents' squares over the sum of their lengths. Measured with cuDNN on an
# H100 (32 query heads, 8 kv heads, 131,072 tokens, 2026-11-27): 64 equal documents, 8 mixed ones, and one.
# 256: the rate of 2,048 over 4, since a slice of SMALLEST tokens has 4 times the pairs.
DOCUMENT_RATES = {
    "forward": {256: 54, 2048: 215, 25360: 414, 131072: 590},
    "backward": {256: 57, 2048: 229, 25360: 388, 131072: 513},
}


class Bucket(NamedTuple):
    """Slices of `size` tokens, `together` of them in a call."""

    size: int
    together: int

    @property
    def calls(self) -> tuple["Bucket", ...]:
        """The kinds of its calls: full ones, and ones of a single slice for the rest."""
        return (self,) if self.together == 1 else (self, Bucket(self.size, 1))

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key in the causal half of one call."""
        return self.together * (self.size * (self.size + 1) // 2)


def buckets_of(length: int, documents: int) -> list[Bucket]:
    """The buckets for sequences of `length` tokens and at most `documents` documents.

    Sizes: SMALLEST times 1, 1.5, 2, 3, 4, 6, ... below `length`, and `length`.
    """
    sizes, power = [], SMALLEST
    while power < length:
        sizes += [size for size in (power, power * 3 // 2) if size < length]
        power *= 2
    return [Bucket(size, max(1, min(TOGETHER // size, documents))) for size in (*sizes, length)]


def calls_of(lengths: Sequence[int], length: int, documents: int) -> dict[Bucket, int]:
    """Dense calls of each kind for documents of these lengths; empty documents need none.

    documents: the number that the program is compiled for.
    """
    buckets, calls = buckets_of(length, documents), {}
    for bucket, smaller in zip(buckets, [Bucket(0, 1), *buckets]):
        count = sum(smaller.size < n <= bucket.size for n in lengths)
        for call in bucket.calls:
            calls[call], count = divmod(count, call.together)
    return {call: count for call, count in calls.items() if count}


def computed_pairs(lengths: Sequence[int], length: int) -> int:
    """Pairs of a query and a key that the dense calls compute for documents of these lengths, however many they are
    compiled for."""
    return sum(calls * call.pairs for call, calls in calls_of(lengths, length, len(lengths)).items())


def forward(
    dense: Callable,
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    documents: Int[Array, "D1"],
) -> tuple[Float[Array, "B S N H"], Float[Array, "B N S"]]:
    """(o, log-sum-exp) of causal attention inside of each document; both are 0 behind the last document.

    dense(q[G, L, N, H], k, v) -> (o, log-sum-exp[G, N, L]).
    """
    arrays = tuple(map(_packed, (q, k, v)))

    def call(slices, is_inside):
        o, lse = dense(*slices)
        return o, jnp.moveaxis(lse, 1, 2)

    statistics = jnp.zeros(arrays[0].shape[:2], jnp.float32)
    o, lse = _over_documents(call, arrays, (jnp.zeros_like(arrays[0]), statistics), documents, q.shape[1])
    return o.reshape(q.shape), jnp.moveaxis(lse.reshape(q.shape[:3]), 1, 2)


def backward(
    dense: Callable, q: Array, k: Array, v: Array, o: Array, lse: Array, do: Array, documents: Int[Array, "D1"]
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), 0 behind the last document.

    dense(q[G, L, N, H], k, v, o, log-sum-exp[G, N, L], do) -> (dq, dk, dv).
    """
    arrays = (*map(_packed, (q, k, v, o)), _packed(jnp.moveaxis(lse, 1, 2)), _packed(do))

    def call(slices, is_inside):
        q, k, v, o, lse, do = slices
        # A row behind the document adds nothing to dk and dv: its softmax weights and its do are 0. Its log-sum-exp is
        # of another document, so that without UNREACHABLE a weight could overflow.
        lse = jnp.where(is_inside[..., None], lse, UNREACHABLE)
        do = jnp.where(is_inside[..., None, None], do, jnp.zeros((), do.dtype))
        return dense(q, k, v, o, jnp.moveaxis(lse, 2, 1), do)

    gradients = _over_documents(call, arrays, tuple(map(jnp.zeros_like, arrays[:3])), documents, q.shape[1])
    return tuple(dx.reshape(x.shape) for dx, x in zip(gradients, (q, k, v)))


def _packed(x: Array) -> Array:
    """x[B, S, ...] -> x[P, ...]."""
    return x.reshape(-1, *x.shape[2:])


class _Plan(NamedTuple):
    """Documents in the order of their buckets, empty ones last. Bucket i has order[first[i]], ..., order[first[i + 1] -
    1]."""

    starts: Int[Array, "D"]
    lengths: Int[Array, "D"]
    order: Int[Array, "D"]
    first: Int[Array, "buckets+1"]

    @classmethod
    def of(cls, documents: Int[Array, "D1"], buckets: list[Bucket]) -> "_Plan":
        documents = documents.astype(jnp.int32)
        lengths = jnp.diff(documents)
        sizes = jnp.array([bucket.size for bucket in buckets], jnp.int32)
        number = jnp.where(lengths > 0, jnp.searchsorted(sizes, lengths), len(buckets))
        order = jnp.argsort(number, stable=True).astype(jnp.int32)
        first = jnp.searchsorted(number[order], jnp.arange(len(buckets) + 1), side="left").astype(jnp.int32)
        return cls(documents[:-1], lengths, order, first)

    def rows(self, call: Bucket, at: Array) -> tuple[Int[Array, "G L"], Bool[Array, "G L"]]:
        """Rows of the slices of the documents order[at], ..., and whether each is inside of its document."""
        document = self.order[at + jnp.arange(call.together, dtype=jnp.int32)]
        row = jnp.arange(call.size, dtype=jnp.int32)[None]
        return self.starts[document][:, None] + row, row < self.lengths[document][:, None]


def _over_documents(call: Callable, arrays: tuple, outputs: tuple, documents: Array, length: int) -> tuple:
    """The outputs[P, ...] with call's results in the rows of documents.

    call(slices[G, L, ...] of the arrays, is_inside[G, L]) -> results[G, L, ...].
    """
    buckets, tokens = buckets_of(length, documents.shape[0] - 1), arrays[0].shape[0]
    plan = _Plan.of(documents, buckets)
    outputs = tuple(vary_like(x, *arrays, plan.starts) for x in outputs)
    for i, bucket in enumerate(buckets):
        start, end = plan.first[i], plan.first[i + 1]
        for kind in bucket.calls:

            def one(turn, outputs, kind=kind, start=start):
                rows, is_inside = plan.rows(kind, start + turn * kind.together)
                # Rows behind the last token repeat it: they are outside of all documents.
                results = call(tuple(x.at[rows].get(mode="clip") for x in arrays), is_inside)
                # Rows that are not written have indices behind the end, each its own: all indices are unique.
                slots = jnp.arange(rows.size, dtype=jnp.int32).reshape(rows.shape)
                target = jnp.where(is_inside, rows, tokens + slots)
                return tuple(
                    out.at[target].set(x.astype(out.dtype), mode="drop", unique_indices=True)
                    for out, x in zip(outputs, results)
                )

            turns = (end - start) // kind.together
            outputs = lax.fori_loop(0, turns, one, outputs)
            start = start + turns * kind.together
    return outputs
