"""Files -> documents: JSONL, JSON, Parquet, plain text, directories of them."""

import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from alst_jax.config import UserError
from alst_jax.data.records import Document, Fields, Reader, without_nulls

PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".ndjson")
JSON = (".json",)


def read_documents(
    paths: Iterable[str], text_field: str = "text", messages_field: str = "messages", flag: str = "--data",
    ignore_fields: tuple[str, ...] = ()
) -> list[Document]:
    """All documents of the files and directories (recursively, in the order of their names).

    UserError names the file and line of whatever is missing, empty, broken or without the wanted field; `flag` is the
    option the paths came from.
    """
    documents, fields = [], Fields(text_field, messages_field, tuple(ignore_fields))
    for path in paths:
        reader = Reader(fields, str(path))
        for file in _files([path], flag):
            reader.start_file()
            documents.extend(_read_file(file, reader))
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


def _read_file(file: pathlib.Path, reader: Reader) -> Iterator[Document]:
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty")
    suffix = file.suffix.lower()
    if suffix in PARQUET:
        records = _parquet_records(file)
    elif suffix in JSON_LINES:
        records = _json_lines(file)
    elif suffix in JSON:
        records = _json_records(file)
    else:
        text = _read_text(file)
        if text.strip():
            yield reader.text(text, str(file))
        return
    for record, origin in records:
        yield reader.read(record, origin)


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


def _parquet_records(file: pathlib.Path) -> Iterator[tuple[Any, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        rows = 0
        for batch in parquet.iter_batches():
            for record in batch.to_pylist():
                yield without_nulls(record), f"{file}[{rows}]"
                rows += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {error}") from error
