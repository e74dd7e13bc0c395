"""Attention kernels, forward and backward apart: TFLOPS of the causal half, and how far one kernel is from the other.

    python -m benchmarks.attention --shapes 32768x32x8 131072x32x8 524288x4x1

A shape is tokens x query heads x kv heads of head dim 128, bfloat16, batch 1. "tokamax" is its forward with cuDNN's
backward (`--attention tokamax`). Median of the repeats after a warm-up, synchronised; spread is max - min.
"""

import dataclasses
import statistics
import time

import tyro

from alst_jax.hardware import environment


@dataclasses.dataclass
class Options:
    shapes: tuple[str, ...] = ("32768x32x8", "131072x32x8", "524288x4x1")
    implementations: tuple[str, ...] = ("cudnn", "tokamax")
    repeats: int = 3


def main():
    options = tyro.cli(Options)
    environment.prepare(None)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from alst_jax.ops.attention import attention_backward, attention_forward

    def seconds(fn, *args):
        taken = []
        for _ in range(options.repeats + 1):
            started = time.perf_counter()
            jax.block_until_ready(fn(*args))
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:]), max(taken[1:]) - min(taken[1:])

    def error(a, b):
        a, b = (x.astype(jnp.float32) for x in (a, b))
        return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for shape in options.shapes:
        length, heads, kv_heads = map(int, shape.split("x"))
        keys = jax.random.split(jax.random.key(0), 4)
        make = lambda key, n: jax.random.normal(key, (1, length, n, 128), jnp.bfloat16)
        q, k, v, do = (make(key, n) for key, n in zip(keys, (heads, kv_heads, kv_heads, heads)))
        flops, results = 2 * length**2 * heads * 128, {}
        for name in options.implementations:
            forward = jax.jit(lambda q, k, v, name=name: attention_forward(q, k, v, kernel=name))
            backward = jax.jit(lambda *args, name=name: attention_backward(*args, name))
            o, statistics_ = forward(q, k, v)
            taken, spread = seconds(forward, q, k, v)
            back, back_spread = seconds(backward, q, k, v, o, statistics_, do)
            results[name] = [o, *statistics_, *backward(q, k, v, o, statistics_, do)]
            print(f"{shape:16} {name:8} forward {taken * 1e3:9.2f} ms (spread {spread * 1e3:.2f}) {flops / taken / 1e12:5.0f} TFLOPS  "
                  f"backward {back * 1e3:9.2f} ms (spread {back_spread * 1e3:.2f}) {2.5 * flops / back / 1e12:5.0f} TFLOPS", flush=True)
        first, *others = options.implementations
        for name in others:
            errors = [error(a, b) for a, b in zip(results[name], results[first])]
            print(f"{shape:16} {name} against {first}: relative error of o, log-sum-exp, dq, dk, dv: "
                  f"{np.array2string(np.array(errors), precision=2)}", flush=True)
        del results, o, statistics_, q, k, v, do


if __name__ == "__main__":
    main()
