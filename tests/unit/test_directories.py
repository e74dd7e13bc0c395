# pytest tests/unit/test_directories.py
"""Directories of data: splits, kinds of files, links, documents of several files."""

import pytest

from alst_jax.config import IGNORED
from alst_jax.data.documents import Cutting
from alst_jax.data.files import Selection
from alst_jax.data.named import Source
from alst_jax.data.prepare import cut_sources
from alst_jax.data.sources import Reading, read_source
from alst_jax.data.tokenizer import byte_tokenizer
from tests.unit.reading import hub_layout, put, read, refusal


def test_a_directory_as_it_is_downloaded(tmp_path):
    texts, report = read(hub_layout(tmp_path))
    assert texts == ["train a", "train b", "train c"]
    assert (report.files, report.split, report.records, report.documents) == (2, "train", 3, 3)
    assert report.files_left_out == {"hidden": 1, "documentation": 2, "metadata": 1, "of split test": 1}
    (line,) = report.lines()
    assert "2 files of split train, text, 3 records, 3 documents, 0 tokens, 0 learned; files left out: " in line
    assert "1 of split test" in line
    assert (
        read(tmp_path, split="test")[0] == read(tmp_path, held_out=True, flag="--eval-data")[0] == ["test a", "test b"]
    )


def test_only_the_labels_of_train_are_learned(tmp_path):
    """One token a byte and an end token: each token but the first of a document is learned."""
    sources = cut_sources([str(hub_layout(tmp_path))], Reading(), "--data", Cutting(byte_tokenizer(), 8, 261))
    ((sequences, stats),) = sources.values()
    assert stats.labels == 3 * len("train a") == 21
    assert sum(int((s.labels != IGNORED).sum()) for s in sequences) == 21
    (report,) = stats.sources
    assert (report.tokens, report.learned, report.sequences) == (24, 21, 3)


@pytest.mark.parametrize(
    "names, split, taken",
    [
        (["train.jsonl", "test.jsonl", "valid.jsonl"], None, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl", "valid.jsonl"], "validation", ["valid.jsonl"]),
        (["train/0.jsonl", "test/0.jsonl"], None, ["train/0.jsonl"]),
        (["train/0.txt", "test/0.txt"], "test", ["test/0.txt"]),
        (["train.txt", "test.txt"], None, ["train.txt"]),
        (["first test.txt", "a train of thought.txt"], None, ["a train of thought.txt", "first test.txt"]),
        (["train_1.jsonl", "train2.jsonl", "gsm8k_test.jsonl"], None, ["train2.jsonl", "train_1.jsonl"]),
        (
            ["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"],
            "train_sft",
            ["data/train_sft-00000-of-00001.jsonl"],
        ),
        (
            ["c4-train.00000-of-01024.jsonl", "c4-validation.00000-of-00008.jsonl"],
            None,
            ["c4-train.00000-of-01024.jsonl"],
        ),
        (
            ["a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl"],
            None,
            ["a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl"],
        ),
        (["restraining.jsonl", "contest.jsonl"], None, ["contest.jsonl", "restraining.jsonl"]),
        (["train.jsonl", "more.jsonl"], None, ["train.jsonl"]),
    ],
)
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
    assert refusal(tmp_path) == (
        f"--data {tmp_path}: no split 'train'; it has: test, validation (--split test, or name files)"
    )
    assert refusal(tmp_path, split="train_sft").startswith(
        f"--data {tmp_path}: no split 'train_sft'; it has: test, val"
    )
    put(tmp_path, "none/a.jsonl")
    assert refusal(tmp_path / "none", split="test") == (
        f"--data {tmp_path / 'none'}: no split 'test': no file there names a split; leave out --split"
    )
    put(tmp_path, "train/train.jsonl")
    assert refusal(tmp_path / "train", flag="--eval-data", held_out=True) == (
        f"--eval-data {tmp_path / 'train'}: no split 'validation' or 'test'; it has: train (--eval-split "
        "train, or name files)"
    )
    assert read(tmp_path, flag="--eval-data", held_out=True, split="train")[0] == ["train/train.jsonl"]


def test_a_file_that_is_named_is_always_read(tmp_path):
    put(tmp_path, "README.md", "read me"), put(tmp_path, ".hidden.txt", "hidden"), put(tmp_path, "test.jsonl")
    put(tmp_path, "state.json", '{"text": "state"}'), put(tmp_path, "code.py", "code")
    texts = [
        read(tmp_path / name, split="train", include=("*.c",), exclude=("*",), document_per="directory")[0]
        for name in ("README.md", ".hidden.txt", "test.jsonl", "state.json", "code.py")
    ]
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
    assert all(
        part in message for part in ("2 of kind .py", "1 of kind .png", "1 of no kind", "1 empty", "--include '*.py'")
    )
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
    assert texts == [
        f"text of {name}" + "\n" * name.startswith("two")
        for name in ("one/a.py", "one/package.json", "one/sub/b.py", "top.py", "two/c.py")
    ]
    assert report.files_left_out == {"not text": 2, "documentation": 1}


def test_a_document_a_directory(tmp_path):
    source_trees(tmp_path)
    reading = Reading(selection=Selection(document_per="directory", include=("*.py",)))
    documents, report = read_source(Source("code", str(tmp_path)), reading)
    assert [(d.content, d.origin) for d in documents] == [
        ("# file: one/a.py\ntext of one/a.py\n# file: one/sub/b.py\ntext of one/sub/b.py\n", str(tmp_path / "one")),
        ("# file: top.py\ntext of top.py\n", str(tmp_path)),
        ("# file: two/c.py\ntext of two/c.py\n", str(tmp_path / "two")),
    ]
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
        "without end; --exclude loop leaves it out"
    )
    assert read(tmp_path / "data", exclude=("loop",))[0] == ["data/a/b.jsonl"]
