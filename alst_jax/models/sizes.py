"""Elements and numbers of a model's parameters, from its abstract parameters."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.tree import dotted, is_stacked, names


@dataclasses.dataclass(frozen=True)
class ParameterSizes:
    """Elements and numbers of parameters, of a whole model or of its trained parameters."""

    total: int
    layer: int  # elements of one layer
    layer_leaves: int  # parameters of one layer
    other_leaves: int  # parameters that are not stacked: the tables, the last norm
    tables: int  # elements of the embedding and the head; a tied table counts once
    head: int  # elements of the head's table
    largest_stack: int  # elements of the largest parameter of the layers, all layers together
    largest: int  # elements of the largest parameter
    matrices: tuple[tuple[int, int], ...]  # shapes of a layer's matrices


@functools.cache
def parameter_sizes(model: ModelConfig, freeze: str | None = None) -> ParameterSizes:
    """Sizes from the abstract parameters. freeze: leave out parameters whose dotted name this pattern matches."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model, jnp.float32))
    trained = [(names(path), is_stacked(path), leaf) for path, leaf in leaves
               if freeze is None or not re.search(freeze, dotted(path))]
    stacks = [leaf.size for _, stacked, leaf in trained if stacked]
    others = [(name, leaf) for name, stacked, leaf in trained if not stacked]
    head = "embed_tokens" if model.tie_word_embeddings else "lm_head"
    return ParameterSizes(
        total=sum(leaf.size for _, _, leaf in trained), layer=sum(stacks) // model.num_layers, layer_leaves=len(stacks),
        other_leaves=len(others), tables=sum(leaf.size for _, leaf in others if leaf.ndim > 1),
        head=sum(leaf.size for name, leaf in others if name[0] == head), largest_stack=max(stacks, default=0),
        largest=max((leaf.size for _, _, leaf in trained), default=0),
        matrices=tuple(leaf.shape[1:] for _, stacked, leaf in trained if stacked and leaf.ndim == 3))
