"""The parameter tree: names of its leaves, which leaves are stacked, and its division into parts.

A tree is a dict of arrays and Flax modules, which are pytrees. A part of a tree has the whole structure, with None
where a leaf belongs to the other part.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

STACKED = "layers"  # parameters under this key have the layer dim in front, which is scanned, never sharded

VALUE = GetAttrKey("value")  # the last step to the array in an nnx variable

PyTree = Any


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


def is_stacked(path: tuple) -> bool:
    """Whether the leaf at this path, or with these names, has a layer dim in front."""
    return names(path)[0] == STACKED


def partition(tree: PyTree, chosen: Callable[[tuple], bool]) -> tuple[PyTree, PyTree]:
    """(the leaves whose path is chosen, the others); `combine` undoes it."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    pick = lambda wanted: treedef.unflatten([leaf if chosen(path) == wanted else None for path, leaf in leaves])
    return pick(True), pick(False)


def combine(part: PyTree, other: PyTree) -> PyTree:
    """The tree that `partition` divided into these two parts."""
    is_none = lambda x: x is None
    return jax.tree.map(lambda a, b: b if a is None else a, part, other, is_leaf=is_none)


def leaves_read_by(fn: Callable, tree: PyTree) -> frozenset[tuple[str, ...]]:
    """Names of the leaves of an (abstract) tree that fn(tree) reads."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    jaxpr = jax.make_jaxpr(lambda *arrays: fn(treedef.unflatten(arrays)))(*(leaf for _, leaf in leaves)).jaxpr
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    return frozenset(names(path) for (path, _), v in zip(leaves, jaxpr.invars, strict=True) if id(v) in read)


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
