"""Paths of the parameter tree."""

STACKED = "layers"  # parameters under this key have the layer dim in front, which is scanned, never sharded


def is_stacked(path: tuple) -> bool:
    """Whether the parameter at this tree path has a layer dim in front."""
    return path[0].key == STACKED
