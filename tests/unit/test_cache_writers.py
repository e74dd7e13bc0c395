# pytest tests/unit/test_cache_writers.py
"""The cache of tokens with writers that were killed, full disks, damage, and places that cannot be used."""

import errno
import json
import os
import re
import resource

import pytest

from alst_jax import run_data
from alst_jax.config import TrainConfig, UserError
from alst_jax.data import cache as caching
from alst_jax.data.cache import Cache
from alst_jax.data.cache_files import Output
from alst_jax.data.documents import Cutting
from alst_jax.data.prepare import cut_sources
from alst_jax.data.report import SourceReport
from alst_jax.data.sources import Reading
from alst_jax.data.tokenizer import byte_tokenizer
from tests.unit.cached import TEXTS, plain, sources_of, stores, write


class Killed(BaseException):
    pass


STAGES = {
    "first file": (Output, "__enter__", 1),
    "first document": (Output, "write", 1),
    "lengths": (Output, "write", 3),
    "last document": (Output, "write", 12),
    "counts": (Output, "write", 13),
    "end of the counts": (Output, "__exit__", 4),
    "flush": (Output, "__exit__", 1),
    "rename": (Cache, "publish", 1),
}


def break_at(stage, error, monkeypatch):
    """The nth call of a method raises instead."""
    owner, name, number = STAGES[stage]
    method, calls = getattr(owner, name), []

    def broken(*arguments):
        calls.append(name)
        if len(calls) == number:
            raise error
        return method(*arguments)

    monkeypatch.setattr(owner, name, broken)
    return calls


@pytest.mark.parametrize("clean", [True, False], ids=["raised", "killed"])
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_read_of_a_writer_that_was_killed(stage, clean, tmp_path, monkeypatch):
    """killed: not even the half-written store is removed, until another writer comes, a minute later."""
    file, top = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    wanted = plain(sources_of(None, [file]))
    with monkeypatch.context() as patch:
        calls = break_at(stage, Killed(), patch)
        if not clean:
            patch.setattr(caching.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            sources_of(top, [file])
        assert len(calls) >= STAGES[stage][2]
    left = stores(top)
    assert all(name.startswith(".partial-") for name in left) and bool(left) != clean
    for lock in top.glob(".partial-*/lock"):
        os.utime(lock, (1, 1))
    assert plain(sources_of(top, [file])) == wanted
    assert len(stores(top)) == 1 and not stores(top)[0].startswith(".")


@pytest.mark.parametrize("documents, letters", [(50, 2000), (1, 400_000)], ids=["small", "large"])
def test_a_full_disk_is_one_clear_line(documents, letters, tmp_path):
    """A limit of this process on the size of a file, met when a buffer is flushed, or by one large document."""
    file, top = write(tmp_path / "a.jsonl", [{"text": "a" * letters}] * documents), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(UserError) as error:
            sources_of(top, [file])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value) == (
        f"--data-cache {top}: the tokens of --data {file} cannot be written there (File too large); they need five "
        "bytes each. Make room, name another directory, or use --data-cache off, which keeps them in memory"
    )
    assert not stores(top)


def test_a_living_writer_is_left_alone(tmp_path):
    file, top = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    with Cache(top).new_store(SourceReport("a")) as folder:
        os.utime(folder / "lock", (1, 1))
        sources_of(top, [file])
        assert folder.exists()
    assert not folder.exists()


@pytest.mark.parametrize(
    "damage",
    [
        "shorter",
        "no counts",
        "broken counts",
        "of another key",
        "a bit of tokens",
        "a bit of learned",
        "a bit of lengths",
        "another count",
    ],
)
def test_a_damaged_store_is_written_again(damage, tmp_path, capsys):
    file, top = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    wanted = plain(sources_of(top, [file]))
    (key,) = stores(top)
    counts = top / key / "store.json"
    if damage == "shorter":
        os.truncate(top / key / "tokens.bin", 8)
    elif damage == "no counts":
        counts.unlink()
    elif damage.startswith("a bit of"):
        content = bytearray((bits := top / key / f"{damage.split()[-1]}.bin").read_bytes())
        content[len(content) // 2] ^= 1
        bits.write_bytes(content)
    elif damage == "another count":
        counts.write_text(counts.read_text().replace('"records": ', '"records": 1'))
    else:
        counts.write_text("{" if damage == "broken counts" else counts.read_text().replace(key, "0" * 32))
    capsys.readouterr()
    assert plain(sources_of(top, [file])) == wanted
    if damage.startswith("a"):
        assert re.search(
            r"(tokens.bin|learned.bin|lengths.bin|store.json) is damaged: tokenised again", capsys.readouterr().out
        )
    assert stores(top) == [key] and json.loads(counts.read_text())["key"] == key


def test_a_cache_that_cannot_be_a_directory_is_refused(tmp_path):
    file, top = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    top.write_text("")
    with pytest.raises(UserError, match=f"--data-cache {top}: cannot be read"):
        sources_of(top, [file])


@pytest.mark.parametrize("trouble", ["read-only", "no locks", "no directory"])
def test_a_default_cache_that_cannot_be_used_is_done_without(trouble, tmp_path, monkeypatch, capsys):
    file, top = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    cutting, wanted = Cutting(byte_tokenizer(), 8, 261), plain(sources_of(None, [file]))

    def fail(*_, **__):
        raise OSError(errno.EROFS if trouble == "read-only" else errno.ENOLCK, "not here")

    if trouble == "no directory":
        top.write_text("")
    else:
        owner, name = (caching.pathlib.Path, "mkdir") if trouble == "read-only" else (caching.fcntl, "flock")
        monkeypatch.setattr(owner, name, fail)
    cache = Cache(top, small=0, chosen=False)
    assert plain(cut_sources([str(file)], Reading(), "--data", cutting, cache)) == wanted
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"cache   {file}: tokenised in memory. --data-cache {top}: ") and "Make room" not in line
    assert trouble == "no directory" or not stores(top)
    with pytest.raises(UserError, match=f"^--data-cache {top}: "):
        sources_of(top, [file])


def test_without_a_home_there_is_no_cache(monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(caching.pathlib.Path, "home", homeless)
    assert run_data.cache_of(TrainConfig()) is None and run_data.cache_of(TrainConfig()) is None
    assert capsys.readouterr().out.count("tokenised in memory") == 1


def test_a_store_that_is_gone_after_it_was_written_is_an_error(tmp_path, monkeypatch):
    file, publish = write(tmp_path / "a.jsonl", TEXTS), Cache.publish

    def cleared(cache, folder, key, report):
        publish(cache, folder, key, report)
        caching.shutil.rmtree(cache.directory / key)

    monkeypatch.setattr(Cache, "publish", cleared)
    with pytest.raises(UserError, match=f"the tokens of --data {file} were written to .* and are no longer there"):
        sources_of(tmp_path / "cache", [file])


def test_a_damaged_hash_is_computed_again(tmp_path):
    cache = Cache(tmp_path)
    file = cache.fingerprint_file(["a"])
    assert cache.remembered(file) is None
    cache.remember(file, "0123abcd")
    assert cache.remembered(file) == "0123abcd"
    for damaged in (file.read_text().replace("0123", "0133"), "", "0123abcd"):
        file.write_text(damaged)
        assert cache.remembered(file) is None


def test_a_hash_that_cannot_be_kept_ends_no_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "fingerprints").write_text("")
    cache = Cache(tmp_path)
    cache.remember(cache.fingerprint_file([1]), "hash")
    assert capsys.readouterr().out.startswith(
        f"cache   the hash of the sequences is not stored: {tmp_path}/fingerprints"
    )
    (tmp_path / "fingerprints").unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.os, "replace", full)
    cache.remember(cache.fingerprint_file([1]), "hash")
    assert "(No space left on device)" in capsys.readouterr().out
    assert list((tmp_path / "fingerprints").iterdir()) == []  # nor a half-written file


def test_bad_data_leave_no_store(tmp_path):
    file, top = write(tmp_path / "a.jsonl", [*TEXTS, "broken\n"]), tmp_path / "cache"
    with pytest.raises(UserError, match="a.jsonl:5: not valid JSON"):
        sources_of(top, [file])
    assert not stores(top)
    write(file, [{"text": " "}])
    with pytest.raises(UserError, match="no documents found; records left out: 1 empty"):
        sources_of(top, [file])
    assert not stores(top)
