"""A table of TFLOPS of the attention kernels on this machine's GPU, forward and backward pass separately.

    python -m benchmarks.attention --json attention.json
    python -m benchmarks.attention --kernels cudnn flash --shapes 131072x32x8 docs-8

A shape is tokens x query heads x kv heads of head dim 128, bfloat16, batch 1, causal; `docs-8` and `docs-64` are packed
documents in 131,072 tokens of 32 and 8 heads, for kernels that serve documents. The causal half counts (of documents:
of each), and a backward pass counts as 2.5 forward passes. Median of the repeats after a warm-up, synchronised; spread
is (max - min) / median.
"""

import dataclasses
import json
import statistics
import time

import tyro

from alst_jax.hardware import environment

HEAD_DIM, BACKWARD = 128, 2.5
DOCUMENTS = {"docs-8": [40000, 30000, 20000, 15000, 10000, 8000, 5000, 3072], "docs-64": [2048] * 64}
EMPTY = 8  # empty documents behind the others
DOCUMENT_HEADS = (32, 8)


@dataclasses.dataclass
class Options:
    kernels: tuple[str, ...] = ()
    """Default: all of the table but xla."""
    shapes: tuple[str, ...] = ("32768x32x8", "131072x32x8", "131072x4x1", "524288x4x1", *DOCUMENTS)
    repeats: int = 5
    json: str | None = None
    """Write the table to this file too."""


@dataclasses.dataclass
class Row:
    """One kernel at one shape. Milliseconds and TFLOPS are medians; spreads are parts of the median."""

    shape: str
    kernel: str
    forward_ms: float | None = None
    forward_spread: float | None = None
    forward_tflops: float | None = None
    backward_ms: float | None = None
    backward_spread: float | None = None
    backward_tflops: float | None = None
    error: str | None = None

    def words(self) -> str:
        if self.error:
            return f"{self.shape:12} {self.kernel:19} {self.error}"
        parts = [
            f"{ms:9.2f} ms +-{100 * spread:4.1f}% {tflops:4.0f}"
            for ms, spread, tflops in (
                (self.forward_ms, self.forward_spread, self.forward_tflops),
                (self.backward_ms, self.backward_spread, self.backward_tflops),
            )
        ]
        return f"{self.shape:12} {self.kernel:19} {parts[0]}   {parts[1]}"


def parse_shape(shape: str) -> tuple[list[int], int, int]:
    """Lengths of the documents (one: a dense sequence), query heads, kv heads. SystemExit for another form."""
    if shape in DOCUMENTS:
        return DOCUMENTS[shape], *DOCUMENT_HEADS
    parts = shape.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise SystemExit(f"--shapes {shape}: TOKENSxHEADSxKV_HEADS, or one of {', '.join(DOCUMENTS)}")
    length, heads, kv_heads = map(int, parts)
    return [length], heads, kv_heads


def causal_flops(lengths: list[int], heads: int) -> float:
    """Of the forward pass: two products, half of the scores."""
    return 2.0 * sum(n * n for n in lengths) * heads * HEAD_DIM


def timed(fn, args, repeats: int) -> tuple[float, float]:
    """Median seconds and spread, as a part of the median."""
    import jax

    jax.block_until_ready(fn(*args))
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(fn(*args))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken), (max(taken) - min(taken)) / statistics.median(taken)


def arrays_of(lengths: list[int], heads: int, kv_heads: int):
    """q, k, v, do and the offsets of documents (None: dense)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    keys = jax.random.split(jax.random.key(0), 4)
    made = [
        jax.random.normal(key, (1, sum(lengths), n, HEAD_DIM), jnp.bfloat16)
        for key, n in zip(keys, (heads, kv_heads, kv_heads, heads))
    ]
    ends = [*np.cumsum(lengths), *[sum(lengths)] * EMPTY]
    return *made, None if len(lengths) == 1 else jnp.asarray([0, *ends], jnp.int32)


def measure(shape: str, name: str, repeats: int) -> Row:
    """A row; the reason instead of numbers where the kernel fails."""
    import jax

    from alst_jax.ops.attention import AttentionSpec, attention_backward, attention_forward, find_kernel

    lengths, heads, kv_heads = parse_shape(shape)
    spec = AttentionSpec()
    try:
        find_kernel(name).prepare()
        q, k, v, do, documents = arrays_of(lengths, heads, kv_heads)
        forward = jax.jit(lambda q, k, v, documents: attention_forward(q, k, v, spec, documents, kernel=name))
        backward = jax.jit(
            lambda q, k, v, o, lse, do, documents: attention_backward(
                q, k, v, (o, lse), do, spec, documents, kernel=name
            )
        )
        there, there_spread = timed(forward, (q, k, v, documents), repeats)
        o, lse = forward(q, k, v, documents)
        back, back_spread = timed(backward, (q, k, v, o, lse, do, documents), repeats)
    except Exception as error:  # another kernel or shape may work
        return Row(shape, name, error=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    flops = causal_flops(lengths, heads) / 1e12
    return Row(shape, name, there * 1e3, there_spread, flops / there, back * 1e3, back_spread, BACKWARD * flops / back)


def pairs(options: Options) -> list[tuple[str, str]]:
    """Shapes and kernels to measure: documents only with kernels that serve them."""
    from alst_jax.ops.attention import KERNELS, find_kernel

    names = options.kernels or tuple(name for name in KERNELS if name != "xla")
    return [
        (shape, name)
        for shape in options.shapes
        for name in names
        if len(parse_shape(shape)[0]) == 1 or "documents" in find_kernel(name).serves
    ]


def main():
    options = tyro.cli(Options)
    environment.prepare(None)
    import jax

    card = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{card}; causal, head dim {HEAD_DIM}, bfloat16; median of {options.repeats}, spread (max - min) / median")
    print(
        f"{'shape':12} {'kernel':19} {'forward':>12} {'spread':>6} TFLOPS {'backward':>11} {'spread':>6} TFLOPS",
        flush=True,
    )
    rows = []
    for shape, name in pairs(options):
        rows.append(measure(shape, name, options.repeats))
        print(rows[-1].words(), flush=True)
        if options.json:
            table = {"card": card, "repeats": options.repeats, "rows": [dataclasses.asdict(row) for row in rows]}
            with open(options.json, "w") as file:
                json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
