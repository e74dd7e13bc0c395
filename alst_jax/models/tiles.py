"""The sizes of tiles, resolved from a profile and a model: the only place that knows the usual sizes."""

from typing import NamedTuple

from alst_jax.models.config import ModelConfig
from alst_jax.ops.cross_entropy import default_tile
from alst_jax.profile import Switches


class Tiles(NamedTuple):
    """Tokens per tile; None: untiled."""

    loss: int | None
    mlp: int | None


def usual_tiles(model: ModelConfig) -> Tiles:
    """About 1 GiB of float32 logits; the hidden size, so that a tile's [C, F] is as large as a weight."""
    return Tiles(default_tile(model.vocab_size), model.hidden_size)


def tile_sizes(profile: Switches, model: ModelConfig) -> Tiles:
    """The tiles that the step computes with."""
    usual = usual_tiles(model)
    size = lambda asked, usual: usual if asked == 0 else asked
    return Tiles(size(profile.loss_tile, usual.loss), size(profile.mlp_tile, usual.mlp))
