"""LongPPL: the perplexity of the tokens that need the long context (arXiv 2410.23771, "What is Wrong with Perplexity
for Long-context Language Modeling?").

A token is a key token if the whole context makes it likelier than the last K tokens do, and it is likely:

    loss(token | K tokens) - loss(token | all tokens before) > 2     the gain of its log-probability
    loss(token | all tokens before) < 2                              its log-probability is above -2

LongPPL = exp(mean loss of the key tokens, given all tokens before). As in the paper's own program, the short context is
a window that moves on by K / 4 tokens (1,024 of 4,096): a token sees K to K + K / 4 - 1 tokens. Here the model that is
judged chooses the key tokens itself, so that another model has others: their number is told too.
"""

import math
from typing import NamedTuple

import numpy as np

from alst_jax.config import IGNORED
from alst_jax.data.pieces import Sequence

GAIN, LEAST_LOG_PROBABILITY = 2.0, -2.0  # alpha and beta of the paper


class Window(NamedTuple):
    """Tokens [start, stop) of a sequence. The losses of the labels from `first` on (an index of the sequence) count."""

    start: int
    stop: int
    first: int


def windows(length: int, context: int) -> list[Window]:
    """The short contexts of a sequence; none if it is not longer than `context`."""
    step = max(1, context // 4)
    return [
        Window(start, min(start + context + step, length), start + context - 1)
        for start in range(0, length - context, step)
    ]


def cut(sequence: Sequence, window: Window) -> Sequence:
    """The window as a separate sequence: views, no copies."""
    return Sequence(sequence.tokens[window.start : window.stop], sequence.labels[window.start : window.stop])


def short_losses(length: int, found: list[tuple[Window, np.ndarray]]) -> np.ndarray:
    """float32[length]: the loss of each label given its short context; NaN before the first window's labels.

    found: the windows of a sequence with the losses of their labels.
    """
    losses = np.full(length, np.nan, np.float32)
    for window, values in found:
        losses[window.first : window.stop - 1] = values[window.first - window.start : window.stop - 1 - window.start]
    return losses


def key_tokens(long: np.ndarray, short: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool: the key tokens among the labels, from their losses with the long and the short context (NaN: none)."""
    with np.errstate(invalid="ignore"):
        gained = short - long > GAIN
    return gained & (-long > LEAST_LOG_PROBABILITY) & (labels != IGNORED)


class LongPpl(NamedTuple):
    """The sums behind a LongPPL, which may be added.

    loss: of the key tokens; keys: their number; all_loss, judged: of all labels that have a short context.
    """

    loss: float = 0.0
    keys: int = 0
    all_loss: float = 0.0
    judged: int = 0

    @staticmethod
    def of(long: np.ndarray, short: np.ndarray, labels: np.ndarray) -> "LongPpl":
        """Of one sequence."""
        keys = key_tokens(long, short, labels)
        judged = (labels != IGNORED) & ~np.isnan(short)
        total = lambda chosen: float(long[chosen].sum(dtype=np.float64))
        return LongPpl(total(keys), int(keys.sum()), total(judged), int(judged.sum()))

    def plus(self, other: "LongPpl") -> "LongPpl":
        return LongPpl(*(one + two for one, two in zip(self, other)))

    @property
    def value(self) -> float | None:
        """LongPPL; None without a key token."""
        return math.exp(self.loss / self.keys) if self.keys else None

    @property
    def usual(self) -> float | None:
        """The perplexity of all labels that have a short context."""
        return math.exp(self.all_loss / self.judged) if self.judged else None
