"""Names of the leaves of a parameter tree, the same for nested dicts and for Flax modules."""

from typing import Any

import jax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from alst_jax.models.tree import STACKED

VALUE = GetAttrKey("value")  # the last step to the array in an nnx variable


def names(path: tuple) -> tuple[str, ...]:
    """The names along a tree path: `("layers", "self_attn", "q_proj", "kernel")`. Names are returned unchanged.

    The `.value` of an nnx variable is left out. An index becomes text.
    """
    return tuple(_name(key) for key in path if key != VALUE)


def _name(key: Any) -> str:
    match key:
        case DictKey():
            return str(key.key)
        case GetAttrKey():
            return key.name
        case SequenceKey():
            return str(key.idx)
        case str():
            return key
    raise TypeError(f"{key!r}: trees of parameters have dicts, modules and sequences only")


def dotted(path: tuple) -> str:
    """The names joined by dots: `layers.self_attn.q_proj.kernel`."""
    return ".".join(names(path))


def stacked(path: tuple) -> bool:
    """Whether the leaf at this path, or with these names, has a layer dim in front."""
    return names(path)[0] == STACKED


def as_dict(tree: Any) -> dict[str, Any]:
    """Nested plain dicts with the leaves of any tree under their names. `None` is no leaf and is left out."""
    result: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *outer, last = names(path)
        inner = result
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = leaf
    return result
