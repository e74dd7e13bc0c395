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
    attention: Literal["cudnn", "xla"] = "xla"
    compute_dtype: str = "float32"
    reduce_dtype: str = "float32"
