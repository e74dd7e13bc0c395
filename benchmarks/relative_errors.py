"""How far two runs are from each other: losses, norms, first moments and updates of all parameters."""

import concurrent.futures
import math
from typing import Any

import numpy as np

PARTS = ("loss", "norm", "moments", "worst of moments", "updates", "worst of updates")
THREADS, PIECE = 8, 1 << 24  # that compare, and the numbers that each subtracts at once: 64 MiB


def compare(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Relative errors, PARTS: the largest of the steps, of the norm of the whole difference, and of the worst
    parameter. ValueError if the two have not as many steps and the same parameters."""
    for name in ("losses", "norms", "moments", "updates"):
        here, there = [[np.shape(x) for x in tree[name]] for tree in (result, reference)]
        if here != there:
            raise ValueError(f"{name}: {len(here)} of shapes {here} beside {len(there)} of shapes {there}")

    def length(a, b=None) -> float:  # of a - b, some numbers at a time: a difference is as large as its parameter
        a, b = a.reshape(-1), None if b is None else b.reshape(-1)
        with np.errstate(all="ignore"):  # judge sees numbers that are not finite
            return math.hypot(
                *(
                    float(np.linalg.norm(a[i : i + PIECE] if b is None else a[i : i + PIECE] - b[i : i + PIECE]))
                    for i in range(0, a.size, PIECE)
                )
            )

    with np.errstate(all="ignore"), concurrent.futures.ThreadPoolExecutor(THREADS) as threads:  # billions of numbers
        numbers = lambda name: float(np.max(np.abs(np.divide(result[name], reference[name]) - 1)))
        errors = {"loss": numbers("losses"), "norm": numbers("norms")}
        for name in ("moments", "updates"):
            off = np.array(list(threads.map(length, result[name], reference[name])))
            size = np.array(list(threads.map(length, reference[name])))
            errors |= {
                name: float(np.linalg.norm(off) / np.linalg.norm(size)),
                f"worst of {name}": float(np.max(off / size)),
            }
    return errors
