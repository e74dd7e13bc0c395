"""The specification of attention, and the interface of a kernel."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """softmax(soft_cap(scale q k^T) + mask) v. Static: a compiled program serves one spec.

    scale: None is head_dim ** -0.5. window: a query reads the keys of itself and of window - 1 tokens
    before it and, if not causal, after it. soft_cap: scores become soft_cap * tanh(scores / soft_cap). causal: a query
    reads no later key. sinks: each head has a score more, which `attention` takes as an array beside q, k and v.
    """

    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None
    causal: bool = True
    sinks: bool = False

    def scale_of(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale

    def features(self, documents: bool) -> frozenset[str]:
        """Abilities that a kernel needs beside causal attention: "scale", "window", "soft cap", "full", "sinks",
        "documents"."""
        wanted = {
            "scale": self.scale is not None,
            "window": self.window is not None,
            "soft cap": self.soft_cap is not None,
            "full": not self.causal,
            "sinks": self.sinks,
            "documents": documents,
        }
        return frozenset(name for name, value in wanted.items() if value)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation of attention over whole sequences, for the heads of one device. Yours may be passed by hand.

    forward(q[B, S, N, H], k[B, S, K, H], v, spec, documents) -> (o[B, S, N, H], log-sum-exp[B, N, S] float32); query
    head n reads kv head n // (N / K). backward(q, k, v, o, lse, do, spec, documents) -> (dq, dk, dv). documents: None
    (each sequence is one), or int32[D + 1] offsets into the B S tokens. Attention stays inside a document, no document
    crosses the border of a sequence, and repeated last offsets are empty documents. Sinks are added to its results
    (sinks.py): a kernel that serves them takes o and lse with the sinks in backward, and recomputes its weights from
    lse.

    serves: the features of a spec that it implements; a spec with others is refused. prepare(): called before anything
    is traced. needs_gpu, dtypes, multiple (of tokens a sequence must have), head_dims (a description and a test) and
    capabilities (of GPUs, None: all) say where it runs.
    """

    name: str
    forward: Callable
    backward: Callable
    serves: frozenset[str] = frozenset()
    prepare: Callable[[], None] = lambda: None
    needs_gpu: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float64", "float16")
    multiple: int = 1
    head_dims: tuple[str, Callable[[int], bool]] = ("any", lambda head_dim: True)
    capabilities: tuple[str, ...] | None = None
    package: str | None = None  # a module that must be installed
    install: str = ""  # how
