"""One file -> its records, one at a time: JSON lines, JSON, CSV, Parquet, Arrow and text, compressed or not.

A record is a JSON value, or the PlainText of a text file, with its origin, as file:line or file[row]. A record that
cannot be read is given as the UserError that says so, so that the caller may refuse it or skip it. Errors after which a
file cannot be read on are raised.
"""

import bz2
import contextlib
import csv
import dataclasses
import gzip
import io
import json
import lzma
import pathlib
import sys
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from alst_jax.config import UserError
from alst_jax.data.records import without_nulls

Records = Iterator[tuple[Any, str]]

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
JSON_LINES, JSON, PARQUET, ARROW = (".jsonl", ".ndjson"), (".json",), (".parquet",), (".arrow", ".feather")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
RECORD_KINDS = (*JSON_LINES, *JSON, *PARQUET, *ARROW, *DELIMITERS)
TEXT_KINDS = (".txt", ".text", ".md", ".rst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROWS_AT_ONCE = 256  # rows of Parquet and Arrow files that are Python objects at a time


@dataclasses.dataclass(frozen=True)
class PlainText:
    """The record of a text file."""

    text: str


def kind_of(name: str) -> str:
    """The suffix that tells the format, without a suffix of compression: `a.json.GZ` -> `.json`."""
    path = pathlib.PurePath(name.lower())
    return pathlib.PurePath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def stem_of(name: str) -> str:
    """The name without the suffixes of format and compression: `a.json.gz` -> `a`."""
    return name[: len(name) - len(kind_of(name)) - len(_compression(name))]


def read_records(file: pathlib.Path, as_text: bool = False) -> Records:
    """The records of a file and their origins. as_text: the file is one text, whatever its suffix says.

    UserError names the file that is empty, broken or of no known format.
    """
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty")
    kind = kind_of(file.name)
    if as_text or kind not in RECORD_KINDS:
        text = read_text(file)
        yield text if isinstance(text, UserError) else PlainText(text), str(file)
    elif kind in JSON_LINES:
        yield from _json_lines(file)
    elif kind in JSON:
        yield from _json(file)
    elif kind in DELIMITERS:
        yield from _csv(file, DELIMITERS[kind])
    elif _compression(file.name):
        raise UserError(f"{file}: Parquet and Arrow files are compressed inside; unpack this one first")
    else:
        yield from (_parquet if kind in PARQUET else _arrow)(file)


# ------------------------------------------------------------------------------------------------- bytes, lines, text


def _compression(name: str) -> str:
    suffix = pathlib.PurePath(name.lower()).suffix
    return suffix if suffix in COMPRESSED else ""


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed while they are read. UserError where they are broken or cut short."""
    compression = _compression(file.name)
    try:
        if compression == ".zst":
            import pyarrow

            opened = io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 1 << 20)
        else:
            opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(compression, open)(file, "rb")
        with opened as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        what = f"not a readable {compression} file" if compression else "cannot be read"
        raise UserError(f"{file}: {what}: {error}") from error


def _lines(file: pathlib.Path) -> Iterator[tuple[str, str | UserError]]:
    """(origin, line with its end) of a UTF-8 file without its byte-order mark. A line ends with a newline only: JSON
    strings may hold U+2028 and its like unescaped."""
    name = str(file)
    with _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            origin = f"{name}:{number}"
            yield origin, _decoded(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, origin)


def _decoded(content: bytes, origin: str) -> str | UserError:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            return UserError(f"{origin}: the text is UTF-16, and data are UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
        return UserError(
            f"{origin}: not UTF-8 text (byte {error.start}); data are .jsonl, .json, .csv, .tsv, "
            ".parquet, .arrow or UTF-8 text files. In a directory, --include and --exclude choose files"
        )


def read_text(file: pathlib.Path) -> str | UserError:
    """The text of a UTF-8 file, without a byte-order mark and with newlines as line ends; the error of other files."""
    with _opened(file) as stream:
        text = _decoded(stream.read().removeprefix(BYTE_ORDER_MARK), str(file))
    if isinstance(text, UserError):
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --------------------------------------------------------------------------------------------------------------- JSON


def _json_lines(file: pathlib.Path) -> Records:
    yield from _json_records(_lines(file))


def _json_records(lines: Iterator[tuple[str, str | UserError]]) -> Records:
    for origin, line in lines:
        if isinstance(line, UserError) or not line.isspace():
            yield _json_line(line, origin), origin


def _json_line(line: str | UserError, origin: str) -> Any:
    if isinstance(line, UserError):
        return line
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"{origin}: not valid JSON: {error}; each line of a .jsonl file is one JSON object")


def _json(file: pathlib.Path) -> Records:
    """The records of a .json file: JSON lines if its first line is a whole object, else one object or a list."""
    lines, head = _lines(file), []
    for origin, line in lines:
        head.append((origin, line))
        if isinstance(line, UserError) or not line.isspace():
            break
    origin, line = head[-1] if head else ("", "")
    if isinstance(line, str) and line.lstrip().startswith("{") and isinstance(_json_line(line, ""), dict):
        yield json.loads(line), origin
        yield from _json_records(lines)
        return
    whole = []
    for _, line in (*head, *lines):
        if isinstance(line, UserError):
            raise line
        whole.append(line)
    if not "".join(whole).strip():
        return
    try:
        value = json.loads("".join(whole))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: not valid JSON: {error}; a .json file is a list of objects, one object, or one object a line"
        ) from error
    for row, record in enumerate(value if isinstance(value, list) else [value]):
        yield record, f"{file}[{row}]"


# -------------------------------------------------------------------------------------------------------- CSV and TSV


def _csv(file: pathlib.Path, delimiter: str) -> Records:
    """A dict a row, by the names in the first row. The origin is the line where the row begins.

    Wrong quotes are raised, because where the next row begins is not known then.
    """
    csv.field_size_limit(sys.maxsize)  # a document is a field
    broken: list[UserError] = []
    rows = csv.reader(_csv_lines(file, broken), delimiter=delimiter, strict=True)
    header = next(_csv_rows(rows, file), (0, []))[1]
    names = [name.strip() for name in header]
    if broken:
        raise broken[0]
    nameless = names[:1] == [""]  # the row numbers that pandas writes
    if len(set(names)) < len(names) or "" in names[1:]:
        raise UserError(f"{file}:1: the first row names the columns, each once; it is {', '.join(map(repr, header))}")
    for number, row in _csv_rows(rows, file):
        origin = f"{file}:{number}"
        if broken:
            yield broken.pop(), origin
        elif len(row) != len(names):
            yield (
                UserError(
                    f"{origin}: {len(row)} fields in a row, and the first row names {len(names)} columns "
                    f"({', '.join(names)})"
                ),
                origin,
            )
        else:
            yield dict(zip(names[nameless:], row[nameless:])), origin


def _csv_lines(file: pathlib.Path, broken: list[UserError]) -> Iterator[str]:
    """The lines of a CSV file. A line that is not UTF-8 is noted in `broken` and given with its bytes replaced, so that
    its quotes count."""
    with _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            text = _decoded(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, f"{file}:{number}")
            if isinstance(text, UserError):
                broken[:] = broken or [text]
                text = line.decode("utf-8", "replace")
            yield text


def _csv_rows(rows: Any, file: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, fields) of each row that is not blank."""
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{file}:{number}: not valid CSV: {error} (a quote within a quoted field is written twice)"
            ) from error
        if row:
            yield number, row


# -------------------------------------------------------------------------------------------------- Parquet and Arrow


def _parquet(file: pathlib.Path) -> Records:
    import pyarrow.parquet

    with _arrow_errors(file, "Parquet"):
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield from _rows(parquet.iter_batches(batch_size=ROWS_AT_ONCE), file)


def _arrow(file: pathlib.Path) -> Records:
    """Arrow streams, as datasets.save_to_disk writes them, and Arrow files (Feather)."""
    import pyarrow.ipc

    with _arrow_errors(file, "Arrow"), pyarrow.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        yield from _rows(batches, file)


@contextlib.contextmanager
def _arrow_errors(file: pathlib.Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable {kind} file: {error}") from error


def _rows(batches: Iterator[Any], file: pathlib.Path) -> Records:
    row = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for record in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                yield without_nulls(record), f"{file}[{row}]"
                row += 1
