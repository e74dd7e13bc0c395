"""Files -> documents: what --data and --eval-data name, read into texts and chats, with counts per source."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from alst_jax.config import UserError
from alst_jax.data.files import FoundFile, Selection, find_files, words
from alst_jax.data.formats import PlainText, read_records, read_text
from alst_jax.data.hub import download, is_hub_name
from alst_jax.data.named import Source, parse_sources


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: a text, or a chat as a list of {role, content}. `origin` says where it came from, as file:line."""

    content: str | list[dict[str, Any]]
    origin: str

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.content, str)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How sources are read. skip_bad: count bad records instead of refusing them."""

    text_field: str = "text"
    messages_field: str = "messages"
    selection: Selection = Selection()
    skip_bad: bool = False


@dataclasses.dataclass
class SourceReport:
    """What became of the files and records of one source."""

    name: str
    files: int = 0
    records: int = 0
    documents: int = 0
    split: str | None = None
    files_left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    records_left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first_bad: str | None = None  # the error of the first bad record
    tokens: int = 0
    learned: int = 0
    sequences: int = 0
    weight: float | None = None

    def summary(self) -> str:
        """The counts in one line, as every run prints them."""
        split = f" of split {self.split}" if self.split else ""
        counts = [f"{n:,} {what}{'' if n == 1 else 's'}{split if what == 'file' else ''}" for n, what in (
                  (self.files, "file"), (self.records, "record"), (self.documents, "document"))]
        return (f"{self.name}: {', '.join(counts)}, {self.tokens:,} tokens ({self.learned:,} learned){self.left_out()}")

    def count_bad(self, error: UserError) -> None:
        """Count a bad record, and keep the error of the first one."""
        self.records_left_out["bad"] += 1
        self.first_bad = self.first_bad or str(error)

    def left_out(self) -> str:
        """The counts of files and records that were left out, by reason."""
        text = "".join(f"; {what} left out: {words(counts)}" for what, counts in (
                       ("files", self.files_left_out), ("records", self.records_left_out)) if counts)
        return text + (f"; the first bad one: {self.first_bad}" if self.first_bad else "")


def read_documents(
    paths: Iterable[str], text_field: str = "text", messages_field: str = "messages", flag: str = "--data"
) -> list[Document]:
    """All documents of the files and directories, read with the defaults of all other flags."""
    reading = Reading(text_field, messages_field)
    return [d for source in parse_sources(paths, flag) for d in read_source(source, reading, flag)[0]]


def read_source(
    source: Source, reading: Reading, flag: str = "--data", held_out: bool = False
) -> tuple[list[Document], SourceReport]:
    """The documents of one source, in the order of its files, and their counts.

    Records without text are left out and counted. UserError names the file and line of a bad record, unless
    `reading.skip_bad`, and the source if no document is left.
    """
    path = source.path
    if is_hub_name(path):
        path = str(download(path, flag, reading.selection.include))
    found = find_files(path, reading.selection, flag, held_out)
    report = SourceReport(source.name, len(found.files), split=found.split, files_left_out=found.left_out)
    documents, document_per = [], reading.selection.document_per if pathlib.Path(path).is_dir() else None
    for record, origin in _records(found.files, pathlib.Path(path), document_per):
        report.records += 1
        try:
            if isinstance(record, UserError):
                raise record
            document = Document(record.text, origin) if isinstance(record, PlainText) else _document(
                record, origin, reading.text_field, reading.messages_field)
            _check_unicode(document.content, origin)
        except UserError as error:
            if not reading.skip_bad:
                raise
            report.count_bad(error)
            continue
        if document.is_chat or not document.content.isspace() and document.content:
            documents.append(document)
        else:
            report.records_left_out["empty"] += 1
    report.documents = len(documents)
    if not documents:
        raise UserError(f"{flag} {source.path}: no documents in there{report.left_out()}")
    return documents, report


def _check_unicode(content: Any, origin: str) -> None:
    """UserError for half a surrogate pair, which JSON may hold and no tokenizer takes, in a text or in a chat."""
    if isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            _check_unicode(part, origin)
    elif isinstance(content, str) and not content.isascii():
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{origin}: not Unicode text (character {error.start} is half of a surrogate pair)") from error


def _records(files: list[FoundFile], top: pathlib.Path, document_per: str | None) -> Iterator[tuple[Any, str]]:
    if document_per != "directory":
        for file in files:
            yield from read_records(file.path, as_text=document_per == "file")
        return
    groups: dict[str, list[FoundFile]] = {}
    for file in files:
        groups.setdefault(file.below[0] if len(file.below) > 1 else "", []).append(file)
    for folder, members in groups.items():
        yield PlainText("".join(map(_with_header, members))), str(top / folder)


def _with_header(file: FoundFile) -> str:
    """The text of a file below a line with its path."""
    text = read_text(file.path)
    return f"# file: {'/'.join(file.below)}\n{text}" + ("" if text.endswith("\n") else "\n")


def _no_field(origin: str, names: Iterable[str], text_field: str, messages_field: str) -> str:
    return (f"{origin}: neither a {text_field!r} nor a {messages_field!r} field (it has: {', '.join(names) or 'none'}); "
            "name the right one with --text-field or --messages-field")


def _document(record: Any, origin: str, text_field: str, messages_field: str) -> Document:
    if not isinstance(record, dict):
        raise UserError(f"{origin}: a record is a JSON object with {text_field!r} or {messages_field!r}, not "
                        f"{type(record).__name__}")
    if record.get(text_field) is not None and record.get(messages_field) is not None:
        raise UserError(f"{origin}: both {text_field!r} and {messages_field!r}; leave out one of them, or name another "
                        "field with --text-field or --messages-field")
    if record.get("tools"):
        raise UserError(f"{origin}: 'tools' are not supported: the chat would be rendered without them")
    if record.get(text_field) is not None:
        text = record[text_field]
        if not isinstance(text, str):
            raise UserError(f"{origin}: {text_field!r} holds {type(text).__name__}, not text (--text-field)")
        return Document(text, origin)
    if record.get(messages_field) is not None:
        return Document(_checked_chat(record[messages_field], origin, messages_field), origin)
    filled = [name for name, value in record.items() if value is not None or name not in (text_field, messages_field)]
    raise UserError(_no_field(origin, filled, text_field, messages_field))


def _checked_chat(messages: Any, origin: str, messages_field: str) -> list[dict[str, Any]]:
    rule = f"{messages_field!r} is a list of objects with 'role' and 'content' (--messages-field)"
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{origin}: {rule}, and not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{origin}: message {i} lacks 'role' or 'content'; {rule}")
        if not isinstance(message["content"], str) or not isinstance(message["role"], str):
            raise UserError(f"{origin}: message {i}: 'role' and 'content' are text; other kinds of content are not "
                            "supported")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{origin}: the chat has no message of the role 'assistant', so nothing in it is to be learned")
    return messages
