# pytest tests/unit/test_files.py
"""Files and directories as people have them: what is read of them, what is left out, and what is refused."""

import bz2
import gzip
import json
import lzma
import re

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from alst_jax.data.formats import kind_of, stem_of
from alst_jax.data.sources import read_documents
from tests.unit.reading import json_lines, put, read, refusal

LINES = [{"text": "one\u2028still one"}, {"text": "zwei 🕔"}]
TEXTS = [line["text"] for line in LINES]


# --------------------------------------------------------------------------------------------------- formats of files


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    "kind, content, texts",
    [
        (".jsonl", json_lines(*LINES), TEXTS),
        (".json", json_lines(*LINES), TEXTS),
        (".json", json.dumps(LINES, indent=1).encode(), TEXTS),
        (".txt", b"a\r\nb", ["a\nb"]),
        (".csv", b'text\n"a,\n""b"""\n', ['a,\n"b"']),
    ],
    ids=["jsonl", "json lines in json", "json", "txt", "csv"],
)
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
        (TEXTS[0], f"{file}:2"),
        (TEXTS[1], f"{file}:3"),
        ("three", f"{file}:5"),
    ]
    put(tmp_path, "a.json", json_lines(*LINES) + b"{")
    assert refusal(file).startswith(f"{file}:3: not valid JSON: ")


@pytest.mark.parametrize(
    "content",
    [json.dumps(LINES), json.dumps(LINES, indent=2), "\n" + json.dumps(LINES), '{"text":\n"a"}', '{"text": "a"}'],
)
def test_json_files_with_one_value_are_as_before(tmp_path, content):
    value = json.loads(content)
    expected = [record["text"] for record in (value if isinstance(value, list) else [value])]
    assert read(put(tmp_path, "a.json", content))[0] == expected


def test_byte_order_marks_are_removed(tmp_path):
    mark = b"\xef\xbb\xbf"
    for name, content in {
        "a.txt": b"text",
        "a.jsonl": b'{"text": "text"}',
        "b.json": b'[{"text": "text"}]',
        "c.json": b'{"text": "text"}\n{"text": "text"}',
        "a.csv": b"text\ntext\n",
    }.items():
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
        ('first, with\r\nline "two"', f"{csv}:2"),
        ("second", f"{csv}:5"),
    ]
    tsv = put(tmp_path, "a.tsv", "text\tid\nfirst, and on\t1\nsecond\t2\n")
    assert read(tsv)[0] == ["first, and on", "second"]
    pandas = put(tmp_path, "pandas.csv", ",text\n0,first\n1,second\n")
    assert read(pandas)[0] == ["first", "second"]


def test_large_csv_fields(tmp_path):
    text = "word, " * 100_000
    assert read(put(tmp_path, "a.csv", f'text,id\n"{text}",1\n'))[0] == [text]


@pytest.mark.parametrize(
    "content, message",
    [
        ("body,id\nx,1\n", r"{file}:2: neither a 'text' nor .*\(it has: body, id\)"),
        ("text,id\nx,1\ny\n", r"{file}:3: 1 fields in a row, and the first row names 2 columns \(text, id\)"),
        ("text,text\nx,1\n", "{file}:1: the first row names the columns, each once; it is 'text', 'text'"),
        ('text\n"a" b\n', "{file}:2: not valid CSV: ',' expected after '\"'"),
        ('text\nfine\n"open\nto the end\n', r"{file}:3: not valid CSV: unexpected end of data"),
        (b"text\nfine\n\xff\n", r"{file}:3: not UTF-8 text \(byte 0\)"),
        (b"te\xffxt\nfine\n", r"{file}:1: not UTF-8 text \(byte 2\)"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path, content, message):
    file = put(tmp_path, "a.csv", content)
    assert re.match(message.replace("{file}", re.escape(str(file))), refusal(file))


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_streams_and_files(tmp_path, stream):
    table = pyarrow.table({"text": [f"row {i}" for i in range(700)], "id": range(700)})
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(
        str(tmp_path / "a.arrow"), table.schema
    ) as writer:
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
        f"{tmp_path / 'saved' / 'state.json'} lists data-00001-of-00002.arrow, which is not there"
    )


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


@pytest.mark.parametrize(
    "name, kind, stem",
    [
        ("a.jsonl", ".jsonl", "a"),
        ("a.b.JSON.GZ", ".json", "a.b"),
        ("a.zst", "", "a"),
        ("a", "", "a"),
        ("c.csv.xz", ".csv", "c"),
    ],
)
def test_kinds_of_names(name, kind, stem):
    assert (kind_of(name), stem_of(name)) == (kind, stem)
