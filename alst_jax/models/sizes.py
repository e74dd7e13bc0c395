"""Elements and numbers of a model's parameters, from its abstract parameters."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.lora import is_adapter, is_trained
from alst_jax.models.tree import is_stacked, names


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
    kernels: int  # elements of the linear layers' matrices
    adapters: int  # elements of adapters, which are float32
    matrices: tuple[tuple[int, int], ...]  # shapes of a layer's matrices

    def bytes(self, width: int) -> int:
        """Bytes of the parameters, where weights have `width` bytes."""
        return self.total * width + self.adapters * (4 - width)


@functools.cache
def parameter_sizes(model: ModelConfig) -> ParameterSizes:
    """Sizes of all parameters."""
    return _sizes(model, lambda path: True)


@functools.cache
def trained_sizes(model: ModelConfig, freeze: str | None) -> ParameterSizes:
    """Sizes of the parameters that are trained. freeze: see `is_trained`."""
    return _sizes(model, lambda path: is_trained(path, freeze, model.lora))


def _sizes(model: ModelConfig, chosen: Callable[[tuple], bool]) -> ParameterSizes:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model, jnp.float32))
    trained = [(names(path), is_stacked(path), leaf) for path, leaf in leaves if chosen(path)]
    stacks = [leaf.size for _, stacked, leaf in trained if stacked]
    others = [(name, leaf) for name, stacked, leaf in trained if not stacked]
    head = "embed_tokens" if model.tie_word_embeddings else "lm_head"
    return ParameterSizes(
        total=sum(leaf.size for _, _, leaf in trained),
        layer=sum(stacks) // model.num_layers,
        layer_leaves=len(stacks),
        other_leaves=len(others),
        tables=sum(leaf.size for _, leaf in others if leaf.ndim > 1),
        head=sum(leaf.size for name, leaf in others if name[0] == head),
        largest_stack=max(stacks, default=0),
        largest=max((leaf.size for _, _, leaf in trained), default=0),
        kernels=sum(leaf.size for name, _, leaf in trained if name[-1] == "kernel"),
        adapters=sum(leaf.size for name, _, leaf in trained if is_adapter(name)),
        matrices=tuple(
            leaf.shape[1:] for name, stacked, leaf in trained if stacked and leaf.ndim == 3 and not is_adapter(name)
        ),
    )


def needed_flops(model: ModelConfig, freeze: str | None, length: int) -> float:
    """Model FLOPs of one sequence (`ModelConfig.flops_per_sequence`): without gradients of frozen weights, with the
    products of adapters."""
    whole, trained = parameter_sizes(model), trained_sizes(model, freeze)
    frozen = whole.kernels - trained.kernels + whole.head - trained.head
    return model.flops_per_sequence(length) + (6.0 * whole.adapters - 2.0 * frozen) * length
