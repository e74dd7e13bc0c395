"""Files -> documents: --data and --eval-data, read into texts and chats, with counts per source."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from alst_jax.config import UserError
from alst_jax.data.files import FoundFile, Selection, find_files
from alst_jax.data.formats import PlainText, Records, read_records, read_text
from alst_jax.data.hub import download, is_hub_name
from alst_jax.data.named import Source, parse_sources
from alst_jax.data.records import Document, Fields, Reader
from alst_jax.data.report import SourceReport


@dataclasses.dataclass(frozen=True)
class Reading:
    """How sources are read. skip_bad: count bad records instead of refusing them."""

    fields: Fields = Fields()
    selection: Selection = Selection()
    skip_bad: bool = False


def read_documents(
    paths: Iterable[str],
    text_field: str = "text",
    messages_field: str = "messages",
    flag: str = "--data",
    ignore_fields: tuple[str, ...] = (),
) -> list[Document]:
    """All documents of the files and directories, read with the defaults of all other flags."""
    reading = Reading(Fields(text_field, messages_field, tuple(ignore_fields)))
    return [d for source in parse_sources(paths, flag) for d in read_source(source, reading, flag)[0]]


@dataclasses.dataclass
class OpenSource:
    """The files of one source, its counts so far, and its documents, which are read one at a time and once.

    given: its path, for a hub data set the local directory. files: none for documents that are not from files.
    """

    given: str
    files: list[FoundFile]
    report: SourceReport
    documents: Iterable[Document]


def read_source(
    source: Source, reading: Reading, flag: str = "--data", held_out: bool = False
) -> tuple[list[Document], SourceReport]:
    """The documents of one source, in the order of its files, and their counts. UserError for none."""
    opened = open_source(source, reading, flag, held_out)
    documents = list(opened.documents)
    opened.report.check_documents()
    return documents, opened.report


def open_source(source: Source, reading: Reading, flag: str = "--data", held_out: bool = False) -> OpenSource:
    """One source, whose documents are counted while they are read.

    Records without text are left out and counted. UserError names the file and line of a bad record, unless
    `reading.skip_bad`.
    """
    path = source.path
    if is_hub_name(path):
        path = str(download(path, flag, reading.selection.include))
    found = find_files(path, reading.selection, flag, held_out)
    report = SourceReport(
        source.name, f"{flag} {source.path}", source.weight, len(found.files), found.split, found.left_out
    )
    return OpenSource(path, found.files, report, _documents(path, found.files, reading, report))


def _documents(path: str, files: list[FoundFile], reading: Reading, report: SourceReport) -> Iterator[Document]:
    reader = Reader(reading.fields)
    document_per = reading.selection.document_per if pathlib.Path(path).is_dir() else None
    for records in _records_of_files(files, pathlib.Path(path), document_per):
        reader.start_file()
        for record, origin in records:
            report.records += 1
            try:
                document = _document(record, origin, reader)
            except UserError as error:
                if not reading.skip_bad:
                    raise
                report.count_bad(error)
                continue
            if document.is_chat or document.content and not document.content.isspace():
                report.count_document(document)
                yield document
            else:
                report.records_left_out["empty"] += 1


def _document(record: Any, origin: str, reader: Reader) -> Document:
    if isinstance(record, UserError):  # a line that could not be read
        raise record
    return Document(record.text, origin) if isinstance(record, PlainText) else reader.read(record, origin)


def _records_of_files(files: list[FoundFile], top: pathlib.Path, document_per: str | None) -> Iterator[Records]:
    """The records of each file. With --document-per directory, one text for each sub-directory."""
    if document_per != "directory":
        for file in files:
            yield read_records(file.path, as_text=document_per == "file")
        return
    groups: dict[str, list[FoundFile]] = {}
    for file in files:
        groups.setdefault(file.below[0] if len(file.below) > 1 else "", []).append(file)
    for folder, members in groups.items():
        yield _as_one(members, str(top / folder))


def _as_one(files: list[FoundFile], origin: str) -> Records:
    """One text of several files. Errors of files that are not text come first."""
    texts = []
    for file in files:
        text = read_text(file.path)
        if isinstance(text, UserError):
            yield text, str(file.path)
        else:
            texts.append(_with_header(file, text))
    if texts:
        yield PlainText("".join(texts)), origin


def _with_header(file: FoundFile, text: str) -> str:
    """The text of a file below a line with its path."""
    return f"# file: {'/'.join(file.below)}\n{text}" + ("" if text.endswith("\n") else "\n")
