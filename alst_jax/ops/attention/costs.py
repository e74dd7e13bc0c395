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
# Packed documents: TFLOP/s of useful work by the sum of the documents' squares over the sum of their lengths.
DOCUMENT_RATES = {"flash": flash_rates.DOCUMENT_RATES, "cudnn": buckets.DOCUMENT_RATES}
MEASURED_PEAK = 989  # TFLOP/s of the measured device
UNMEASURED = 0.05  # part of the peak, for kernels that are not in the table


def speed(kernel: str, which: str, length: int, peak: float, packed: bool = False) -> float:
    """FLOP/s of causal FLOPs at sequences of `length`, between the measured lengths by the logarithm. which: "forward"
    or "backward". packed: of documents, where `length` is the sum of their squares over the sum of their lengths."""
    if kernel not in RATES:
        return UNMEASURED * peak
    rates = DOCUMENT_RATES.get(kernel, RATES[kernel]) if packed else RATES[kernel]
    points = sorted(rates[which].items())
    length = min(max(length, points[0][0]), points[-1][0])
    for (low, slow), (high, fast) in zip(points, points[1:]):
        if length <= high:
            part = math.log(length / low) / math.log(high / low)
            return (slow + part * (fast - slow)) / MEASURED_PEAK * peak
    raise AssertionError("the points cover their own range")


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
