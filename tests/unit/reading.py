"""Reading of data as a run does it."""

import json

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from alst_jax.config import UserError
from alst_jax.data.files import Selection
from alst_jax.data.named import Source
from alst_jax.data.records import Fields
from alst_jax.data.sources import Reading, read_source


def json_lines(*records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def put(top, name, content=None):
    """Write a file below a directory and return its path. Without content it holds its own name, as text or record."""
    file = top / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        content = {".jsonl": json_lines({"text": name}), ".txt": name.encode()}[file.suffix]
    if isinstance(content, pyarrow.Table):
        pyarrow.parquet.write_table(content, file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def read(path, flag="--data", held_out=False, skip_bad=False, text_field="text", **selection):
    """(texts, report) of one source."""
    reading = Reading(Fields(text_field), Selection(**selection), skip_bad)
    documents, report = read_source(Source(str(path), str(path)), reading, flag, held_out)
    return [document.content for document in documents], report


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments, **options)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------- directories


def hub_layout(top):
    """A data set as it is downloaded: 9 of 14 words are to be learned."""
    table = lambda *texts: pyarrow.table({"text": list(texts)})
    put(top, "README.md", "---\nlicense: mit\n---\n# A card")
    put(top, "LICENSE", "Permission is hereby granted")
    put(top, ".gitattributes", "*.parquet filter=lfs")
    put(top, "dataset_infos.json", "{}")
    put(top, "data/train-00000-of-00002.parquet", table("train a", "train b"))
    put(top, "data/train-00001-of-00002.parquet", table("train c"))
    put(top, "data/test-00000-of-00001.parquet", table("test a", "test b"))
    return top
