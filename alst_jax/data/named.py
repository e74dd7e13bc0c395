"""The words after --data and --eval-data -> sources: a path, its name, and its weight."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable

from alst_jax.config import UserError
from alst_jax.data.formats import RECORD_KINDS, TEXT_KINDS, kind_of, stem_of

_NAMED = re.compile(r"([A-Za-z][\w.-]*)=(.+)", re.DOTALL)
_WEIGHED = re.compile(r"(.+):([^:/\\]*\d[^:/\\]*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, directory or hub data set. weight: its part of the sequences, all weights together being 1; None without
    weights."""

    name: str
    path: str
    weight: float | None = None


def parse_sources(given: Iterable[str], flag: str = "--data", held_out: bool = False) -> list[Source]:
    """`path`, `path:0.3`, `name=path` or `name=path:0.3`, one a source; a path that exists is taken as it stands.

    The name is, unless given, the path; for held-out data its stem. UserError for two sources of one name or path,
    a weight that is not a positive number, weights for some sources only, and weights of held-out data.
    """
    sources = [_parse(str(word), flag, held_out) for word in given]
    names, paths = [s.name for s in sources], [str(pathlib.Path(s.path).resolve()) for s in sources]
    for kind, keys in (("name", names), ("path", paths)):
        twice = next((i for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            first = sources[keys.index(keys[twice])]
            fix = f"name one of them otherwise: {flag} NAME=PATH" if kind == "name" else "leave out one of them"
            raise UserError(
                f"{flag} {first.path} {sources[twice].path}: two sources of one {kind} "
                f"({sources[twice].name}); {fix}"
                + ("" if held_out else ". A weight (PATH:0.7) makes a source count for more")
            )
    weighed = [source for source in sources if source.weight is not None]
    if weighed and held_out:
        raise UserError(
            f"{flag} {weighed[0].path}:{weighed[0].weight:g}: held-out data have no weights; each source "
            "is evaluated whole"
        )
    if weighed and len(weighed) < len(sources):
        without = next(source for source in sources if source.weight is None)
        raise UserError(
            f"{flag} {without.path}: no weight, and {weighed[0].path} has {weighed[0].weight:g}; give all "
            "sources a weight or none (PATH:0.3)"
        )
    total = sum(source.weight for source in weighed)
    return [dataclasses.replace(s, weight=s.weight / total) if weighed else s for s in sources]


def _parse(word: str, flag: str, held_out: bool) -> Source:
    if not word:
        raise UserError(f"{flag} '': name a file or a directory")
    name, path, weight = None, word, None
    if not _exists(path) and (match := _NAMED.fullmatch(path)):
        name, path = match.groups()
    if not _exists(path) and (match := _WEIGHED.fullmatch(path)):
        path, weight = match[1], _weight(match[2], word, flag)
    return Source(name or (_short_name(pathlib.Path(path)) if held_out else path), path, weight)


def _short_name(path: pathlib.Path) -> str:
    """The name of a directory or hub data set; the name of a file without its suffixes."""
    name = path.resolve().name
    return name if path.is_dir() or kind_of(name) not in (*RECORD_KINDS, *TEXT_KINDS) else stem_of(name)


def _exists(path: str) -> bool:
    return pathlib.Path(path).exists()


def _weight(text: str, word: str, flag: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(
            f"{flag} {word}: the weight {text!r} is not a positive number, and no file has this name; write PATH:0.3"
        )
    return weight
