# pytest tests/unit/test_files.py
"""Files and directories as people have them: what is read of them, what is left out, and what is refused."""

import bz2
import gzip
import json
import lzma
import os
import re

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from alst_jax.config import IGNORED, TrainConfig, UserError
from alst_jax.data.batches import TrainingBatches, fingerprint
from alst_jax.data.documents import Cutting, Sequence
from alst_jax.data.files import Selection, find_files
from alst_jax.data.formats import kind_of, stem_of
from alst_jax.data.labels import Labels
from alst_jax.data.named import Source, parse_sources
from alst_jax.data.prepare import cut_sources
from alst_jax.data.records import Fields
from alst_jax.data.sources import Reading, read_documents, read_source
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.flag_checks import check_run

LINES = [{"text": "one\u2028still one"}, {"text": "zwei 🕔"}]
TEXTS = [line["text"] for line in LINES]


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


# --------------------------------------------------------------------------------------------------- formats of files


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind, content, texts", [
    (".jsonl", json_lines(*LINES), TEXTS), (".json", json_lines(*LINES), TEXTS),
    (".json", json.dumps(LINES, indent=1).encode(), TEXTS), (".txt", b"a\r\nb", ["a\nb"]),
    (".csv", b'text\n"a,\n""b"""\n', ['a,\n"b"'])], ids=["jsonl", "json lines in json", "json", "txt", "csv"])
def test_compressed_files_are_read_alone_and_in_directories(tmp_path, suffix, kind, content, texts):
    file = put(tmp_path, f"a{kind}{suffix}", COMPRESS[suffix](content))
    assert file.read_bytes() != content
    assert read(file)[0] == read(tmp_path)[0] == texts
    put(tmp_path, f"a{kind}{suffix}", COMPRESS[suffix](content)[:-9])
    assert refusal(file).startswith(f"{file}: not a readable {suffix} file: ")
    put(tmp_path, f"a{kind}{suffix}", b"no such compression at all")
    assert refusal(file).startswith(f"{file}: not a readable {suffix} file: ")


def test_several_compressed_parts_in_one_file_are_all_read(tmp_path):
    for suffix, compress in COMPRESS.items():
        file = put(tmp_path, f"a.jsonl{suffix}", b"".join(compress(json_lines(line)) for line in LINES))
        assert read(file)[0] == TEXTS


def test_compressed_parquet_is_refused_with_what_to_do(tmp_path):
    file = put(tmp_path, "a.parquet.gz", gzip.compress(b"x"))
    assert refusal(file) == f"{file}: Parquet and Arrow files are compressed inside; unpack this one first"


def test_json_lines_in_a_json_file_know_their_lines(tmp_path):
    file = put(tmp_path, "a.json", b"\n" + json_lines(*LINES) + b"\n" + json_lines({"text": "three"}))
    documents = read_documents([str(file)])
    assert [(d.content, d.origin) for d in documents] == [
        (TEXTS[0], f"{file}:2"), (TEXTS[1], f"{file}:3"), ("three", f"{file}:5")]
    put(tmp_path, "a.json", json_lines(*LINES) + b"{")
    assert refusal(file).startswith(f"{file}:3: not valid JSON: ")


@pytest.mark.parametrize("content", [
    json.dumps(LINES), json.dumps(LINES, indent=2), "\n" + json.dumps(LINES), '{"text":\n"a"}', '{"text": "a"}'])
def test_json_files_with_one_value_are_as_before(tmp_path, content):
    value = json.loads(content)
    expected = [record["text"] for record in (value if isinstance(value, list) else [value])]
    assert read(put(tmp_path, "a.json", content))[0] == expected


def test_byte_order_marks_are_removed(tmp_path):
    mark = b"\xef\xbb\xbf"
    for name, content in {"a.txt": b"text", "a.jsonl": b'{"text": "text"}', "b.json": b'[{"text": "text"}]',
                          "c.json": b'{"text": "text"}\n{"text": "text"}', "a.csv": b"text\ntext\n"}.items():
        texts, _ = read(put(tmp_path, name, mark + content))
        assert set(texts) == {"text"}, name
        texts, _ = read(put(tmp_path, f"{name}.gz", gzip.compress(mark + content)))
        assert set(texts) == {"text"}, name
    file = put(tmp_path, "a.txt", "text".encode("utf-16"))
    assert refusal(file) == f"{file}: the text is UTF-16, and data are UTF-8; convert it (iconv -f UTF-16 -t UTF-8)"


def test_csv_and_tsv_are_read_by_column(tmp_path):
    csv = put(tmp_path, "a.csv", 'id,body\r\n1,"first, with\r\nline ""two"""\r\n\r\n2,second\r\n')
    documents = read_documents([str(csv)], text_field="body")
    assert [(d.content, d.origin) for d in documents] == [
        ('first, with\r\nline "two"', f"{csv}:2"), ("second", f"{csv}:5")]
    tsv = put(tmp_path, "a.tsv", "text\tid\nfirst, and on\t1\nsecond\t2\n")
    assert read(tsv)[0] == ["first, and on", "second"]
    pandas = put(tmp_path, "pandas.csv", ",text\n0,first\n1,second\n")
    assert read(pandas)[0] == ["first", "second"]


def test_large_csv_fields(tmp_path):
    text = "word, " * 100_000
    assert read(put(tmp_path, "a.csv", f'text,id\n"{text}",1\n'))[0] == [text]


@pytest.mark.parametrize("content, message", [
    ("body,id\nx,1\n", r"{file}:2: neither a 'text' nor .*\(it has: body, id\)"),
    ("text,id\nx,1\ny\n", r"{file}:3: 1 fields in a row, and the first row names 2 columns \(text, id\)"),
    ("text,text\nx,1\n", "{file}:1: the first row names the columns, each once; it is 'text', 'text'"),
    ('text\n"a" b\n', "{file}:2: not valid CSV: ',' expected after '\"'"),
    ('text\nfine\n"open\nto the end\n', r"{file}:3: not valid CSV: unexpected end of data"),
    (b"text\nfine\n\xff\n", r"{file}:3: not UTF-8 text \(byte 0\)"),
    (b"te\xffxt\nfine\n", r"{file}:1: not UTF-8 text \(byte 2\)")])
def test_bad_csv_is_refused_with_its_line(tmp_path, content, message):
    file = put(tmp_path, "a.csv", content)
    assert re.match(message.replace("{file}", re.escape(str(file))), refusal(file))


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_streams_and_files(tmp_path, stream):
    table = pyarrow.table({"text": [f"row {i}" for i in range(700)], "id": range(700)})
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    documents = read_documents([str(tmp_path / "a.arrow")])
    assert [d.content for d in documents] == [f"row {i}" for i in range(700)]
    assert documents[600].origin == f"{tmp_path / 'a.arrow'}[600]"
    content = (tmp_path / "a.arrow").read_bytes()
    put(tmp_path, "a.arrow", content[: len(content) // 2])
    assert refusal(tmp_path / "a.arrow").startswith(f"{tmp_path / 'a.arrow'}: not a readable Arrow file")


def save_to_disk(folder, texts):
    """The layout of datasets.save_to_disk: Arrow streams, and the JSON files that describe them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(texts):05}.arrow" for i in range(len(texts))]
    for name, part in zip(names, texts):
        table = pyarrow.table({"text": part})
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    put(folder, "dataset_info.json", json.dumps({"features": {"text": {"dtype": "string", "_type": "Value"}}}))
    put(folder, "state.json", json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}))


def test_a_dataset_saved_to_disk(tmp_path):
    save_to_disk(tmp_path / "saved", [["a", "b"], ["c"]])
    put(tmp_path / "saved", "cache-0123456789abcdef.arrow", b"of an earlier map()")
    texts, report = read(tmp_path / "saved")
    assert texts == ["a", "b", "c"] and report.split is None
    assert report.files_left_out == {"metadata": 3}
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    assert refusal(tmp_path / "saved") == (
        f"{tmp_path / 'saved' / 'state.json'} lists data-00001-of-00002.arrow, which is not there")


def test_a_dictionary_of_datasets_saved_to_disk(tmp_path):
    for split in ("train", "test", "train_sft"):
        save_to_disk(tmp_path / split, [[split]])
    put(tmp_path, "dataset_dict.json", json.dumps({"splits": ["train", "test", "train_sft"]}))
    assert read(tmp_path)[0] == ["train"]
    assert read(tmp_path, split="train_sft")[0] == ["train_sft"]
    assert read(tmp_path, held_out=True)[0] == ["test"]


def test_all_columns_of_parquet_are_given(tmp_path):
    """A record with both a text and a chat is refused, so both columns were read."""
    chat = [{"role": "assistant", "content": "Yes."}]
    file = put(tmp_path, "a.parquet", pyarrow.table({"text": ["a"], "messages": [chat]}))
    assert refusal(file).startswith(f"{file}[0]: both 'text' and 'messages'")
    file = put(tmp_path, "b.parquet", pyarrow.table({"messages": [chat], "tools": ["x"]}))
    assert "'tools'" in refusal(file)


@pytest.mark.parametrize("name, kind, stem", [
    ("a.jsonl", ".jsonl", "a"), ("a.b.JSON.GZ", ".json", "a.b"), ("a.zst", "", "a"), ("a", "", "a"), ("c.csv.xz", ".csv", "c")])
def test_kinds_of_names(name, kind, stem):
    assert (kind_of(name), stem_of(name)) == (kind, stem)


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


def test_a_directory_as_it_is_downloaded(tmp_path):
    texts, report = read(hub_layout(tmp_path))
    assert texts == ["train a", "train b", "train c"]
    assert (report.files, report.split, report.records, report.documents) == (2, "train", 3, 3)
    assert report.files_left_out == {"hidden": 1, "documentation": 2, "metadata": 1, "of split test": 1}
    (line,) = report.lines()
    assert "2 files of split train, text, 3 records, 3 documents, 0 tokens, 0 learned; files left out: " in line
    assert "1 of split test" in line
    assert read(tmp_path, split="test")[0] == read(tmp_path, held_out=True, flag="--eval-data")[0] == ["test a", "test b"]


def test_only_the_labels_of_train_are_learned(tmp_path):
    """One token a byte and an end token: each token but the first of a document is learned."""
    sources = cut_sources([str(hub_layout(tmp_path))], Reading(), "--data", Cutting(byte_tokenizer(), 8, 261))
    ((sequences, stats),) = sources.values()
    assert stats.labels == 3 * len("train a") == 21
    assert sum(int((s.labels != IGNORED).sum()) for s in sequences) == 21
    (report,) = stats.sources
    assert (report.tokens, report.learned, report.sequences) == (24, 21, 3)


@pytest.mark.parametrize("names, split, taken", [
    (["train.jsonl", "test.jsonl", "valid.jsonl"], None, ["train.jsonl"]),
    (["train.jsonl", "test.jsonl", "valid.jsonl"], "validation", ["valid.jsonl"]),
    (["train/0.jsonl", "test/0.jsonl"], None, ["train/0.jsonl"]),
    (["train/0.txt", "test/0.txt"], "test", ["test/0.txt"]),
    (["train.txt", "test.txt"], None, ["train.txt"]),
    (["first test.txt", "a train of thought.txt"], None, ["a train of thought.txt", "first test.txt"]),
    (["train_1.jsonl", "train2.jsonl", "gsm8k_test.jsonl"], None, ["train2.jsonl", "train_1.jsonl"]),
    (["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"], "train_sft",
     ["data/train_sft-00000-of-00001.jsonl"]),
    (["c4-train.00000-of-01024.jsonl", "c4-validation.00000-of-00008.jsonl"], None, ["c4-train.00000-of-01024.jsonl"]),
    (["a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl"], None, ["a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl"]),
    (["restraining.jsonl", "contest.jsonl"], None, ["contest.jsonl", "restraining.jsonl"]),
    (["train.jsonl", "more.jsonl"], None, ["train.jsonl"])])
def test_splits_by_names(tmp_path, names, split, taken):
    for name in names:
        put(tmp_path, name)
    assert read(tmp_path, split=split)[0] == taken


def test_directories_of_a_source_tree_are_no_splits(tmp_path):
    for name in ("model/a.py", "train/b.py", "test/c.py", "dev/d.py"):
        put(tmp_path, name, name)
    texts, report = read(tmp_path, include=("*.py",))
    assert texts == ["dev/d.py", "model/a.py", "test/c.py", "train/b.py"] and report.split is None


def test_a_split_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    put(tmp_path, "dev.jsonl"), put(tmp_path, "test.jsonl")
    assert refusal(tmp_path) == (f"--data {tmp_path}: no split 'train'; it has: test, validation (--split test, or name "
                                 "files)")
    assert refusal(tmp_path, split="train_sft").startswith(f"--data {tmp_path}: no split 'train_sft'; it has: test, val")
    put(tmp_path, "none/a.jsonl")
    assert refusal(tmp_path / "none", split="test") == (
        f"--data {tmp_path / 'none'}: no split 'test': no file there names a split; leave out --split")
    put(tmp_path, "train/train.jsonl")
    assert refusal(tmp_path / "train", flag="--eval-data", held_out=True) == (
        f"--eval-data {tmp_path / 'train'}: no split 'validation' or 'test'; it has: train (--eval-split "
        "train, or name files)")
    assert read(tmp_path, flag="--eval-data", held_out=True, split="train")[0] == ["train/train.jsonl"]


def test_a_file_that_is_named_is_always_read(tmp_path):
    put(tmp_path, "README.md", "read me"), put(tmp_path, ".hidden.txt", "hidden"), put(tmp_path, "test.jsonl")
    put(tmp_path, "state.json", '{"text": "state"}'), put(tmp_path, "code.py", "code")
    texts = [read(tmp_path / name, split="train", include=("*.c",), exclude=("*",), document_per="directory")[0]
             for name in ("README.md", ".hidden.txt", "test.jsonl", "state.json", "code.py")]
    assert texts == [["read me"], ["hidden"], ["test.jsonl"], ["state"], ["code"]]


def test_markdown_is_documentation_beside_records_and_text_elsewhere(tmp_path):
    put(tmp_path, "a.md", "a"), put(tmp_path, "b/c.md", "c")
    assert read(tmp_path)[0] == ["a", "c"]
    put(tmp_path, "d.jsonl")
    texts, report = read(tmp_path)
    assert texts == ["c", "d.jsonl"] and report.files_left_out == {"documentation": 1}


def test_other_kinds_are_left_out_counted_and_named_if_nothing_remains(tmp_path):
    put(tmp_path, "a.py", "code"), put(tmp_path, "b.py", "code"), put(tmp_path, "logo.png", b"\x89PNG\xff")
    put(tmp_path, "Makefile", "all:"), put(tmp_path, "empty.txt", b"")
    message = refusal(tmp_path)
    assert message.startswith(f"--data {tmp_path}: the directory holds no files to read; left out: ")
    assert all(part in message for part in ("2 of kind .py", "1 of kind .png", "1 of no kind", "1 empty", "--include '*.py'"))
    put(tmp_path, "a.txt")
    texts, report = read(tmp_path)
    assert texts == ["a.txt"]
    assert report.files_left_out == {"of kind .py": 2, "of kind .png": 1, "of no kind": 1, "empty": 1}


def test_include_and_exclude(tmp_path):
    for name in ("a.py", "b.txt", "src/c.py", "src/d.py", "tests/e.py", ".git/f.py", "README.md", "logo.png"):
        put(tmp_path, name, name)
    put(tmp_path, "src/__init__.py", b"")
    texts, report = read(tmp_path, include=("*.py",), exclude=("tests", "d.*"))
    assert texts == ["a.py", "src/c.py"]
    assert report.files_left_out == {"hidden": 1, "excluded": 2, "not included": 3, "empty": 1}
    assert read(tmp_path, include=("src/*", "README*"))[0] == ["README.md", "src/c.py", "src/d.py"]
    assert read(tmp_path, exclude=("src/*",))[0] == ["b.txt"]
    assert read(tmp_path, include=("*",), exclude=("*.png",))[0][0] == "README.md"
    assert "the directory holds no files to read; left out: " in refusal(tmp_path, include=("*.c",))
    put(tmp_path, "logo.png", b"\x89PNG\xff")
    assert refusal(tmp_path, include=("*",)).startswith(f"{tmp_path / 'logo.png'}: not UTF-8 text (byte 0)")


def source_trees(top):
    for name in ("one/a.py", "one/package.json", "one/sub/b.py", "two/c.py", "top.py", "LICENSE"):
        put(top, name, f"text of {name}" + "\n" * name.startswith("two"))
    put(top, "one/latin.c", b"caf\xe9")
    put(top, "one/logo.png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(100))


def test_a_document_a_file(tmp_path):
    source_trees(tmp_path)
    texts, report = read(tmp_path, document_per="file")
    assert texts == [f"text of {name}" + "\n" * name.startswith("two")
                     for name in ("one/a.py", "one/package.json", "one/sub/b.py", "top.py", "two/c.py")]
    assert report.files_left_out == {"not text": 2, "documentation": 1}


def test_a_document_a_directory(tmp_path):
    source_trees(tmp_path)
    reading = Reading(selection=Selection(document_per="directory", include=("*.py",)))
    documents, report = read_source(Source("code", str(tmp_path)), reading)
    assert [(d.content, d.origin) for d in documents] == [
        ("# file: one/a.py\ntext of one/a.py\n# file: one/sub/b.py\ntext of one/sub/b.py\n", str(tmp_path / "one")),
        ("# file: top.py\ntext of top.py\n", str(tmp_path)),
        ("# file: two/c.py\ntext of two/c.py\n", str(tmp_path / "two"))]
    assert (report.files, report.records, report.documents) == (4, 3, 3)


def test_linked_directories_are_followed(tmp_path):
    put(tmp_path, "elsewhere/a.jsonl"), put(tmp_path, "data/b.jsonl")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "same.jsonl").symlink_to(tmp_path / "data" / "b.jsonl")
    (tmp_path / "data" / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    texts, report = read(tmp_path / "data")
    assert texts == ["data/b.jsonl", "elsewhere/a.jsonl"]
    assert report.files_left_out == {"broken links": 1, "the same file again": 1}


def test_a_cycle_of_links_is_refused(tmp_path):
    put(tmp_path, "data/a/b.jsonl")
    loop = tmp_path / "data" / "a" / "loop"
    loop.symlink_to(tmp_path / "data")
    assert refusal(tmp_path / "data") == (
        f"--data {tmp_path / 'data'}: {loop} is a link to {tmp_path / 'data'}, a directory above it, and would be read "
        "without end; --exclude loop leaves it out")
    assert read(tmp_path / "data", exclude=("loop",))[0] == ["data/a/b.jsonl"]


# ------------------------------------------------------------------------------------------------- empty and bad records


def test_empty_records_are_left_out_and_counted(tmp_path):
    file = put(tmp_path, "a.jsonl", json_lines({"text": ""}, {"text": "a"}, {"text": " \n\t"}))
    texts, report = read(file)
    assert texts == ["a"] and report.records_left_out == {"empty": 2}
    assert (report.records, report.documents) == (3, 1)
    put(tmp_path, "a.jsonl", json_lines({"text": ""}))
    assert refusal(file) == f"--data {file}: no documents in there; records left out: 1 empty"


BAD = b'{"text": "a"}\n{"text": null}\n{"text": "b"\n["text"]\n{"text": "c\xff"}\n{"text": 5}\n{"text": "d"}\n'


def test_bad_records_are_refused_or_counted(tmp_path):
    file = put(tmp_path, "a.jsonl", BAD)
    assert refusal(file).startswith(f"{file}:2: neither a 'text' nor a 'messages' field")
    texts, report = read(file, skip_bad=True)
    assert texts == ["a", "d"]
    assert (report.records, report.documents, report.records_left_out) == (7, 2, {"bad": 5})
    assert "records left out: 5 bad; the first bad one: " + f"{file}:2: neither" in next(report.lines())
    csv = put(tmp_path, "a.csv", b"text,id\na,1\nb\nc\xff,3\nd,4\n")
    texts, report = read(csv, skip_bad=True)
    assert texts == ["a", "d"] and report.records_left_out == {"bad": 2}
    parquet = put(tmp_path, "a.parquet", pyarrow.table({"text": ["a", None, "b"]}))
    assert refusal(parquet).startswith(f"{parquet}[1]: neither")
    assert read(parquet, skip_bad=True)[0] == ["a", "b"]


@pytest.mark.parametrize("document_per, texts", [
    (None, ["good"]), ("file", ["good"]), ("directory", ["# file: one/b.txt\ngood\n"])])
def test_texts_that_are_not_utf8_are_refused_or_counted(tmp_path, document_per, texts):
    bad = put(tmp_path, "one/a.txt", b"a" * 9000 + b"\xff")
    put(tmp_path, "one/b.txt", "good")
    assert refusal(tmp_path, document_per=document_per).startswith(f"{bad}: not UTF-8 text (byte 9000)")
    read_texts, report = read(tmp_path, document_per=document_per, skip_bad=True)
    assert (read_texts, report.records_left_out, report.documents) == (texts, {"bad": 1}, 1)
    assert report.first_bad.startswith(f"{bad}: not UTF-8")


def test_half_surrogates_are_refused_or_counted_in_texts_and_chats(tmp_path):
    half, chat = "broken \ud83d", lambda text: [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    file = tmp_path / "a.jsonl"
    for bad in ({"text": half}, {"messages": chat(half)}):
        file.write_text(json.dumps({"text": "fine é"}) + "\n" + json.dumps(bad))
        assert refusal(file) == f"{file}:2: not Unicode text (character 7 is half of a surrogate pair)"
        texts, report = read(file, skip_bad=True)
        assert texts == ["fine é"] and report.records_left_out == {"bad": 1}


def test_chats_that_the_template_refuses_are_refused_or_counted(tmp_path):
    """The second chat begins with the assistant, which this template does not take."""
    user, assistant = ({"role": role, "content": "ab"} for role in ("user", "assistant"))
    file = put(tmp_path, "a.jsonl", json_lines({"messages": [user, assistant]}, {"messages": [assistant]}))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ("{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
                               + tokenizer.chat_template)
    cut = lambda skip: cut_sources([str(file)], Reading(skip_bad=skip), "--data",
                                   Cutting(tokenizer, 64, 261, skip_bad=skip))[str(file)][1]
    with pytest.raises(UserError, match=f"{file}:2: the model's chat template refuses this chat: user first"):
        cut(False)
    stats = cut(True)
    (report,) = stats.sources
    assert (stats.documents, report.documents, report.records_left_out) == (1, 1, {"bad": 1})
    assert report.first_bad.endswith("user first") and stats.labels == 3  # a, b and the end of the turn
    put(tmp_path, "a.jsonl", json_lines({"messages": [assistant]}))
    with pytest.raises(UserError, match="no documents in there; records left out: 1 bad; the first bad one: .*user first"):
        cut(True)


def test_bad_chats_are_counted_in_one_report_with_what_is_learned(tmp_path):
    """Two shards of chats: one is good, one has a wrong weight, one is a text, one has nothing to learn."""
    user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "ab"}
    half = {"role": "user", "content": "\ud83d"}
    put(tmp_path, "train-00000-of-00002.jsonl.gz", gzip.compress(json_lines(
        {"messages": [user, answer], "id": 7}, {"messages": [user, answer | {"weight": 2}]}, {"text": "a text"})))
    put(tmp_path, "train-00001-of-00002.jsonl.gz", gzip.compress(json_lines(
        {"messages": [user, answer, user, answer | {"weight": 0}]}) + json.dumps({"messages": [half, answer]}).encode()))
    cutting = Cutting(byte_tokenizer(), 64, 261, Labels("last"), skip_bad=True)
    ((sequences, stats),) = cut_sources([str(tmp_path)], Reading(skip_bad=True), "--data", cutting).values()
    tokens = len("?") + len("user\n") + len("ab") + len("assistant\n") + 4  # a token at each end of a turn
    assert list(stats.sources[0].lines()) == [
        f"{tmp_path}: 2 files of split train, messages, 5 records, 1 document, {tokens} tokens, 3 learned; "
        f"records left out: 4 bad; the first bad one: {tmp_path}/train-00000-of-00002.jsonl.gz:2: message 1: weight 2; a "
        "weight is 0 (not learned) or 1 (learned)", f"{tmp_path}: ignored keys id"]
    assert len(sequences) == stats.documents == 1 and stats.labels == 3


def test_pieces_without_anything_to_learn_are_in_the_report(tmp_path):
    chat = [{"role": "user", "content": "?" * 40}, {"role": "assistant", "content": "a"}]
    file = put(tmp_path, "a.jsonl", json_lines({"messages": chat}))
    ((_, stats),) = cut_sources([str(file)], Reading(), "--data", Cutting(byte_tokenizer(), 16, 261)).values()
    assert stats.dropped == 3 and "; pieces left out: 3 without anything to learn" in next(stats.sources[0].lines())


def test_a_file_of_bad_records_alone_is_refused_with_the_first(tmp_path):
    file = put(tmp_path, "a.jsonl", b'{"body": "a"}\n' * 3)
    assert refusal(file, skip_bad=True).startswith(
        f"--data {file}: no documents in there; records left out: 3 bad; the first bad one: {file}:1: neither")


# ------------------------------------------------------------------------------------------------ names, weights, the hub


def test_weights_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.jsonl"), put(tmp_path, "b/c.jsonl"), put(tmp_path, "2:30.jsonl"), put(tmp_path, "d:7/e.txt")
    put(tmp_path, "x=y.jsonl"), put(tmp_path, "v1.2/x.txt"), put(tmp_path, "c.json.gz", gzip.compress(b"{}"))
    assert parse_sources(["a.jsonl:1", "b/:3"]) == [Source("a.jsonl", "a.jsonl", 0.25), Source("b/", "b/", 0.75)]
    assert parse_sources(["a.jsonl", "code=b"]) == [Source("a.jsonl", "a.jsonl"), Source("code", "b")]
    assert parse_sources(["code=b:2e-1", "a.jsonl:.3"])[0] == Source("code", "b", 0.4)
    assert parse_sources(["2:30.jsonl", "d:7", "x=y.jsonl"]) == [
        Source("2:30.jsonl", "2:30.jsonl"), Source("d:7", "d:7"), Source("x=y.jsonl", "x=y.jsonl")]
    held_out = parse_sources(["a.jsonl", "b/", "v1.2", "c.json.gz", "owner/name.v2"], "--eval-data", held_out=True)
    assert [source.name for source in held_out] == ["a", "b", "v1.2", "c", "name.v2"]


@pytest.mark.parametrize("given, message", [
    (["a.jsonl", "a.jsonl"], "two sources of one name (a.jsonl)"),
    (["a.jsonl", "./a.jsonl"], "two sources of one path (./a.jsonl); leave out one of them. A weight (PATH:0.7)"),
    (["x=a.jsonl", "x=b"], "--data a.jsonl b: two sources of one name (x); name one of them otherwise: --data NAME=PATH"),
    (["a.jsonl:0.3", "b"], "--data b: no weight, and a.jsonl has 0.3; give all sources a weight or none"),
    (["a.jsonl:0", "b:1"], "--data a.jsonl:0: the weight '0' is not a positive number"),
    (["a.jsonl:-1", "b:1"], "the weight '-1' is not a positive number"),
    (["a.jsonl:1e999", "b:1"], "the weight '1e999' is not a positive number"),
    (["a.jsonl:0,3", "b:1"], "the weight '0,3' is not a positive number"), ([""], "--data '': name a file")])
def test_bad_names_and_weights_are_refused(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.jsonl"), put(tmp_path, "b/c.jsonl")
    with pytest.raises(UserError) as error:
        parse_sources(given)
    assert message in str(error.value)


def test_held_out_sources_of_one_name_or_with_a_weight_are_refused(tmp_path):
    put(tmp_path, "x/a.jsonl"), put(tmp_path, "y/a.jsonl.gz", gzip.compress(b"x"))
    paths = [str(tmp_path / "x/a.jsonl"), str(tmp_path / "y/a.jsonl.gz")]
    with pytest.raises(UserError, match=r"two sources of one name \(a\); name one of them otherwise: --eval-data NAME=PATH"):
        parse_sources(paths, "--eval-data", held_out=True)
    assert [s.name for s in parse_sources([paths[0], f"b={paths[1]}"], "--eval-data", held_out=True)] == ["a", "b"]
    with pytest.raises(UserError, match="held-out data have no weights"):
        parse_sources([f"{paths[0]}:0.5"], "--eval-data", held_out=True)


def test_a_weighted_source_with_nothing_to_predict_is_refused(tmp_path):
    long, short = put(tmp_path, "long.txt", "long enough"), put(tmp_path, "short.txt", "a")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    given, cutting = [str(long), str(short)], Cutting(tokenizer, 16, 261)
    assert sum(stats.sequences for _, stats in cut_sources(given, Reading(), "--data", cutting).values()) == 1
    with pytest.raises(UserError, match="short.txt: 1 documents and nothing in them to predict, so that no weight"):
        cut_sources([f"{path}:1" for path in given], Reading(), "--data", cutting)


COUNTS, WEIGHTS = (5, 40, 3), (0.5, 0.2, 0.3)


def mixed(seed=0, rows=2, weights=WEIGHTS):
    """Batches of three sources; sequence i of source s begins with token 100 s + i."""
    tokens = [100 * s + i for s, count in enumerate(COUNTS) for i in range(count)]
    sequences = [Sequence(np.full(4, token, np.int32), np.full(4, token, np.int32)) for token in tokens]
    return TrainingBatches(sequences, 4, rows, 1, seed, 0, list(zip(COUNTS, weights)))


def order(batches, count):
    return [int(token) for _ in range(count) for token in next(batches)["tokens"][..., 0].reshape(-1)]


def test_the_parts_of_weighted_sources_hold_from_the_start():
    seen = np.array(order(mixed(), 500))
    for source, (count, weight) in enumerate(zip(COUNTS, WEIGHTS)):
        running = np.cumsum(seen // 100 == source)
        assert np.abs(running - weight * np.arange(1, 1001)).max() < 3
        assert running[-1] == 1000 * weight
        own = seen[seen // 100 == source] - 100 * source
        for start in range(0, own.size - count, count):  # each epoch of a source holds each of its sequences once
            assert sorted(own[start : start + count]) == list(range(count))
    assert len({tuple(seen[seen < 100][i : i + 5]) for i in range(0, 50, 5)}) > 3  # in another order each time


@pytest.mark.parametrize("weights", [(1 / 3, 2 / 3), (0.001, 0.999), (0.7, 0.1, 0.1, 0.1), (0.123, 0.456, 0.2, 0.221)])
def test_weights_are_exact_in_the_long_run(weights):
    sequences = [Sequence(np.full(2, i, np.int32), np.full(2, i, np.int32)) for i in range(len(weights))]
    batches = TrainingBatches(sequences, 2, 500, 1, 0, 0, [(1, weight) for weight in weights])
    seen = np.array(order(batches, 12))
    for source, weight in enumerate(weights):
        off = np.cumsum(seen == source) - weight * np.arange(1, 6001)
        assert np.abs(off).max() < len(weights) and abs(off[-1]) <= 1


def test_the_order_of_weighted_sources_is_a_function_of_the_seed_and_resumes():
    straight = mixed()
    assert order(straight, 7) == order(mixed(), 7) != order(mixed(seed=1), 7)
    state = json.loads(json.dumps(straight.get_state()))
    rest = order(straight, 40)
    resumed = mixed()
    resumed.set_state(state)
    assert order(resumed, 40) == rest == order(mixed(), 47)[14:]


def test_the_fingerprint_tells_other_weights():
    sequences = [Sequence(np.ones(2, np.int32), np.ones(2, np.int32))] * 4
    prints = [fingerprint(sequences, mixture) for mixture in (
        None, [(2, 0.5), (2, 0.5)], [(2, 0.25), (2, 0.75)], [(1, 0.5), (3, 0.5)])]
    assert len(set(prints)) == 4 and prints[0] == fingerprint(sequences)


def test_data_sets_of_the_hub_by_name(tmp_path, monkeypatch):
    """The download itself is replaced: what is asked of the hub, and what becomes of the answer."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["repo_type"], options["allow_patterns"]))
        return str(hub_layout(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    texts, report = read("owner/name")
    assert texts == ["train a", "train b", "train c"] and report.name == "owner/name"
    ((name, kind, patterns),) = asked
    assert (name, kind) == ("owner/name", "dataset") and {"*.parquet", "*/*.parquet", "*.json.gz"} <= set(patterns)
    read("owner/name", include=("*.parquet",))
    assert asked[1][2] == ["*.parquet", "*/*.parquet"]
    put(tmp_path, "books/a.txt")
    for path in ("books/b", "owner/a.jsonl", "nowhere", "./owner/name", "/owner/name"):
        assert refusal(path) == f"--data {path}: no such file or directory"
    assert len(asked) == 2


def test_without_a_hub_the_name_is_refused():
    """The tests run with HF_HUB_OFFLINE."""
    message = refusal("no-such-owner/no-such-name")
    assert message.startswith("--data no-such-owner/no-such-name: no such file or directory, and no data set of this name "
                              "could be fetched from the hub (") and "\n" not in message


# ----------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("flags, message", [
    (dict(split="test", document_per="file", data=("a",)), "--split test is for data sets, and --document-per file for"),
    (dict(eval_split="dev", data=("a",)), "--eval-split dev says how --eval-data is read"),
    (dict(include=("*.py",)), "--include says how --data is read"), (dict(skip_bad_records=True), "--skip-bad-records says"),
    (dict(template_date="2026-13-45"), "--template-date 2026-13-45: write a date"),
    (dict(template_date="20261127"), "--template-date 20261127: write a date"),
    (dict(ignore_fields=("id",)), "--ignore-fields says how --data is read"),
    (dict(show_samples=1, plan_only=True), "--show-samples 1 reads data, and --plan-only and --find-max-seq-len need none")])
def test_flags_of_data_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        check_run(TrainConfig(**flags))


def test_files_are_found_in_the_order_of_their_paths(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt", "B.txt"):
        put(tmp_path, name)
    assert ["/".join(f.below) for f in find_files(str(tmp_path), Selection(), "--data").files] == [
        "B.txt", "a/z.txt", "a.txt", "b.txt"]
    assert os.listdir(tmp_path)
