# pytest tests/unit/test_cache.py
"""The cache of tokenised data: the same as in memory, read at once, keyed by all that tokens depend on, never half."""

import json
import os

import numpy as np
import pytest

from alst_jax.config import IGNORED, UserError
from alst_jax.data.documents import check_targets
from alst_jax.data.files import Selection
from alst_jax.data.labels import Labels
from alst_jax.data.pieces import Joined, Pieces, Tokenised, labels_in, spans_of
from alst_jax.data.records import Fields
from alst_jax.data.sources import Reading
from alst_jax.data.tokenizer import byte_tokenizer
from tests.unit.cached import CHATS, TEXTS, plain, sources_of, stores, write

PAIRS = [{"prompt": "2+3=", "completion": "5"}, {"prompt": "a" * 40, "completion": "b"}]
DATED = "{{ strftime_now('%Y') }}" + byte_tokenizer().chat_template


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


@pytest.mark.parametrize(
    "change",
    [
        dict(tokenizer=with_token()),
        dict(tokenizer=with_template(DATED)),
        dict(labels=Labels("last")),
        dict(reading=Reading(skip_bad=True)),
        dict(reading=Reading(Fields(ignore=("id",)))),
        dict(reading=Reading(selection=Selection(exclude=("x",)))),
        dict(reading=Reading(selection=Selection(document_per="file"))),
    ],
    ids=["tokenizer", "template", "learn", "skip", "ignore", "exclude", "document_per"],
)
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
