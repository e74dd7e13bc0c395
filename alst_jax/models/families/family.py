"""A family of models: the part of Hugging Face's format that differs between architectures."""

import dataclasses
from collections.abc import Callable
from typing import Any

from alst_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers, as config.json and the tensors of its weights describe it.

    implemented: fields of config.json that only this family reads. options(config.json, where) -> arguments of
    ModelConfig from these fields; UserError, which begins with `where`, for a value that is not implemented.
    fields(ModelConfig) -> these fields again. keys: names of a block's parameter -> pattern of its Hugging Face name,
    with {} for the layer. defaults: of fields that config.json may leave out, where they are not Llama's.
    ropes(config.json, where) -> (settings, base if they have none) of each rotary embedding, where layers have several.
    fused: patterns of tensors in files -> patterns (as in `keys`) of the weights that lie in them, one below the other.
    partial_rope: `partial_rotary_factor` is implemented.
    """

    model_type: str
    architecture: str
    implemented: frozenset[str]
    options: Callable[[dict[str, Any], str], dict[str, Any]]
    fields: Callable[[ModelConfig], dict[str, Any]]
    keys: dict[tuple[str, ...], str]
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    ropes: Callable[[dict[str, Any], str], list[tuple[Any, Any]]] | None = None
    fused: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    partial_rope: bool = False
