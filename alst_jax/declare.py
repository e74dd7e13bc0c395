"""The declaration of a flag: a field whose type has its check and its words, beside its default and its help text.

    head_chunks: Annotated[int, AtLeast(1), Words("{} head chunks", off=1), CHOSEN] = 1

Imports no jax, so that `--help` is instant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
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
    """A mark: the text of the default in `--help`, where the value of the field says too little."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def parse_length(text: str) -> int:
    """`32768`, `32k` (x1000), `32Ki` (x1024), `1.5M`, `1Mi` -> tokens."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(k|K|M|Ki|Mi)?\s*", str(text))
    if match is None:
        raise ValueError(f"length {text!r}: write tokens as 32768, 32k (x1000), 32Ki (x1024), 1M or 1Mi")
    scale = {None: 1, "k": 10**3, "K": 10**3, "Ki": 2**10, "M": 10**6, "Mi": 2**20}[match[2]]
    value = float(match[1]) * scale
    if not value < LONGEST:
        raise ValueError(f"length {shortened(text)!r}: a length is below 2^63 tokens")
    if value < 1 or value != int(value):
        raise ValueError(f"length {text!r} is {value:g} tokens: a length is a whole number of at least 1")
    return int(value)


LONGEST = 2**63  # tokens: more has no place in an array's index


def shortened(text: str, most: int = 60) -> str:
    """A text as messages show it: its beginning, if it is long."""
    return text if len(text) <= most else text[:most] + "..."


Length = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="TOKENS",
        instance_from_str=lambda args: parse_length(args[0]),
        is_instance=lambda x: isinstance(x, int),
        str_from_instance=lambda x: [str(x)],
    ),
]


# Words of Python and tyro about values -> plain words.
_PLAIN = (
    (re.compile(r"invalid literal for int\(\) with base 10: (.*)"), r"\1 is not a whole number"),
    (re.compile(r"could not convert string to float: (.*)"), r"\1 is not a number"),
    (re.compile(r"Could not find valid parse for arguments: (.*)"), r"\1 are not all values of this flag"),
)


def command_line(target: Callable[..., Any], **options: Any) -> Any:
    """tyro.cli(target). A command line that is refused is one UserError, not a box of lines with the parser's types."""
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused), without_typeguard():
            return tyro.cli(target, **options)
    except SystemExit as stopped:
        if stopped.code != 2:
            raise
        raise UserError(_refusal(refused.getvalue())) from stopped


@contextlib.contextmanager
def without_typeguard() -> Iterator[None]:
    """tyro checks the defaults of flags against their types at each start, with typeguard, whose import takes a quarter
    of a second. Here all defaults pass; a test checks them."""
    if "typeguard" in sys.modules:
        yield
        return
    sys.modules["typeguard"] = types.SimpleNamespace(check_type=lambda value, of: value, TypeCheckError=TypeError)
    try:
        yield
    finally:
        del sys.modules["typeguard"]


def _refusal(box: str) -> str:
    """One line of the box that tyro prints: the flag, the reason, the flag's values."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()
    if any(line.startswith("│") for line in lines):
        rows = [line.strip("│ ") for line in lines if line.startswith("│")]
    else:  # in ASCII: a title above a line of dashes
        rows = [line.strip() for line in lines[2:]]
    parts = [" ".join(part.split()) for part in re.split("[─-]{9,}", "\n".join(rows))]
    text, more = parts[0], parts[1] if len(parts) > 2 else ""
    wrong, _, reason = text.removeprefix("Error parsing ").partition(": ")
    help_text = f"see {pathlib.PurePath(sys.argv[0]).name} --help"
    if text.startswith("Unrecognized options: "):
        meant = ", ".join(row.split()[0] for row in rows if re.match("--[a-z]", row))
        what = "no such flag" if reason.startswith("-") else "neither a flag nor a value of one"
        return f"{shortened(reason)}: {what}; {f'perhaps you meant {meant}; ' if meant else ''}{help_text}"
    if not text.startswith("Error parsing "):
        return f"{text.rstrip('.')}; {help_text}"
    # A flag that may be None gives several errors; the last one belongs to its type.
    reason = re.split(r" - (?:<class '\w+'>|typing\..*?_action=None\)\]): ", reason)[-1]
    for pattern, plain in _PLAIN:
        reason = pattern.sub(plain, reason)
    takes = more.removeprefix("Argument helptext: ").partition(" (default: ")[0].rstrip(".")
    return f"{wrong}: {reason} ({takes}); {help_text}"


def flag(field: str) -> str:
    """`seq_len` -> `--seq-len`."""
    return "--" + field.replace("_", "-")


@functools.cache
def declared(flags: type) -> dict[str, tuple[Any, ...]]:
    """For each field of a dataclass of flags: the annotations of its type."""
    types = typing.get_type_hints(flags, include_extras=True)
    return {field.name: getattr(types[field.name], "__metadata__", ()) for field in dataclasses.fields(flags)}


def marked(flags: type, mark: type | str) -> dict[str, Any]:
    """The fields whose types have a mark, or a mark of this class, and that mark."""
    found, wanted = {}, lambda m: isinstance(m, mark) if isinstance(mark, type) else m is mark
    for name, marks in declared(flags).items():
        found.update((name, m) for m in marks if wanted(m))
    return found


def check_saved(flags: type, saved: dict[str, Any], where: str) -> None:
    """UserError for a saved flag that does not exist or has a value of another type. `where` names the file."""
    types = typing.get_type_hints(flags)
    if unknown := sorted(saved.keys() - types.keys()):
        raise UserError(
            f"{where} has flags that do not exist here ({', '.join(unknown)}): another version wrote it. "
            "Resume with that version, or start a new run with --model on its directory"
        )
    for name, value in saved.items():
        if not _fits(value, types[name]):
            given = list(value) if isinstance(value, tuple) else value
            raise UserError(
                f"{where}: {flag(name)} {shortened(repr(given))} is not a value of this flag, and no "
                f"run writes it. Correct it, or start a new run with --model on its directory"
            )


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type of a flag. A whole number is a fraction too; True is no number."""
    parts = typing.get_args(kind)
    match typing.get_origin(kind):
        case None:
            kinds = (int, float) if kind is float else kind
            return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
        case typing.Literal:
            return isinstance(value, str) and value in parts
        case origin if origin is tuple:
            return isinstance(value, tuple) and all(_fits(each, parts[0]) for each in value)
        case _:  # a union
            return any(_fits(value, part) for part in parts)


def too_small(flags: Any) -> Iterator[str]:
    """A message for each number below its `AtLeast`."""
    for name, rule in marked(type(flags), AtLeast).items():
        value = getattr(flags, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or not all(n is None or n >= rule.least for n in numbers):
            each = " each" if isinstance(value, tuple) else ""
            yield f"{flag(name)} {in_words(value)}: must be at least {rule.least}{each}"


def in_words(value: Any) -> str:
    """A flag's value in the form that a user types: a tuple's elements one after the other."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
