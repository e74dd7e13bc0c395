"""Loss by position: the mean loss of the labels at each distance from the beginning of a sequence."""

from typing import NamedTuple

import numpy as np

from alst_jax.config import IGNORED

POINTS = 64  # of a curve, at most


class Band(NamedTuple):
    """Positions [start, stop): the mean loss of their labels, and the number of these."""

    start: int
    stop: int
    loss: float | None
    labels: int

    @property
    def name(self) -> str:
        """As in the names of metrics."""
        return f"{self.start}-{self.stop}"


def doublings(length: int) -> list[int]:
    """Borders of bands, each as long as all before it: 0, ..., length / 4, length / 2, length; the first is 1,024 or,
    of short sequences, length / 64."""
    borders = [length]
    while borders[0] // 2 >= min(1024, max(16, length // 64)):
        borders.insert(0, borders[0] // 2)
    return [0, *borders]


def bands(losses: list[np.ndarray], labels: list[np.ndarray], borders: list[int]) -> list[Band]:
    """The bands between the borders, over several sequences that begin at position 0."""
    found = []
    for start, stop in zip(borders, borders[1:]):
        parts = [loss[start:stop][label[start:stop] != IGNORED] for loss, label in zip(losses, labels)]
        values = np.concatenate(parts) if parts else np.zeros(0)
        mean = float(values.mean(dtype=np.float64)) if values.size else None
        found.append(Band(start, stop, mean, int(values.size)))
    return found


def curve(losses: list[np.ndarray], labels: list[np.ndarray], length: int) -> list[Band]:
    """Bands of equal length, for a plot."""
    return bands(losses, labels, np.linspace(0, length, min(POINTS, length) + 1).astype(int).tolist())
