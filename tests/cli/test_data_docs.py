# pytest tests/cli/test_data_docs.py
"""Each row of docs/data.md is read: with files of the names that it uses, or with the record that it shows."""

import bz2
import functools
import gzip
import json
import lzma
import pathlib
import re
import shlex
import shutil
import sys

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

import train
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.flag_checks import check_run
from alst_jax.hardware import environment
from alst_jax.models.config import TINY_LLAMA
from alst_jax.run_data import read_sequences
from alst_jax.storage.source import ModelSource

ROOT = pathlib.Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "data.md").read_text()
CELLS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `(--data [^|]+)` \|$", DOCS, re.M)
ROWS = {have: flags for have, record, flags in CELLS if not record.startswith("`{")}
RECORDS = [
    pytest.param(json.loads(record.strip("`")), shlex.split(flags), id=have)
    for have, record, flags in CELLS
    if record.startswith("`{")
]
TEMPLATES = {"tools.jinja": "qwen2.5.jinja", "thoughts.jinja": "qwen3.jinja"}
LINE = json.dumps({"text": "line"}).encode() + b"\n"

# (documents, tokens of training) of each row without a record, in its order: a byte is a token, and each document has an
# end token.
WANTED = [
    (2, 4 + 4 + 2),
    (2, 10),
    (6, 30),
    (1, 5),
    (2, 12),
    (1, 5),
    (2, 12),
    (2, 12),
    (1, 6),
    (2, 10),
    (2, 103),
    (8, 40),
    (2, 10),
    (2, 10),
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files that the rows name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    table = lambda *texts: functools.partial(pyarrow.parquet.write_table, pyarrow.table({"text": list(texts)}))
    contents = {
        "book.txt": b"book",
        "poems.md": b"poem",
        "web.jsonl": LINE * 2,
        "pages.json": LINE * 2,
        "posts.csv": b"id,body\n1,post\n",
        "shards/a.jsonl.gz": gzip.compress(LINE * 2),
        "shards/b.json.bz2": bz2.compress(LINE * 2),
        "shards/c.txt.xz": lzma.compress(b"text"),
        "shards/d.csv": b"text\ntext\n",
        "dirty.jsonl": LINE + b'{"text": null}\n{"text"\n' + LINE,
        "hub/README.md": b"# card",
        "hub/LICENSE": b"MIT",
        "hub/data/train-00000-of-00002.parquet": table("train"),
        "hub/data/train-00001-of-00002.parquet": table("train"),
        "hub/data/test-00000-of-00001.parquet": table("test"),
        "saved/state.json": b'{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}',
        "saved/dataset_info.json": b"{}",
        "repos/one/a.py": b"code",
        "repos/one/package.json": b"{ }",
        "repos/two/b.py": b"code",
        "repos/two/tests/c.py": b"test",
        "repos/two/logo.png": b"\x89PNG\xff",
    }
    for name, content in contents.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content) if isinstance(content, bytes) else content(file)
    saved = pyarrow.table({"text": ["saved"]})
    with pyarrow.ipc.new_stream("saved/data-00000-of-00001.arrow", saved.schema) as writer:
        writer.write_table(saved)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "hub"))
    return tmp_path


def test_the_table_is_found():
    assert len(ROWS) == len(WANTED) >= 14 and len(RECORDS) >= 16
    assert len(ROWS) + len(RECORDS) == DOCS.count("| `--data ")


@pytest.mark.parametrize("row, wanted", zip(ROWS, WANTED), ids=list(ROWS))
def test_each_row_is_read(files, row, wanted):
    command = re.search(r"`train\.py (.+?)`", DOCS.replace("\n", " "))[1]
    config = train.parse(shlex.split(f"{command} {ROWS[row]}"))
    check_run(config)
    assert config.seq_len == 128_000
    source = ModelSource("tiny", TINY_LLAMA, byte_tokenizer(), None)
    read = read_sequences(config, source)
    stats = [stats for _, stats in read.values()]
    assert (sum(s.documents for s in stats), sum(s.tokens for s in stats)) == wanted
    if config.eval_data:
        held_out = read_sequences(config, source, held_out=True)
        assert {name: s.documents for name, (_, s) in held_out.items()} == {"hub": 1, "pages": 2}
    if "30%" in row:
        assert [s.sources[0].weight for s in stats] == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize("record, flags", RECORDS)
def test_the_command_of_a_row_learns_from_its_record(record, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "prepare", lambda *_, **__: None)
    pathlib.Path(flags[flags.index("--data") + 1]).write_text(json.dumps(record))
    for name, family in TEMPLATES.items():
        shutil.copyfile(ROOT / "tests/data/templates" / family, name)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--show-samples", "1"])
    code = train.main()
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    learned = [part.partition("]]")[0] for part in out.split("[[")[1:]]
    assert learned and not any("Go away." in text for text in learned)
    assert "2+3?" not in "".join(learned) or "all" in flags
