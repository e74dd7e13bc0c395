# pytest tests/unit/test_bad_records.py
"""Bad records are refused with their place, or counted where that is asked for."""

import gzip
import json

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from alst_jax.config import UserError
from alst_jax.data.documents import Cutting
from alst_jax.data.labels import Labels
from alst_jax.data.prepare import cut_sources
from alst_jax.data.sources import Reading
from alst_jax.data.tokenizer import byte_tokenizer
from tests.unit.reading import json_lines, put, read, refusal


def test_empty_records_are_left_out_and_counted(tmp_path):
    file = put(tmp_path, "a.jsonl", json_lines({"text": ""}, {"text": "a"}, {"text": " \n\t"}))
    texts, report = read(file)
    assert texts == ["a"] and report.records_left_out == {"empty": 2}
    assert (report.records, report.documents) == (3, 1)
    put(tmp_path, "a.jsonl", json_lines({"text": ""}))
    assert refusal(file) == f"--data {file}: no documents found; records left out: 1 empty"


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


@pytest.mark.parametrize(
    "document_per, texts", [(None, ["good"]), ("file", ["good"]), ("directory", ["# file: one/b.txt\ngood\n"])]
)
def test_texts_that_are_not_utf8_are_refused_or_counted(tmp_path, document_per, texts):
    bad = put(tmp_path, "one/a.txt", b"a" * 9000 + b"\xff")
    put(tmp_path, "one/b.txt", "good")
    assert refusal(tmp_path, document_per=document_per).startswith(f"{bad}: not UTF-8 text (byte 9000)")
    read_texts, report = read(tmp_path, document_per=document_per, skip_bad=True)
    assert (read_texts, report.records_left_out, report.documents) == (texts, {"bad": 1}, 1)
    assert report.first_bad.startswith(f"{bad}: not UTF-8")


def test_half_surrogates_are_refused_or_counted_in_texts_and_chats(tmp_path):
    half, chat = (
        "broken \ud83d",
        lambda text: [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}],
    )
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
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + tokenizer.chat_template
    )
    cut = lambda skip: cut_sources(
        [str(file)], Reading(skip_bad=skip), "--data", Cutting(tokenizer, 64, 261, skip_bad=skip)
    )[str(file)][1]
    with pytest.raises(UserError, match=f"{file}:2: the model's chat template refuses this chat: user first"):
        cut(False)
    stats = cut(True)
    (report,) = stats.sources
    assert (stats.documents, report.documents, report.records_left_out) == (1, 1, {"bad": 1})
    assert report.first_bad.endswith("user first") and stats.labels == 3  # a, b and the end of the turn
    put(tmp_path, "a.jsonl", json_lines({"messages": [assistant]}))
    with pytest.raises(UserError, match="no documents found; records left out: 1 bad; the first bad one: .*user first"):
        cut(True)


def test_bad_chats_are_counted_in_one_report_with_what_is_learned(tmp_path):
    """Two shards of chats: one is good, one has a wrong weight, one is a text, one has nothing to learn."""
    user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "ab"}
    half = {"role": "user", "content": "\ud83d"}
    put(
        tmp_path,
        "train-00000-of-00002.jsonl.gz",
        gzip.compress(
            json_lines(
                {"messages": [user, answer], "id": 7}, {"messages": [user, answer | {"weight": 2}]}, {"text": "a text"}
            )
        ),
    )
    put(
        tmp_path,
        "train-00001-of-00002.jsonl.gz",
        gzip.compress(
            json_lines({"messages": [user, answer, user, answer | {"weight": 0}]})
            + json.dumps({"messages": [half, answer]}).encode()
        ),
    )
    cutting = Cutting(byte_tokenizer(), 64, 261, Labels("last"), skip_bad=True)
    ((sequences, stats),) = cut_sources([str(tmp_path)], Reading(skip_bad=True), "--data", cutting).values()
    tokens = len("?") + len("user\n") + len("ab") + len("assistant\n") + 4  # a token at each end of a turn
    assert list(stats.sources[0].lines()) == [
        f"{tmp_path}: 2 files of split train, messages, 5 records, 1 document, {tokens} tokens, 3 learned; "
        f"records left out: 4 bad; the first bad one: {tmp_path}/train-00000-of-00002.jsonl.gz:2: message 1: weight 2; a "
        "weight is 0 (not learned) or 1 (learned)",
        f"{tmp_path}: ignored keys id",
    ]
    assert len(sequences) == stats.documents == 1 and stats.labels == 3


def test_pieces_without_anything_to_learn_are_in_the_report(tmp_path):
    chat = [{"role": "user", "content": "?" * 40}, {"role": "assistant", "content": "a"}]
    file = put(tmp_path, "a.jsonl", json_lines({"messages": chat}))
    ((_, stats),) = cut_sources([str(file)], Reading(), "--data", Cutting(byte_tokenizer(), 16, 261)).values()
    assert stats.dropped == 3 and "; pieces left out: 3 without anything to learn" in next(stats.sources[0].lines())


def test_a_file_of_bad_records_alone_is_refused_with_the_first(tmp_path):
    file = put(tmp_path, "a.jsonl", b'{"body": "a"}\n' * 3)
    assert refusal(file, skip_bad=True).startswith(
        f"--data {file}: no documents found; records left out: 3 bad; the first bad one: {file}:1: neither"
    )
