"""The flags of the data that are learned and evaluated."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from alst_jax.declare import AtLeast, default
from alst_jax.profile import TILES


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """The data of a run."""

    data: Annotated[tuple[str, ...], default("without --model the Python language reference")] = ()
    """JSONL, JSON, CSV, TSV, Parquet, Arrow or text files, compressed or not, directories of them, and names of data
    sets on the hub. `a.jsonl:0.3 b/:0.7`: the part of the sequences that comes from each."""
    add_data: Annotated[tuple[str, ...], default("none")] = ()
    """With --resume: more data, as in --data, for the rest of the run and for later resumes."""
    split: Annotated[str | None, default("train")] = None
    """The split to read in directories with splits."""
    include: Annotated[tuple[str, ...], default("all that are read")] = ()
    """Globs: in directories, read the files that match one of them, of any kind. A glob with a / is compared with the
    path below the directory."""
    exclude: Annotated[tuple[str, ...], default("none")] = ()
    """Globs: in directories, leave out the files and sub-directories that match one of them."""
    document_per: Annotated[Literal["file", "directory"] | None, default("by suffix")] = None
    """Take files of directories as texts, whatever their suffix: one document a file, or one a sub-directory of the
    given directory, its files joined in the order of their paths."""
    skip_bad_records: bool = False
    """Leave out and count records that cannot be used, instead of refusing the first one."""
    text_field: str = "text"
    """Field of a JSON, CSV, Parquet or Arrow record that holds a document."""
    messages_field: str = "messages"
    """Field of a JSON, Parquet or Arrow record that holds a chat."""
    ignore_fields: Annotated[tuple[str, ...], default("none")] = ()
    """Fields of a record to ignore."""
    learn: Literal["assistant", "last", "all"] = "assistant"
    """The learned part of a chat: all turns of the assistant, the last of them, or all tokens."""
    chat_template: Annotated[str | None, default("the model's own")] = None
    """File with a chat template (Jinja), used instead of the model's own and written to the export."""
    template_date: Annotated[str | None, default("the day on which the run began")] = None
    """Date that chat templates print, as 2026-11-27."""
    show_samples: Annotated[int | None, AtLeast(1), default("none")] = None
    """Print this many samples with their learned tokens marked, and stop: needs no --seq-len and no --out."""
    pack: bool = False
    """Put several documents into one sequence of --seq-len tokens. Each gives the same numbers as alone."""
    pack_attention: Literal["documents", "across"] = "documents"
    """With --pack. documents: attention stays inside a document and positions restart. across: a pack is one text."""
    long_documents: Literal["cut", "drop"] = "cut"
    """Documents longer than --seq-len: cut them into consecutive pieces, or leave them out."""
    data_cache: Annotated[str | None, default("~/.cache/alst_jax/data")] = None
    """Directory in which data of 5 MB and more are kept tokenised, for later runs; off: tokenise in memory each
    time."""
    eval_data: Annotated[tuple[str, ...], default("none; without --model the rest of the reference")] = ()
    """Held-out files, directories or hub data sets, each evaluated by itself: PATH or NAME=PATH."""
    eval_split: Annotated[str | None, default("validation, else test")] = None
    """The split of --eval-data to read in directories with splits."""
    eval_every: Annotated[int | None, AtLeast(1), default("at the end alone")] = None
    """Steps between two evaluations. The last step is always evaluated."""


def data_mistakes(config: Any) -> Iterator[tuple[Any, str]]:
    """(whether the flags are wrong, message) for each rule about data. config: all flags of the run."""
    yield (
        config.split is not None and config.document_per is not None,
        f"--split {config.split} is for data sets, and --document-per {config.document_per} for texts of all kinds; "
        "leave one of them out, or name the directory of the split",
    )
    for field in ("split", "include", "exclude", "document_per", "skip_bad_records", "ignore_fields"):
        yield (
            getattr(config, field) and not config.data and not config.eval_data and not config.planning,
            f"--{field.replace('_', '-')} says how --data is read; name files with --data",
        )
    yield (
        config.eval_split is not None and not config.eval_data,
        f"--eval-split {config.eval_split} says how --eval-data is read; name files with --eval-data",
    )
    yield (
        config.eval_every is not None and not config.eval_data and config.eval_long is None,
        "--eval-every needs --eval-data or --eval-long, the file to evaluate on",
    )
    yield (
        config.add_data and not config.resume,
        "--add-data adds to the data of a run that is resumed: use --data, or name the run with --resume --out",
    )
    yield (
        config.pack_attention == "across" and not config.pack,
        "--pack-attention across says what attention reads in a pack; it needs --pack",
    )
    yield config.data_cache == "", "--data-cache '': name a directory, or `off`"
    yield (
        config.template_date is not None and not _is_date(config.template_date),
        f"--template-date {config.template_date}: write a date as 2026-11-27",
    )
    yield (
        config.show_samples is not None and config.planning,
        f"--show-samples {config.show_samples} reads data, and --plan-only and --find-max-seq-len need none; leave "
        "one of them out",
    )
    yield (
        config.model is not None and not config.data and not config.planning,
        "--model without --data: name the files to train on (--data FILE_OR_DIR...)",
    )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def read_saved(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags as run.json holds them -> values of fields. Runs before several held-out sources have one path or null."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    held_out = values.get("eval_data")
    if "eval_data" in values and not isinstance(held_out, tuple):
        values["eval_data"] = () if held_out is None else (held_out,)
    for tile in TILES:  # once null for the usual size
        if tile in values and values[tile] is None:
            values[tile] = 0
    return values
