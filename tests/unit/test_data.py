# pytest tests/unit/test_data.py
"""Files to documents, documents to sequences, sequences to batches; everything wrong with a file is named."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from alst_jax.config import UserError
from alst_jax.data.sources import read_documents
from alst_jax.data.tokenizer import CHAT_TEMPLATE, byte_tokenizer, load_tokenizer
from tests.unit.documents import CHAT, PAD


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return str(path)


def contents(*paths, **fields):
    return [document.content for document in read_documents(paths, **fields)]


def test_json_lines_know_their_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two", "id": 7}\r\n')
    chats = write(tmp_path / "b.jsonl", {"messages": CHAT})
    documents = read_documents([str(file), chats])
    assert [d.content for d in documents] == ["one", "two", CHAT]
    assert [d.origin for d in documents] == [f"{file}:1", f"{file}:3", f"{chats}:1"]
    assert [d.is_chat for d in documents] == [False, False, True]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_unicode_line_separators_inside_a_string_end_no_line(tmp_path, separator):
    text = f"one{separator}two"
    assert contents(write(tmp_path / "a.jsonl", {"text": text}, {"text": "three"})) == [text, "three"]


def test_json_and_plain_text(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    (tmp_path / "one.json").write_text(json.dumps({"text": "c"}))
    (tmp_path / "plain.md").write_text("# d\n\nä\n", encoding="utf-8")
    documents = read_documents([str(tmp_path / name) for name in ("plain.md", "list.json", "one.json")])
    assert [d.content for d in documents] == ["# d\n\nä\n", "a", "b", "c"]  # in the order they are named
    assert documents[2].origin == f"{tmp_path / 'list.json'}[1]"


def test_parquet_text_and_messages(tmp_path):
    text, chats, other = (tmp_path / f"{name}.parquet" for name in ("text", "chats", "other"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "id": [1, 2, 3]}), text, row_group_size=2)
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT[:2]]}), chats)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), other)
    documents = read_documents([str(text), str(chats)])
    assert [d.content for d in documents] == ["a", "b", "c", CHAT, CHAT[:2]]
    assert documents[2].origin == f"{text}[2]"
    assert contents(str(other), text_field="body") == ["x"]


@pytest.mark.parametrize("made", [1, -1], ids=["first to last", "last to first"])
def test_directories_are_read_recursively_in_the_order_of_their_names(tmp_path, made):
    """Whatever order they were made in, which is what some file systems list them in."""
    names = ["a.jsonl", "b/1.jsonl", "b/2.jsonl", "b/3.jsonl", "c/d/e.jsonl", "c/f.jsonl", "g.jsonl"]
    for name in [*names, ".hidden.jsonl", "b/.cache/x.jsonl"][::made]:
        write(tmp_path / name, {"text": name})
    assert contents(str(tmp_path)) == names


def test_other_field_names(tmp_path):
    files = write(tmp_path / "a.jsonl", {"body": "x", "text": "no"}), write(tmp_path / "b.jsonl", {"turns": CHAT})
    names = dict(text_field="body", messages_field="turns")
    assert contents(*files, **names, ignore_fields=("text",)) == ["x", CHAT]
    with pytest.raises(UserError, match="a.jsonl:1: 'text' beside 'body' is not known.*--ignore-fields text"):
        contents(*files, **names)


def record(value):
    return json.dumps(value).encode()


def messages(*turns):
    return record({"messages": list(turns)})


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "{file}: the file is empty"),
        ("a.parquet", b"", "{file}: the file is empty"),
        ("a.txt", b" \n\t\n", "--data {file}: no documents found"),
        ("a.jsonl", b"\n\n", "--data {file}: no documents found"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n\n{"text": \n',
            "{file}:3: not valid JSON: Expecting value.*each line of a .jsonl",
        ),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}',
            r"{file}:1: neither a 'text' nor a 'messages' field \(it has: body, id\); "
            "name the right one with --text-field or --messages-field",
        ),
        ("a.jsonl", b"{}", r"{file}:1: neither .* \(it has: none\)"),
        ("a.jsonl", b'{"text": null, "messages": null}', r"{file}:1: neither .* \(it has: none\)"),
        (
            "a.jsonl",
            b'{"text": "a"}\n["text"]',
            "{file}:2: a record is a JSON object with 'text' or 'messages', not list",
        ),
        ("a.jsonl", b'"text"', "{file}:1: a record is a JSON object with 'text' or 'messages', not str"),
        ("a.jsonl", b'{"text": 3}', r"{file}:1: 'text' holds int, not text \(--text-field\)"),
        (
            "a.jsonl",
            b'{"text": "a\xff"}',
            r"{file}:1: not UTF-8 text \(byte 11\); data are .jsonl, .json, .csv, .*UTF-8",
        ),
        ("a.bin", b"abc\xfe", r"{file}: not UTF-8 text \(byte 3\)"),
        (
            "a.json",
            b'{"text":\n"a"}\n{"text": "b"}',
            "{file}: not valid JSON: Extra data.*a .json file is a list of objects, one object, or one object a line",
        ),
        ("a.json", b'[{"text": "a"}, 5]', r"{file}\[1\]: a record is a JSON object with 'text' or 'messages', not int"),
        ("a.parquet", b"PAR1 and then nothing", "{file}: not a readable Parquet file: "),
        ("a.jsonl", messages(), "{file}:1: 'messages' is a list of objects with 'role' and 'content'.*and not empty"),
        ("a.jsonl", b'{"messages": "hello"}', r"{file}:1: 'messages' is a list.*\(--messages-field\), and not empty"),
        ("a.jsonl", messages(CHAT[1], {"role": "user"}), "{file}:1: message 1 lacks 'role' or 'content'"),
        ("a.jsonl", messages(CHAT[1], "hello"), "{file}:1: message 1 lacks 'role' or 'content'"),
        (
            "a.jsonl",
            messages({"role": "assistant", "content": [{"type": "image"}]}),
            "{file}:1: message 0: a content part of the type 'image'; only parts of the type 'text'",
        ),
        ("a.jsonl", messages(CHAT[0]), "{file}:1: the chat has no message of the role 'assistant'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match="^" + message.replace("{file}", re.escape(str(file)))):
        read_documents([str(file)])


def test_wrong_parquet_columns_are_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a.parquet\[0\]: neither a 'text' nor a 'messages' field \(it has: body, id\)"
    ):
        read_documents([str(tmp_path / "a.parquet")])


def test_a_parquet_file_broken_in_the_middle_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 1000 + str(i) for i in range(100)]}), file)
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)  # the data pages; the footer stays
    file.write_bytes(content)
    with pytest.raises(UserError, match="a.parquet: not a readable Parquet file"):
        read_documents([str(file)])


def test_missing_and_empty_places_are_named_with_their_flag(tmp_path):
    with pytest.raises(UserError, match=f"^--eval-data {tmp_path}/nowhere: no such file or directory"):
        read_documents([f"{tmp_path}/nowhere"], flag="--eval-data")
    with pytest.raises(UserError, match=f"^--data {tmp_path}: the directory holds no files"):
        read_documents([str(tmp_path)])
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(UserError, match=f"^--data {tmp_path}: the directory holds no files"):
        read_documents([str(tmp_path)])


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_the_byte_tokenizer_is_one_token_a_byte_and_survives_saving(tmp_path):
    tokenizer, text = byte_tokenizer(), "Größe 🕔\n\x00 " + "".join(map(chr, range(256)))
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, load_tokenizer(tmp_path)):
        ids = each(text)["input_ids"]
        assert len(ids) == len(text.encode()) and len(each) == 261
        assert each.decode(ids) == text
        assert (each.eos_token_id, each.pad_token_id, each.chat_template) == (257, PAD, CHAT_TEMPLATE)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer .*; copy the files of the tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"{tmp_path}: the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_other_tokens_than_those_of_tokenizer_json_are_refused(tmp_path):
    """A class of transformers may replace the file's own rules for spaces."""
    byte_tokenizer().save_pretrained(tmp_path)
    contents = json.loads((tmp_path / "tokenizer.json").read_text())
    contents["model"]["vocab"]["<unk>"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "CodeLlamaTokenizer"}))
    with pytest.raises(
        UserError,
        match="loads the tokenizer as CodeLlamaTokenizer, which splits a text into .* tokens; by "
        'tokenizer.json it has .* other tokens; install a newer transformers, or set "tokenizer_class"',
    ):
        load_tokenizer(tmp_path)
