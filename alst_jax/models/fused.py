"""Tensors that files hold fused: several weights of a layer, one below the other, in one tensor."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from alst_jax.config import UserError
from alst_jax.models.weight_files import Tensor, Unwritten

Fused = Mapping[str, tuple[str, ...]]  # pattern of the tensor's name -> names of its parts, with {} for the layer


def split(
    tensors: dict[str, Tensor], fused: Fused, layers: int, shapes: dict[str, tuple[int, ...]], where: str
) -> dict[str, Tensor]:
    """The tensors, with the parts of each fused tensor instead of it. shapes: of all tensors that the model expects."""
    result = dict(tensors)
    for layer in range(layers if fused else 0):
        for name, parts in _of_layer(fused, layer).items():
            if name not in tensors:
                continue
            whole, first = result.pop(name), 0
            expected = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
            if whole.shape != expected:
                raise UserError(
                    f"{where}: the weights are not those config.json describes: {name} "
                    f"{list(whole.shape)}, not {list(expected)}"
                )
            for part in parts:
                result[part] = whole._replace(shape=shapes[part], first=first)
                first += shapes[part][0]
    return result


def join(tensors: Iterable[Unwritten], fused: Fused, layers: int) -> Iterator[Unwritten]:
    """The tensors with the fused ones in place of their parts. A part is held, unread, until the others come."""
    of_parts = {
        part: (name, parts)
        for layer in range(layers if fused else 0)
        for name, parts in _of_layer(fused, layer).items()
        for part in parts
    }
    held: dict[str, Unwritten] = {}
    for tensor in tensors:
        if tensor.name not in of_parts:
            yield tensor
            continue
        held[tensor.name] = tensor
        name, parts = of_parts[tensor.name]
        if all(part in held for part in parts):
            found = [held.pop(part) for part in parts]
            shape = (sum(part.shape[0] for part in found), *tensor.shape[1:])
            read = lambda found=found: np.concatenate([part.read() for part in found])
            yield Unwritten(name, shape, tensor.dtype, read)


def _of_layer(fused: Fused, layer: int) -> dict[str, tuple[str, ...]]:
    return {name.format(layer): tuple(part.format(layer) for part in parts) for name, parts in fused.items()}
