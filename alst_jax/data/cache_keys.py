"""The names of stores: hashes of all that the tokens of a source depend on."""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import pathlib
import tempfile
import zlib
from typing import Any

from alst_jax.config import UserError
from alst_jax.data.files import FoundFile
from alst_jax.data.labels import Labels
from alst_jax.data.sources import OpenSource, Reading

FORMAT = 2  # of the files of a store
HEAD = 1 << 16  # bytes at both ends of a file that are part of its key


def keys_of(source: OpenSource, reading: Reading, tokenizer: Any, labels: Labels) -> tuple[str, str]:
    """The names of a source's store: without chats, and with chats, which may hold the date."""
    parts = [
        FORMAT,
        programs(),
        source.given,
        os.path.abspath(source.given),
        dataclasses.asdict(reading),
        [_stamp(file) for file in source.files],
        tokenizer_hash(tokenizer),
        labels.learn,
    ]
    prints_date = "strftime_now" in json.dumps(tokenizer.chat_template or "")
    date = labels.date or datetime.date.today().isoformat()
    return hash_of(*parts), hash_of(*parts, date if prints_date else "no date")


def _stamp(file: FoundFile) -> list[Any]:
    """The identity of a file: its path, size and time, and a hash of its beginning and end."""
    try:
        status = file.path.stat()
        with file.path.open("rb") as stream:
            digest = hashlib.sha256(stream.read(HEAD))
            if status.st_size > HEAD:
                stream.seek(max(HEAD, status.st_size - HEAD))
                digest.update(stream.read(HEAD))
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read: {error}") from error
    return [str(file.path), list(file.below), status.st_size, status.st_mtime_ns, digest.hexdigest()]


@functools.lru_cache(maxsize=1)
def programs() -> str:
    """A hash of the programs of this package and the versions of the tokenizers' libraries."""
    import tokenizers
    import transformers

    files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    return hash_of(
        transformers.__version__,
        tokenizers.__version__,
        *(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files),
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the tokenizer's class and of the files that it is saved as, its chat template among them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
        return hash_of(
            type(tokenizer).__name__,
            *(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files),
        )


def hash_of(*parts: Any) -> str:
    """A hash of values that JSON takes."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def checksum_of(value: Any) -> int:
    """The crc32 of a value that JSON takes."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def file_checksum(file: pathlib.Path) -> int:
    """The crc32 of a file, read a part at a time."""
    value, buffer = 0, bytearray(1 << 20)
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:size], value)
    return value
