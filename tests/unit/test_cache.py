# pytest tests/unit/test_cache.py
"""The cache of tokenised data: the same as in memory, read at once, keyed by all that tokens depend on, never half."""

import errno
import json
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest

from alst_jax import run_data
from alst_jax.config import IGNORED, TrainConfig, UserError
from alst_jax.data import cache as caching
from alst_jax.data.cache import Cache, default_directory
from alst_jax.data.documents import Cutting, check_targets
from alst_jax.data.files import Selection
from alst_jax.data.labels import Labels
from alst_jax.data.pieces import Joined, Pieces, Tokenised, labels_in, spans_of
from alst_jax.data.prepare import cut_sources
from alst_jax.data.records import Fields
from alst_jax.data.report import SourceReport
from alst_jax.data.sources import Reading
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.models.config import TINY_LLAMA
from alst_jax.planning.job import Job
from alst_jax.profile import Profile
from alst_jax.storage.source import ModelSource

TEXTS = [{"text": "abcdefghij"}, {"text": "xy"}, {"text": "äöü"}, {"text": "0123456789" * 3}]
CHATS = [{"id": 7, "messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": f"{i} is it."}]}
         for i in range(5)]
PAIRS = [{"prompt": "2+3=", "completion": "5"}, {"prompt": "a" * 40, "completion": "b"}]
DATED = "{{ strftime_now('%Y') }}" + byte_tokenizer().chat_template


def write(file, records):
    file.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return file


def sources_of(top, paths, seq_len=8, tokenizer=None, drop=False, reading=Reading(), labels=Labels(), vocab=261):
    """The sources, with the cache in `top`; None: in memory."""
    cutting = Cutting(tokenizer or byte_tokenizer(), seq_len, vocab, labels, reading.skip_bad, drop)
    cache = None if top is None else Cache(top, small=0)
    return cut_sources([str(path) for path in paths], reading, "--data", cutting, cache)


def stores(top):
    return sorted(path.name for path in top.iterdir()) if top.exists() else []


def plain(sources):
    """Everything of sources that can be compared."""
    return {name: ([(p.tokens.tolist(), p.labels.tolist()) for p in pieces], vars(stats) | {"sources": None},
                   [vars(report) for report in stats.sources], list(stats.sources[0].lines()))
            for name, (pieces, stats) in sources.items()}


@pytest.fixture
def deaf(monkeypatch):
    """From now on nothing can be tokenised."""
    def stop():
        refuse = lambda *_, **__: pytest.fail("tokenised again")
        monkeypatch.setattr(type(byte_tokenizer()), "__call__", refuse)
    return stop


# --------------------------------------------------------------------------------------------------- the same, and once


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("records", [TEXTS, CHATS, PAIRS, TEXTS + ["broken\n"]], ids=["texts", "chats", "pairs", "bad"])
def test_the_cache_gives_what_memory_gives_and_tokenises_once(records, drop, tmp_path, deaf, capsys):
    file, top, reading = write(tmp_path / "a.jsonl", records), tmp_path / "cache", Reading(skip_bad=True)
    arguments = dict(drop=drop, reading=reading, seq_len=16)
    wanted = plain(sources_of(None, [file], **arguments))
    first = plain(sources_of(top, [file], **arguments))
    assert capsys.readouterr().out.startswith(f"cache   {file}: tokenised into {top}/")
    deaf()
    assert first == wanted == plain(sources_of(top, [file], **arguments))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"cache   {file}: ") and f" documents from {top}/" in line
    assert len(stores(top)) == 1


def test_long_documents_are_counted_as_cut_or_as_dropped(tmp_path):
    """Of 3 and 11 tokens, of which all but the first are learned."""
    file = write(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "0123456789"}])
    line = lambda drop: next(sources_of(None, [file], drop=drop)[str(file)][1].sources[0].lines())
    assert line(False).endswith(" 2 documents, 14 tokens, 12 learned, 1 document cut; nothing left out")
    assert line(True).endswith(" 2 documents, 14 tokens, 2 learned; pieces left out: 1 longer than 8 tokens")
    stats = sources_of(None, [file], seq_len=2, drop=True)[str(file)][1]
    with pytest.raises(UserError, match="; pieces left out: 2 longer than 2 tokens$"):
        check_targets(stats, "--data")


def test_another_length_reads_the_same_store(tmp_path, deaf):
    file, top = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    wanted = {n: plain(sources_of(None, [file], seq_len=n)) for n in (3, 8, 100)}
    sources_of(top, [file], seq_len=5)
    deaf()
    assert {n: plain(sources_of(top, [file], seq_len=n)) for n in wanted} == wanted


def test_pieces_by_hand():
    """Two documents, 5 and 2 tokens; of the first the tokens 12 and 14 are learned, of the second none."""
    source = Tokenised(np.arange(10, 17, dtype=np.int32), np.array([1, 0, 1, 0, 1, 1, 0], bool), np.array([5, 2]), [])
    spans = spans_of(source.lengths, 2, np.array([True, True]))
    assert spans.tolist() == [[0, 2, 4, 5], [2, 4, 5, 7], [5, 5, 5, 7]]
    assert labels_in(source, spans).tolist() == [1, 1, 0, 0]
    pieces = Pieces(source, spans)
    assert [p.labels.tolist() for p in pieces] == [[IGNORED, 12], [IGNORED, 14], [IGNORED], [IGNORED, IGNORED]]
    assert [p.tokens.tolist() for p in pieces] == [[10, 11], [12, 13], [14], [15, 16]]
    joined = Joined([pieces[:1], pieces[4:], pieces[1:4]])
    assert (len(joined), joined.lengths.tolist()) == (4, [2, 2, 1, 2])
    assert [p.tokens[0] for p in joined] == [10, 12, 14, 15]
    assert [p.tokens[0] for p in joined[1:3]] == [12, 14] and joined[-1].tokens[0] == 15
    with pytest.raises(IndexError):
        joined[4]


def test_learned_flags_are_counted_over_borders_of_parts(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 40)
    total = int(lengths.sum())
    source = Tokenised(np.arange(total, dtype=np.int32), rng.random(total) < 0.5, lengths, [])
    spans = spans_of(lengths, 3, np.ones(40, bool))
    monkeypatch.setattr("alst_jax.data.pieces.FLAGS_AT_ONCE", 7)
    by_hand = [int(np.count_nonzero(piece.labels != IGNORED)) for piece in Pieces(source, spans)]
    assert labels_in(source, spans).tolist() == by_hand


# ----------------------------------------------------------------------------------------------------------------- keys


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def with_token():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["is"])
    return tokenizer


@pytest.mark.parametrize("change", [
    dict(tokenizer=with_token()), dict(tokenizer=with_template(DATED)), dict(labels=Labels("last")),
    dict(reading=Reading(skip_bad=True)), dict(reading=Reading(Fields(ignore=("id",)))),
    dict(reading=Reading(selection=Selection(exclude=("x",)))),
    dict(reading=Reading(selection=Selection(document_per="file")))],
    ids=["tokenizer", "template", "learn", "skip", "ignore", "exclude", "document_per"])
def test_flags_and_tokenizers_have_stores_of_their_own(change, tmp_path):
    file, top = write(tmp_path / "a.jsonl", CHATS), tmp_path / "cache"
    plain_change = {"vocab": 300} | change
    wanted = plain(sources_of(None, [file], **plain_change))
    sources_of(top, [file])
    assert plain(sources_of(top, [file], **plain_change)) == wanted
    assert len(stores(top)) == 2


@pytest.mark.parametrize("change", ["content", "size", "time", "name"])
def test_changed_files_have_stores_of_their_own(change, tmp_path):
    """content: a copy of the same name, size and time."""
    file, top = write(tmp_path / "a.jsonl", [*TEXTS, {"text": "z" * 200_000}]), tmp_path / "cache"
    sources_of(top, [file])
    before = file.stat()
    old = file.read_text()
    file.write_text({"content": old.replace("xy", "yx"), "size": old + json.dumps({"text": "more"})}.get(change, old))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "time")))
    if change == "name":
        file = file.rename(tmp_path / "b.jsonl")
    assert plain(sources_of(top, [file])) == plain(sources_of(None, [file]))
    assert len(stores(top)) == 2


@pytest.mark.parametrize("records, template, count", [(CHATS, DATED, 2), (CHATS, None, 1), (TEXTS, DATED, 1)])
def test_the_date_matters_to_chats_whose_template_prints_it(records, template, count, tmp_path):
    file, top = write(tmp_path / "a.jsonl", records), tmp_path / "cache"
    for date in ("2025-01-01", "2026-01-01"):
        given = dict(labels=Labels(date=date), tokenizer=template and with_template(template))
        assert plain(sources_of(top, [file], **given)) == plain(sources_of(None, [file], **given))
    assert len(stores(top)) == count


def test_a_store_of_a_model_with_fewer_tokens_is_refused_as_its_text_is(tmp_path):
    """Without the end token, 260, a vocabulary of 258 lacks the bytes with the highest numbers."""
    file, top = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    sources_of(top, [file])
    highest = max(int(p.tokens.max()) for p in sources_of(top, [file])[str(file)][0])
    errors = []
    for where in (None, top):
        with pytest.raises(UserError) as error:
            sources_of(where, [file], vocab=highest)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{file}:1: token {highest} is outside the model's vocabulary of {highest}")


# ------------------------------------------------------------------------------------------------ killed, full, damaged


class Killed(BaseException):
    pass


STAGES = {"first file": (caching._Output, "__enter__", 1), "first document": (caching._Output, "write", 1),
          "lengths": (caching._Output, "write", 3), "last document": (caching._Output, "write", 12),
          "counts": (caching._Output, "write", 13), "end of the counts": (caching._Output, "__exit__", 4),
          "flush": (caching._Output, "__exit__", 1), "rename": (Cache, "_publish", 1)}


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
        "bytes each. Make room, name another directory, or use --data-cache off, which keeps them in memory")
    assert not stores(top)


def test_a_living_writer_is_left_alone(tmp_path):
    file, top = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    with Cache(top)._partial(SourceReport("a")) as folder:
        os.utime(folder / "lock", (1, 1))
        sources_of(top, [file])
        assert folder.exists()
    assert not folder.exists()


@pytest.mark.parametrize("damage", [
    "shorter", "no counts", "broken counts", "of another key", "a bit of tokens", "a bit of learned", "a bit of lengths",
    "another count"])
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
        assert re.search(r"(tokens.bin|learned.bin|lengths.bin|store.json) is damaged: tokenised again", capsys.readouterr().out)
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
    file, publish = write(tmp_path / "a.jsonl", TEXTS), Cache._publish

    def cleared(cache, folder, key, report):
        publish(cache, folder, key, report)
        caching.shutil.rmtree(cache.directory / key)

    monkeypatch.setattr(Cache, "_publish", cleared)
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


def test_a_hash_that_cannot_be_kept_ends_no_run(tmp_path, capsys):
    (tmp_path / "fingerprints").write_text("")
    cache = Cache(tmp_path)
    cache.remember(cache.fingerprint_file([1]), "hash")
    assert capsys.readouterr().out.startswith(f"cache   the hash of the sequences is not kept: {tmp_path}/fingerprints")


def test_bad_data_leave_no_store(tmp_path):
    file, top = write(tmp_path / "a.jsonl", [*TEXTS, "broken\n"]), tmp_path / "cache"
    with pytest.raises(UserError, match="a.jsonl:5: not valid JSON"):
        sources_of(top, [file])
    assert not stores(top)
    write(file, [{"text": " "}])
    with pytest.raises(UserError, match="no documents in there; records left out: 1 empty"):
        sources_of(top, [file])
    assert not stores(top)


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


@pytest.mark.parametrize("flags", [
    {}, {"pack": True}, {"pack": True, "pack_attention": "across"}, {"long_documents": "drop"}, {"weights": True},
    {"weights": True, "pack": True}], ids=str)
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


@pytest.mark.parametrize("flags, flag", [
    (dict(split="train"), "--split"), (dict(eval_split="test"), None), (dict(include=("*.py",)), None),
    (dict(document_per="file", eval_data=()), "--document-per"),
    (dict(exclude=("*",), eval_data=()), "--exclude")], ids=str)
def test_flags_of_directories_need_one(flags, flag, tmp_path):
    """--data names a file, and --eval-data a directory."""
    file = write(tmp_path / "a.jsonl", TEXTS)
    config = TrainConfig(**(dict(data=(str(file),), eval_data=(str(tmp_path),)) | flags))
    if flag is None:
        run_data.reading_of(config)
    else:
        with pytest.raises(UserError, match=f"^{flag} says what is read of a directory, and {file} is no directory"):
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
