"""The parameter tree: names of its leaves, which leaves are stacked, and its division into parts.

A tree is a dict of arrays and Flax modules, which are pytrees. A part of a tree has the whole structure, with None where a
leaf belongs to the other part.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey

STACKED = "layers"  # parameters under this key have the layer dim in front, which is scanned, never sharded

PyTree = Any


def names(path: tuple) -> tuple[str, ...]:
    """The names on a tree path, ("layers", "self_attn", "q_proj", "kernel"), through dicts and Flax modules alike."""
    keys = (key for key in path if not (isinstance(key, GetAttrKey) and key.name == "value"))  # an nnx.Param's content
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in keys)


def dotted(path: tuple) -> str:
    """The names on a tree path as one string, `layers.self_attn.q_proj.kernel`."""
    return ".".join(names(path))


def is_stacked(path: tuple) -> bool:
    """Whether the parameter at this tree path has a layer dim in front."""
    return names(path)[0] == STACKED


def partition(tree: PyTree, chosen: Callable[[tuple], bool]) -> tuple[PyTree, PyTree]:
    """(the leaves whose path is chosen, the others); `combine` undoes it."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    pick = lambda wanted: treedef.unflatten([leaf if chosen(path) == wanted else None for path, leaf in leaves])
    return pick(True), pick(False)


def combine(part: PyTree, other: PyTree) -> PyTree:
    """The tree of which these are the two parts."""
    is_none = lambda x: x is None
    return jax.tree.map(lambda a, b: b if a is None else a, part, other, is_leaf=is_none)


def leaves_read_by(fn: Callable, tree: PyTree) -> frozenset[tuple[str, ...]]:
    """Names of the leaves of an (abstract) tree that fn(tree) reads."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    jaxpr = jax.make_jaxpr(lambda *arrays: fn(treedef.unflatten(arrays)))(*(leaf for _, leaf in leaves)).jaxpr
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    return frozenset(names(path) for (path, _), v in zip(leaves, jaxpr.invars, strict=True) if id(v) in read)
