"""Files -> documents: JSONL, JSON, Parquet, plain text, directories of them."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from alst_jax.config import UserError

PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".ndjson")
JSON = (".json",)


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: a text, or a chat as a list of {role, content}. `origin` says where it came from, as file:line."""

    content: str | list[dict[str, Any]]
    origin: str

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.content, str)


def read_documents(
    paths: Iterable[str], text_field: str = "text", messages_field: str = "messages", flag: str = "--data"
) -> list[Document]:
    """All documents of the files and directories (recursively, in the order of their names).

    UserError names the file and line of whatever is missing, empty, broken or without the wanted field; `flag` is the
    option the paths came from.
    """
    documents = []
    for file in _files(paths, flag):
        documents.extend(_read_file(file, text_field, messages_field))
    if not documents:
        raise UserError(f"{flag} {' '.join(map(str, paths))}: no documents in there")
    return documents


def _files(paths: Iterable[str], flag: str) -> Iterator[pathlib.Path]:
    for given in paths:
        path = pathlib.Path(given)
        if not str(given):
            raise UserError(f"{flag} '': name a file or a directory")
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
            if not files:
                raise UserError(f"{flag} {given}: the directory holds no files")
            yield from files
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{flag} {given}: no such file or directory")


def _hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_file(file: pathlib.Path, text_field: str, messages_field: str) -> Iterator[Document]:
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty")
    suffix = file.suffix.lower()
    if suffix in PARQUET:
        records = _parquet_records(file, text_field, messages_field)
    elif suffix in JSON_LINES:
        records = _json_lines(file)
    elif suffix in JSON:
        records = _json_records(file)
    else:
        text = _read_text(file)
        if text.strip():
            yield Document(text, str(file))
        return
    for record, origin in records:
        yield _document(record, origin, text_field, messages_field)


def _read_text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); data are .jsonl, .json, .parquet or UTF-8 text "
                        "files") from error


def _json_lines(file: pathlib.Path) -> Iterator[tuple[Any, str]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line), f"{file}:{number}"
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number}: not valid JSON: {error}; each line of a .jsonl file is one JSON "
                                "object") from error


def _json_records(file: pathlib.Path) -> Iterator[tuple[Any, str]]:
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error} (one object a line? name it .jsonl)") from error
    records = value if isinstance(value, list) else [value]
    for number, record in enumerate(records):
        yield record, f"{file}[{number}]"


def _parquet_records(file: pathlib.Path, text_field: str, messages_field: str) -> Iterator[tuple[Any, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in (text_field, messages_field) if name in parquet.schema_arrow.names]
        if not columns:
            raise UserError(_no_field(str(file), parquet.schema_arrow.names, text_field, messages_field))
        rows = 0
        for batch in parquet.iter_batches(columns=columns):
            for record in batch.to_pylist():
                yield record, f"{file}[{rows}]"
                rows += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {error}") from error


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
