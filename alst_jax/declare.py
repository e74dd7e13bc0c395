"""How a flag is declared: a field's type holds its check and its words, beside its default and its help text.

    head_chunks: Annotated[int, AtLeast(1), Words("{} head chunks", off=1), CHOSEN] = 1

Imports no jax, so that `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import tyro


class UserError(Exception):
    """A user's mistake. The text has the given value, the rule, the fix and the flag; the command line exits with 2."""


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """The check of a number, or of each number of a tuple. None is not checked."""

    least: int


@dataclasses.dataclass(frozen=True)
class Words:
    """A memory feature in the words of a run's first lines; `{}` is its value. off: the value without the feature."""

    text: str
    off: Any = False


CHOSEN = "chosen by --memory auto"
"""Marks the flags that `--memory auto` may choose where they were not typed."""


def default(text: str) -> object:
    """Marks a flag whose default in `--help` is this text, because the field's own says too little."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def parse_length(text: str) -> int:
    """`32768`, `32k` (x1000), `32Ki` (x1024), `1.5M`, `1Mi` -> tokens."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(k|K|M|Ki|Mi)?\s*", str(text))
    if match is None:
        raise ValueError(f"length {text!r}: write tokens as 32768, 32k (x1000), 32Ki (x1024), 1M or 1Mi")
    scale = {None: 1, "k": 10**3, "K": 10**3, "Ki": 2**10, "M": 10**6, "Mi": 2**20}[match[2]]
    value = float(match[1]) * scale
    if value < 1 or value != math.floor(value):
        raise ValueError(f"length {text!r} is {value:g} tokens: a length is a whole number of at least 1")
    return int(value)


Length = Annotated[int, tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="TOKENS", instance_from_str=lambda args: parse_length(args[0]),
    is_instance=lambda x: isinstance(x, int), str_from_instance=lambda x: [str(x)])]


def flag(field: str) -> str:
    """`seq_len` -> `--seq-len`."""
    return "--" + field.replace("_", "-")


@functools.cache
def declared(flags: type) -> dict[str, tuple[Any, ...]]:
    """For each field of a dataclass of flags: what its type was annotated with."""
    types = typing.get_type_hints(flags, include_extras=True)
    return {field.name: getattr(types[field.name], "__metadata__", ()) for field in dataclasses.fields(flags)}


def marked(flags: type, mark: type | str) -> dict[str, Any]:
    """The fields whose types have a mark, or a mark of this class, and that mark."""
    found = {}
    for name, marks in declared(flags).items():
        found |= {name: m for m in marks if (isinstance(m, mark) if isinstance(mark, type) else m is mark)}
    return found


def too_small(flags: Any) -> Iterator[str]:
    """A message for each number below its `AtLeast`."""
    for name, rule in marked(type(flags), AtLeast).items():
        value = getattr(flags, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or not all(n is None or n >= rule.least for n in numbers):
            each = " each" if isinstance(value, tuple) else ""
            yield f"{flag(name)} {in_words(value)}: must be at least {rule.least}{each}"


def in_words(value: Any) -> str:
    """A flag's value as it is typed: a tuple's elements one after the other."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
