"""Costs of the evaluation at length: the texts that it reads. Plain numbers for plans."""

import collections

from alst_jax.at_length.longppl import windows
from alst_jax.at_length.tasks import cells
from alst_jax.config import TrainConfig


def documents(config: TrainConfig, length: int) -> collections.Counter[int]:
    """How many texts of each length one evaluation reads, if the held-out text has as many as are asked for."""
    found = collections.Counter({length: config.eval_long_sequences})
    for window in windows(length, config.eval_long_context):
        found[window.stop - window.start] += config.eval_long_sequences
    for _, size, _ in cells(length):
        found[size] += config.eval_long_samples
    return found
