"""Costs of Ulysses: the traffic of its all-to-alls and the bytes of its buffers, as plain numbers.

The counts follow parallel/ulysses.py. N query heads, K kv heads, T tokens of one device, H head dim.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The attention of one layer on one device. Bytes of arrays over the device's own tokens and all heads."""

    q: int  # [T, N, H]; the output o has the same shape
    kv: int  # [T, K, H], of k or of v
    heads: int  # N
    kv_heads: int  # K
    degree: int  # devices that share a sequence
    chunks: int  # head groups that run one after the other
    wide: int  # bytes of a float32 over bytes of an element

    @property
    def repeats(self) -> int:
        """How often each kv head of a head group is repeated, so that the degree divides the kv heads."""
        return self.degree // math.gcd(self.degree, max(1, self.kv_heads // self.chunks))

    @property
    def local_heads(self) -> int:
        """Query heads of one call of the attention kernel."""
        return max(1, self.heads // self.chunks // self.degree)

    @property
    def local_kv_heads(self) -> int:
        """kv heads of one call, repeated ones included."""
        return max(1, self.kv_heads // self.chunks * self.repeats // self.degree)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All-to-alls of one attention forward and one attention backward pass; bytes that one device sends in them."""

    forward_calls: int = 0
    forward_bytes: int = 0
    backward_calls: int = 0
    backward_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes on one device, beside the saved residuals and without the kernel's workspace."""

    swaps: bool  # whether arrays are swapped over devices; XLA then makes some of them early
    before: int  # one head group, before its gradients are made: q, k, v and do, swapped and transposed
    during: int  # one head group, in its backward pass: q, k, v, gradients; with several groups all of dk and dv
    output_copy: int  # the transposed copy of the output of all heads, made for the swap
    lone_output_copy: int  # the same copy of a saved output, where no loop goes over layers

    @property
    def peak(self) -> int:
        """The larger of the two stages."""
        return max(self.before, self.during)


def why_not(heads: int, kv_heads: int, degree: int, chunks: int) -> str | None:
    """Why these degrees (--sp, --head-chunks) do not suit the heads, and which do; None if they suit. The only rule."""
    if chunks < 1 or heads % chunks:
        return f"--head-chunks {chunks} must divide {heads} query heads; use {_divisors(heads)}"
    if heads // chunks % degree:
        of_chunk = f" of each of {chunks} chunks (--head-chunks)" if chunks > 1 else ""
        return (
            f"sp={degree} must divide {heads // chunks} query heads{of_chunk}; use {_divisors(heads // chunks)} (--sp)"
        )
    if chunks % kv_heads and kv_heads % chunks:
        return f"--head-chunks {chunks}: must divide the {kv_heads} kv heads or be a multiple of them"
    return None


def _divisors(number: int) -> str:
    works = [str(d) for d in range(1, number + 1) if number % d == 0]
    return works[0] if len(works) == 1 else ", ".join(works[:-1]) + " or " + works[-1]


def head_groups(heads: int, kv_heads: int, degree: int, most: int) -> list[int]:
    """The numbers of head groups, up to `most`, that the heads and the degree allow."""
    return [n for n in range(1, most + 1) if why_not(heads, kv_heads, degree, n) is None]


def traffic(shapes: Shapes) -> Traffic:
    """Calls and bytes of one layer's all-to-alls. Forward: q, k, v, o. Backward: these, and the gradients of each."""
    if shapes.degree == 1:
        return Traffic()
    k_and_v = 2 * shapes.kv * shapes.repeats * max(1, shapes.chunks // shapes.kv_heads)
    sent = lambda array: array * (shapes.degree - 1) // shapes.degree  # one part of each array stays
    forward = sent(2 * shapes.q + k_and_v)
    return Traffic(4 * shapes.chunks, forward, 8 * shapes.chunks, 2 * forward)


def work(shapes: Shapes) -> Work:
    """Buffers of one layer's attention."""
    swaps, chunks = shapes.degree > 1, shapes.chunks
    q = shapes.q // chunks
    kv = shapes.kv // min(chunks, shapes.kv_heads) * shapes.repeats
    if chunks == 1:
        before, during = (3 * q + 2 * kv) * swaps, 2 * q + 4 * kv
    else:  # head groups that read the same kv head sum its gradients in float32
        sums = 2 * shapes.kv * (shapes.wide if chunks > shapes.kv_heads else 1)
        before, during = 0, 4 * q + 4 * kv + sums
    one_head = shapes.heads == chunks * shapes.degree  # one head's transpose needs no copy
    return Work(swaps, before, during, shapes.q * (swaps and not one_head), shapes.q * (swaps and chunks == 1))
