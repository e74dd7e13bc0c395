"""A method that is one compiled program over a mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

Of = Callable[[Any], Any]


class Program:
    """A method on local arrays; read from an object it is `jax.jit(jax.shard_map(method))` over the object's `mesh`.

    The compiled function is made when it is first read, and has `lower`, `trace` and all else that `jax.jit` gives. The
    class's attribute is the method itself, so that `help` shows its signature and docstring.
    """

    def __init__(
        self, method: Callable, inputs: Of | None, outputs: Of | None, places: Of | None, donate: Sequence[int]
    ):
        self.method, self.inputs, self.outputs, self.places, self.donate = method, inputs, outputs, places, donate
        functools.update_wrapper(self, method)

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self.method
        local = functools.partial(self.method, owner)
        functools.update_wrapper(local, self.method)
        if self.inputs is not None:
            local = jax.shard_map(local, mesh=owner.mesh, in_specs=self.inputs(owner), out_specs=self.outputs(owner))
        places = {} if self.places is None else {"out_shardings": self.places(owner)}
        compiled = jax.jit(local, donate_argnums=self.donate, **places)
        vars(owner)[self.__name__] = compiled  # found before this descriptor from now on
        return compiled


def program(
    inputs: Of | None = None, outputs: Of | None = None, places: Of | None = None, donate: Sequence[int] = ()
) -> Callable[[Callable], Program]:
    """Decorates a method of an object with a `mesh`.

    inputs, outputs: object -> PartitionSpecs of the arguments and of the results; None: no shard_map, the method sees
    whole arrays. places: object -> shardings of the results, which say in which memory they live; None: jit's choice.
    donate: numbers of arguments whose buffers the results reuse; they must not be read again.
    """
    return lambda method: Program(method, inputs, outputs, places, donate)
