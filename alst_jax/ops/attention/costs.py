"""Costs of the attention kernels: their speed, and bytes of a device in the backward pass. Plain numbers for plans."""

import math

from alst_jax.ops.attention import buckets, flash_rates
from alst_jax.ops.attention.cudnn import CUDNN_MAX_ELEMENTS
from alst_jax.ops.attention.flash_tiles import workspace_bytes

# TFLOP/s by tokens of the whole sequence, measured on an H100 and an H200 at head dim 128 (docs/log.md,
# benchmarks/results). Other machines are assumed to reach the same part of their peak.
RATES = {
    "cudnn": {"forward": {32768: 647, 131072: 590, 524288: 481}, "backward": {32768: 529, 131072: 513, 524288: 550}}
} | flash_rates.RATES
RATES_BY_HEADS = {"flash": flash_rates.RATES_BY_HEADS}  # TFLOP/s the same, by the query heads of one call
MANY_HEADS = 32
# Packed documents: TFLOP/s of useful work by the sum of the documents' squares over the sum of their lengths.
DOCUMENT_RATES = {"flash": flash_rates.DOCUMENT_RATES, "cudnn": buckets.DOCUMENT_RATES}
MEASURED_PEAK = 989  # TFLOP/s of the measured device
UNMEASURED = 0.05  # part of the peak, for kernels that are not in the table


def speed(kernel: str, which: str, length: int, peak: float, packed: bool = False, heads: int | None = None) -> float:
    """FLOP/s of causal FLOPs at sequences of `length`, between the measured lengths by the logarithm. which: "forward"
    or "backward". packed: of documents, where `length` is the sum of their squares over the sum of their lengths.
    heads: query heads of one call, between the measured numbers by the logarithm; None: many."""
    if kernel not in RATES:
        return UNMEASURED * peak
    if packed:
        return _between(DOCUMENT_RATES.get(kernel, RATES[kernel])[which], length) / MEASURED_PEAK * peak
    by_heads = {MANY_HEADS: RATES[kernel]} | RATES_BY_HEADS.get(kernel, {})
    rates = {number: _between(by_length[which], length) for number, by_length in by_heads.items()}
    return _between(rates, heads or MANY_HEADS) / MEASURED_PEAK * peak


def _between(values: dict[int, float], at: int) -> float:
    """The value at a number, between the known ones by the logarithm; outside of them the nearest."""
    points = sorted(values.items())
    at = min(max(at, points[0][0]), points[-1][0])
    for (low, first), (high, second) in zip(points, points[1:]):
        if at <= high:
            return first + math.log(at / low) / math.log(high / low) * (second - first)
    return points[0][1]


def workspace(kernel: str, rows: int, length: int, heads: int, kv_heads: int, head_dim: int, documents: int = 0) -> int:
    """Bytes of a kernel's workspace in the backward pass of q[rows, length, heads, head_dim].

    cuDNN's: float32 dq, and dk and dv of each query head of one call. documents: of packed sequences at most.
    """
    if kernel == "xla":
        return 0
    if str(kernel).startswith("flash"):
        ordered = kernel == "flash-deterministic"
        return workspace_bytes(rows, length, heads, kv_heads, head_dim, documents=documents, ordered=ordered)
    if documents:  # the largest call is on one slice of a sequence's length
        rows = 1
    while rows * length * heads * head_dim > CUDNN_MAX_ELEMENTS and heads % 2 == 0:  # as cudnn.py splits them
        heads //= 2
    return rows * length * heads * head_dim * 8


def document_slices(kernel: str, length: int, heads: int, kv_heads: int, head_dim: int, width: int) -> int:
    """Bytes of the copies that buckets.py makes for the longest document's call: q, k, v, o and do, and dq, dk and dv,
    of elements of `width` bytes. 0 for kernels that take all documents at once."""
    return 4 * length * (heads + kv_heads) * head_dim * width * (kernel == "cudnn")
