"""A memory profile: where things live and how much is worked on at a time. Data, not code; every switch is independent."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Profile:
    """Each switch changes memory and speed, never the result. None for a tile means untiled; 0 the default size."""

    loss_tile: int | None = 0
    mlp_tile: int | None = 0
    remat: bool = True
    offload_activations: bool = False
    offload_weights: bool = False
    offload_optimizer: bool = False
    segment_layers: int = 1  # layers between two kept layer inputs
    keep_attention_on_device: int = 0  # layers of each segment whose attention output and log-sum-exp are kept
    keep_attention_on_host: int = 0  # the same, in host memory
    head_chunks: int = 1  # groups of heads that are worked on one after the other
    attention: Literal["cudnn", "xla"] = "xla"
    compute_dtype: str = "float32"
    reduce_dtype: str = "float32"
