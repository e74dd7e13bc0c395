"""A file or directory -> the files to read, and the reasons why others are left out."""

import collections
import dataclasses
import fnmatch
import json
import pathlib
import re
from collections.abc import Iterator

from alst_jax.config import UserError
from alst_jax.data.formats import RECORD_KINDS, TEXT_KINDS, kind_of
from alst_jax.data.splits import choose_split, split_of

DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|authors|code_of_conduct|security|dataset_?card)"
    r"([-_.].*)?",
    re.IGNORECASE,
)
DOCUMENTATION_KINDS = ("", ".md", ".txt", ".rst", ".cff", ".bib", ".html", ".pdf", ".apache", ".mit")
METADATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "croissant.json",
    "data_files.json",
)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which files of a directory are read, and how: --split or --eval-split, --include, --exclude, --document-per."""

    split: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    document_per: str | None = None  # "file" or "directory": files are texts, whatever their suffix


@dataclasses.dataclass(frozen=True)
class FoundFile:
    """A file to read. below: its path below the directory that was given, in parts."""

    path: pathlib.Path
    below: tuple[str, ...]


@dataclasses.dataclass
class Found:
    """The files of one source, the split they are of, and counts of those left out by reason."""

    files: list[FoundFile]
    split: str | None = None
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def find_files(given: str, selection: Selection, flag: str, held_out: bool = False) -> Found:
    """The files that a path means, in the order of their paths. A file that is named itself is always read.

    In a directory these are left out and counted: hidden files, documentation and licences, metadata, files of other
    kinds than data, empty files, and files of other splits. --include takes the files that its globs match instead;
    symbolic links are followed. UserError for a missing path, a cycle of links, a split that does not exist, or if
    no file is left.
    """
    path = pathlib.Path(given)
    if not path.is_dir():
        if path.is_file():
            return Found([FoundFile(path, (path.name,))])
        raise UserError(f"{flag} {given}: no such file or directory")
    found = Found([])
    walked = sorted(_walk(path, (), (), selection, found.left_out, f"{flag} {given}"), key=lambda file: file.below)
    records = any(kind_of(file.path.name) in RECORD_KINDS for file in walked)
    arrow = {folder: _arrow_names(folder) for folder in {file.path.parent for file in walked}}
    seen = set()
    for file in walked:
        reason = _left_out(file, selection, records, arrow[file.path.parent])
        if reason is None and (real := file.path.resolve()) in seen:
            reason = "the same file again"
        if reason is None:
            seen.add(real)
            found.files.append(file)
        else:
            found.left_out[reason] += 1
    if not found.files:
        what = f"; left out: {words(found.left_out)}" if found.left_out else ""
        raise UserError(
            f"{flag} {given}: the directory holds no files to read{what}. --include GLOB takes files of "
            "any kind, as in --include '*.py'"
        )
    _keep_split(found, path, selection, f"{flag} {given}", held_out)
    return found


def words(counts: collections.Counter[str]) -> str:
    """`2 hidden, 1 empty`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def _walk(
    folder: pathlib.Path,
    below: tuple[str, ...],
    above: tuple[pathlib.Path, ...],
    selection: Selection,
    left_out: collections.Counter[str],
    place: str,
) -> Iterator[FoundFile]:
    """All files that are neither hidden nor excluded. above: the real paths of the directories that lead here."""
    real = folder.resolve()
    if real in above:
        raise UserError(
            f"{place}: {folder} is a link to {real}, a directory above it, and would be read without end; "
            f"--exclude {folder.name} leaves it out"
        )
    for entry in folder.iterdir():
        parts = (*below, entry.name)
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif _excluded(parts, selection.exclude):
            left_out["excluded"] += 1
        elif entry.is_dir():
            yield from _walk(entry, parts, (*above, real), selection, left_out, place)
        elif entry.is_file():
            yield FoundFile(entry, parts)
        else:
            left_out["broken links" if entry.is_symlink() else "special files"] += 1


def _excluded(parts: tuple[str, ...], globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase("/".join(parts) if "/" in glob else parts[-1], glob) for glob in globs)


def _left_out(file: FoundFile, selection: Selection, records: bool, arrow: set[str] | None) -> str | None:
    """Why a file is not read, or None. records: the directory holds files of records. arrow: the names of the data
    files that `state.json` lists."""
    name, kind = file.path.name, kind_of(file.path.name)
    if file.path.stat().st_size == 0:
        return "empty"
    if selection.include:
        return None if _excluded(file.below, selection.include) else "not included"
    if DOCUMENTATION.fullmatch(name) and kind in DOCUMENTATION_KINDS:
        return "documentation"
    if selection.document_per:
        return "not text" if _is_binary(file.path) else None
    if arrow is not None and name not in arrow or name in METADATA:
        return "metadata"
    if kind == ".md" and len(file.below) == 1 and records:
        return "documentation"
    return None if kind in (*RECORD_KINDS, *TEXT_KINDS) else f"of kind {kind}" if kind else "of no kind"


def _is_binary(file: pathlib.Path) -> bool:
    """Whether the first bytes of a file are no UTF-8 text."""
    with file.open("rb") as stream:
        start = stream.read(8192)
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(start) < 8192 or error.start < len(start) - 4  # a character may be cut where the reading ends
    return b"\0" in start


def _arrow_names(folder: pathlib.Path) -> set[str] | None:
    """The data files of a directory that datasets.save_to_disk wrote; None for other directories."""
    state = folder / "state.json"
    if not state.is_file() or not (folder / "dataset_info.json").is_file():
        return None
    try:
        names = {entry["filename"] for entry in json.loads(state.read_text())["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state}: not what save_to_disk writes: no list of _data_files") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise UserError(f"{state} lists {', '.join(missing)}, which is not there")
    return names


def _keep_split(found: Found, path: pathlib.Path, selection: Selection, place: str, held_out: bool) -> None:
    """Keep the files of one split, if the directory has splits."""
    if selection.document_per:
        return
    named = _dictionary_splits(path)
    splits = [file.below[0] if file.below[0] in named else split_of(file.below) for file in found.files]
    found.split = choose_split(splits, selection.split, place, held_out)
    if found.split is None:
        return
    for split in splits:
        if split != found.split:
            found.left_out["of no split" if split is None else f"of split {split}"] += 1
    found.files = [file for file, split in zip(found.files, splits) if split == found.split]


def _dictionary_splits(path: pathlib.Path) -> set[str]:
    """The splits of a DatasetDict that save_to_disk wrote: directories of these names."""
    file = path / "dataset_dict.json"
    if not file.is_file():
        return set()
    try:
        return set(json.loads(file.read_text())["splits"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not what save_to_disk writes: no list of splits") from error
