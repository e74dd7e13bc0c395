"""Splits of a directory by the names of its files, as data sets on the hub are laid out.

`data/train-00000-of-00001.parquet`, `train.jsonl`, `c4-train.00000-of-01024.json.gz`, `test/0.parquet`.
"""

import re
from collections.abc import Iterable

from alst_jax.config import UserError
from alst_jax.data.formats import RECORD_KINDS, TEXT_KINDS, kind_of, stem_of

WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
HELD_OUT = ("validation", "test")  # the splits that --eval-data looks for, in this order
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def split_of(parts: tuple[str, ...]) -> str | None:
    """The split that the path of a file below a directory names, or None.

    A file of records is of a split if a word of its name says so; a text file, whose name may be a title, if its whole
    name does; else the names of its directories count. Files of other kinds, as in a source tree, have no split.
    """
    *folders, name = parts
    stem = stem_of(name).lower()
    found = None
    if kind_of(name) in RECORD_KINDS:
        shard = _SHARD.fullmatch(stem)
        words = re.split(r"[-_. ]", stem)
        if shard and re.split(r"[-_.]", shard[1])[0] in WORDS:  # train_sft-00000-of-00003
            return WORDS.get(shard[1], shard[1])
        found = next((WORDS[word] for word in (w.rstrip("0123456789") for w in words) if word in WORDS), None)
    elif kind_of(name) not in TEXT_KINDS:
        return None
    else:
        found = WORDS.get(re.sub(r"[-_. ]?\d+$", "", stem))
    return found or next((WORDS[folder.lower()] for folder in reversed(folders) if folder.lower() in WORDS), None)


def choose_split(found: Iterable[str | None], wanted: str | None, place: str, held_out: bool) -> str | None:
    """The split to read, of the splits that the files have; None for a directory without splits.

    wanted: --split or, for held-out data, --eval-split. Without it `train`, or for held-out data `validation`, else
    `test`. UserError if it does not exist.
    """
    there, flag = sorted({split for split in found if split is not None}), "--eval-split" if held_out else "--split"
    if not there:
        if wanted is not None:
            raise UserError(f"{place}: no split {wanted!r}: no file there names a split; leave out {flag}")
        return None
    choices = (WORDS.get(wanted.lower(), wanted),) if wanted is not None else HELD_OUT if held_out else ("train",)
    chosen = next((split for split in choices if split in there), None)
    if chosen is None:
        raise UserError(
            f"{place}: no split {' or '.join(map(repr, choices))}; it has: {', '.join(there)} "
            f"({flag} {there[0]}, or name files)"
        )
    return chosen
