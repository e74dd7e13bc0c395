# pytest tests/unit/test_cache_of_a_run.py
"""The cache of tokens in a whole run."""

import subprocess
import sys

import pytest

from alst_jax import run_data
from alst_jax.config import IGNORED, TrainConfig, UserError
from alst_jax.data.cache import Cache, default_directory
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.models.config import TINY_LLAMA
from alst_jax.planning.job import Job
from alst_jax.profile import Profile
from alst_jax.storage.source import ModelSource
from tests.unit.cached import CHATS, TEXTS, stores, write

# ----------------------------------------------------------------------------------------------------------- whole runs


def read_run(monkeypatch, small=None, **flags):
    """run_data.read_data: the first batches, the statistics and the fingerprint."""
    if small is not None:
        monkeypatch.setattr(run_data, "Cache", lambda directory, **more: Cache(directory, small=small, **more))
    config = TrainConfig(seq_len=16, **flags)
    source = ModelSource("tiny", TINY_LLAMA, byte_tokenizer(), None)
    data, stats, fingerprint = run_data.read_data(config, source, Job(TINY_LLAMA, Profile(), 2, 16))
    held_out = {name: [{k: v.tolist() for k, v in b.items()} for b in made()] for name, made in data.evaluation.items()}
    batches = [{k: v.tolist() for k, v in next(data.training).items()} for _ in range(9)]
    return batches, held_out, stats.summary(16), fingerprint


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"pack": True},
        {"pack": True, "pack_attention": "across"},
        {"long_documents": "drop"},
        {"weights": True},
        {"weights": True, "pack": True},
    ],
    ids=str,
)
def test_a_run_is_the_same_with_and_without(flags, tmp_path, monkeypatch, deaf):
    """Batches, their order, evaluation, counts and fingerprint; a third start does not read all tokens either."""
    texts, chats = write(tmp_path / "a.jsonl", TEXTS * 5), write(tmp_path / "b.jsonl", CHATS * 3)
    flags = dict(flags)
    data = (f"{texts}:0.25", f"{chats}:0.75") if flags.pop("weights", False) else (str(texts), str(chats))
    flags |= dict(data=data, eval_data=(str(texts),))
    wanted = read_run(monkeypatch, data_cache="off", **flags)
    top = tmp_path / "cache"
    assert read_run(monkeypatch, small=0, data_cache=str(top), **flags) == wanted
    assert len(stores(top)) == 3  # two stores and the fingerprints
    deaf()
    monkeypatch.setattr(run_data, "content_hash", lambda _: pytest.fail("all tokens were read"))
    assert read_run(monkeypatch, small=0, data_cache=str(top), **flags) == wanted


@pytest.mark.parametrize("attention, packs", [("documents", 1), ("across", 4)])
def test_held_out_documents_are_apart(attention, packs, tmp_path, monkeypatch):
    """Four of three tokens each: in one pack that tells their borders, or in a sequence each."""
    file = write(tmp_path / "a.jsonl", [{"text": text} for text in ("ab", "cd", "ef", "gh")])
    training = write(tmp_path / "b.jsonl", TEXTS * 5)
    flags = dict(data=(str(training),), eval_data=(str(file),), pack=True, pack_attention=attention)
    batches = [batch for made in read_run(monkeypatch, **flags)[1].values() for batch in made]
    rows = [row for batch in batches for row in batch["labels"] if any(label != IGNORED for label in row)]
    assert len(rows) == packs
    assert [batch["documents"][0][:5] for batch in batches if "documents" in batch] == [[0, 3, 6, 9, 12]] * (packs == 1)


@pytest.mark.parametrize(
    "flags, flag",
    [
        (dict(split="train"), "--split"),
        (dict(eval_split="test"), None),
        (dict(include=("*.py",)), None),
        (dict(document_per="file", eval_data=()), "--document-per"),
        (dict(exclude=("*",), eval_data=()), "--exclude"),
    ],
    ids=str,
)
def test_flags_of_directories_need_one(flags, flag, tmp_path):
    """--data names a file, and --eval-data a directory."""
    file = write(tmp_path / "a.jsonl", TEXTS)
    config = TrainConfig(**(dict(data=(str(file),), eval_data=(str(tmp_path),)) | flags))
    if flag is None:
        run_data.reading_of(config)
    else:
        with pytest.raises(UserError, match=f"^{flag} selects files of a directory, and {file} is no directory"):
            run_data.reading_of(config)


def test_small_data_leave_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "home/alst_jax/data"
    small = write(tmp_path / "a.jsonl", TEXTS * 9)
    read_run(monkeypatch, data=(str(small),))
    assert not (tmp_path / "home").exists()
    read_run(monkeypatch, small=small.stat().st_size, data=(str(small),))
    assert len(stores(default_directory())) == 2


# --------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import pathlib, resource, sys
import numpy as np
from alst_jax.data import report
from alst_jax.data.batches import content_hash
from alst_jax.data.cache import Cache
from alst_jax.data.documents import Cutting
from alst_jax.data.prepare import cut_sources
from alst_jax.data.sources import Reading
from alst_jax.data.tokenizer import byte_tokenizer
def tokenize_texts(texts, tokenizer):  # a byte a token: the real tokenizer would take minutes
    return [(np.frombuffer(text.encode(), np.uint8).astype(np.int32), np.ones(len(text), bool)) for text in texts]
report.tokenize_texts = tokenize_texts
for _ in range(2):
    cutting = Cutting(byte_tokenizer(), 4096, 261)
    cache = Cache(pathlib.Path(sys.argv[2]), small=0) if sys.argv[2] != "off" else None
    ((pieces, _),) = cut_sources([sys.argv[1]], Reading(), "--data", cutting, cache).values()
    content_hash(pieces)
    if cache is None:
        break
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_memory(file, cache):
    command = [sys.executable, "-c", MEASURE, str(file), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def test_resident_memory_does_not_grow_with_the_data(tmp_path):
    """MiB. 60 MB of text are 300 MB of tokens and flags; a negative control keeps them in memory."""
    files = [write(tmp_path / f"{size}.jsonl", [{"text": "abcdefgh" * 2500}] * (size * 50)) for size in (2, 60)]
    small, large = (peak_memory(file, tmp_path / "cache") for file in files)
    assert large - small < 100, (small, large)
    assert peak_memory(files[1], "off") - small > 150
