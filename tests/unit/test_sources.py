# pytest tests/unit/test_sources.py
"""Sources with names and weights, the hub, and flags of data that make no sense."""

import gzip
import json
import os

import huggingface_hub
import numpy as np
import pytest

from alst_jax.config import TrainConfig, UserError
from alst_jax.data.batches import TrainingBatches, fingerprint
from alst_jax.data.documents import Cutting, Sequence
from alst_jax.data.files import Selection, find_files
from alst_jax.data.named import Source, parse_sources
from alst_jax.data.prepare import cut_sources
from alst_jax.data.sources import Reading
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.flag_checks import check_run
from tests.unit.reading import hub_layout, put, read, refusal


def test_weights_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.jsonl"), put(tmp_path, "b/c.jsonl"), put(tmp_path, "2:30.jsonl"), put(tmp_path, "d:7/e.txt")
    put(tmp_path, "x=y.jsonl"), put(tmp_path, "v1.2/x.txt"), put(tmp_path, "c.json.gz", gzip.compress(b"{}"))
    assert parse_sources(["a.jsonl:1", "b/:3"]) == [Source("a.jsonl", "a.jsonl", 0.25), Source("b/", "b/", 0.75)]
    assert parse_sources(["a.jsonl", "code=b"]) == [Source("a.jsonl", "a.jsonl"), Source("code", "b")]
    assert parse_sources(["code=b:2e-1", "a.jsonl:.3"])[0] == Source("code", "b", 0.4)
    assert parse_sources(["2:30.jsonl", "d:7", "x=y.jsonl"]) == [
        Source("2:30.jsonl", "2:30.jsonl"),
        Source("d:7", "d:7"),
        Source("x=y.jsonl", "x=y.jsonl"),
    ]
    held_out = parse_sources(["a.jsonl", "b/", "v1.2", "c.json.gz", "owner/name.v2"], "--eval-data", held_out=True)
    assert [source.name for source in held_out] == ["a", "b", "v1.2", "c", "name.v2"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["a.jsonl", "a.jsonl"], "two sources of one name (a.jsonl)"),
        (["a.jsonl", "./a.jsonl"], "two sources of one path (./a.jsonl); leave out one of them. A weight (PATH:0.7)"),
        (
            ["x=a.jsonl", "x=b"],
            "--data a.jsonl b: two sources of one name (x); name one of them otherwise: --data NAME=PATH",
        ),
        (["a.jsonl:0.3", "b"], "--data b: no weight, and a.jsonl has 0.3; give all sources a weight or none"),
        (["a.jsonl:0", "b:1"], "--data a.jsonl:0: the weight '0' is not a positive number"),
        (["a.jsonl:-1", "b:1"], "the weight '-1' is not a positive number"),
        (["a.jsonl:1e999", "b:1"], "the weight '1e999' is not a positive number"),
        (["a.jsonl:0,3", "b:1"], "the weight '0,3' is not a positive number"),
        ([""], "--data '': name a file"),
    ],
)
def test_bad_names_and_weights_are_refused(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.jsonl"), put(tmp_path, "b/c.jsonl")
    with pytest.raises(UserError) as error:
        parse_sources(given)
    assert message in str(error.value)


def test_held_out_sources_of_one_name_or_with_a_weight_are_refused(tmp_path):
    put(tmp_path, "x/a.jsonl"), put(tmp_path, "y/a.jsonl.gz", gzip.compress(b"x"))
    paths = [str(tmp_path / "x/a.jsonl"), str(tmp_path / "y/a.jsonl.gz")]
    with pytest.raises(
        UserError, match=r"two sources of one name \(a\); name one of them otherwise: --eval-data NAME=PATH"
    ):
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
    with pytest.raises(UserError, match="short.txt: nothing to predict: none of the 1 documents"):
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
    prints = [
        fingerprint(sequences, mixture)
        for mixture in (None, [(2, 0.5), (2, 0.5)], [(2, 0.25), (2, 0.75)], [(1, 0.5), (3, 0.5)])
    ]
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
    assert (
        message.startswith(
            "--data no-such-owner/no-such-name: no such file or directory, and no data set of this name "
            "could be fetched from the hub ("
        )
        and "\n" not in message
    )


# ----------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            dict(split="test", document_per="file", data=("a",)),
            "--split test is for data sets, and --document-per file for",
        ),
        (dict(eval_split="dev", data=("a",)), "--eval-split dev says how --eval-data is read"),
        (dict(include=("*.py",)), "--include says how --data is read"),
        (dict(skip_bad_records=True), "--skip-bad-records says"),
        (dict(template_date="2026-13-45"), "--template-date 2026-13-45: write a date"),
        (dict(template_date="20261127"), "--template-date 20261127: write a date"),
        (dict(ignore_fields=("id",)), "--ignore-fields says how --data is read"),
        (
            dict(show_samples=1, plan_only=True),
            "--show-samples 1 reads data, and --plan-only and --find-max-seq-len need none",
        ),
    ],
)
def test_flags_of_data_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        check_run(TrainConfig(**flags))


def test_files_are_found_in_the_order_of_their_paths(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt", "B.txt"):
        put(tmp_path, name)
    assert ["/".join(f.below) for f in find_files(str(tmp_path), Selection(), "--data").files] == [
        "B.txt",
        "a/z.txt",
        "a.txt",
        "b.txt",
    ]
    assert os.listdir(tmp_path)
