# pytest tests/unit/test_sequences.py
"""Sequences of documents and of chats: tokens, labels, and what is refused."""

import re

import numpy as np
import pytest

from alst_jax.config import IGNORED, UserError
from alst_jax.data.documents import make_sequences
from alst_jax.data.embedded import python_reference
from alst_jax.data.labels import tokenize
from alst_jax.data.records import Document
from alst_jax.data.sources import read_documents
from alst_jax.data.tokenizer import CHAT_TEMPLATE, byte_tokenizer
from tests.unit.documents import CHAT


def text_documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Document("".join(rng.choice(list("abcdefgh"), n)), f"{i}") for i, n in enumerate(lengths)]


def sequences_of(documents, seq_len, **changes):
    return make_sequences(documents, byte_tokenizer(), seq_len, **dict(vocab_size=261) | changes)


def test_text_ends_with_one_end_token():
    tokenizer = byte_tokenizer()
    plain = tokenizer("ab")["input_ids"]
    for text in ("ab", "ab<|eos|>"):
        tokens, learned = tokenize(Document(text, "here"), tokenizer)
        assert tokens.tolist() == [*plain, tokenizer.eos_token_id] and tokens.dtype == np.int32
        assert learned.all() and learned.size == 3
    tokenizer.eos_token = None
    assert tokenize(Document("ab", "here"), tokenizer)[0].tolist() == plain


# 63, 64 and 65 with the end token: just below, at, and just above two sequences, whose last piece is a lone end token.
@pytest.mark.parametrize("length", [10, 31, 62, 63, 64, 200])
def test_every_token_but_the_first_is_predicted_once(length):
    (document,) = text_documents(length)
    tokens, _ = tokenize(document, byte_tokenizer())
    pieces, stats = sequences_of([document], min(32, 2 * length))
    given, labels = (np.concatenate([getattr(p, name) for p in pieces]) for name in ("tokens", "labels"))
    np.testing.assert_array_equal(labels[labels != IGNORED], tokens[1:])
    np.testing.assert_array_equal(given, tokens[: given.size])
    np.testing.assert_array_equal(labels[: tokens.size - 1], tokens[1:])  # and by the token right before it
    assert all(0 < p.tokens.size == p.labels.size <= 32 for p in pieces)
    assert (stats.labels, stats.tokens, stats.longest) == (length, given.size, length + 1)
    assert stats.dropped == (length == 64)


def test_documents_do_not_share_sequences():
    documents = text_documents(40, 5, 70)
    pieces, stats = sequences_of(documents, 32)
    assert [p.tokens.size for p in pieces] == [32, 9, 6, 32, 32, 7]
    assert [p.labels[-1] == IGNORED for p in pieces] == [False, True, True, False, False, True]
    assert (stats.documents, stats.sequences, stats.tokens, stats.labels) == (3, 6, 118, 115)
    text = "3 documents, 118 tokens (115 to predict; longest document 71) -> 6 sequences of 32, 38.5% padding"
    assert stats.summary(32) == text


def test_short_data_are_refused_with_a_length_that_works():
    documents = text_documents(499, 20)
    sequences_of(documents, 1000)  # half is enough
    with pytest.raises(
        UserError,
        match="^--data is too short: the longest of its 2 documents has 500 tokens, "
        "so more than half of every sequence of 1001 would be padding. Use --seq-len 512 or less",
    ):
        sequences_of(documents, 1001)
    with pytest.raises(UserError, match="^--eval-data is too short"):
        sequences_of(documents, 1001, flag="--eval-data")


@pytest.mark.parametrize("length", [5, 40, 63, 64, 129])
def test_the_advised_length_is_accepted(length):
    documents = text_documents(length)
    with pytest.raises(UserError, match="Use --seq-len") as refusal:
        sequences_of(documents, 4096)
    sequences_of(documents, int(re.search(r"--seq-len (\d+)", str(refusal.value))[1]))


def test_data_with_nothing_to_predict_are_refused():
    with pytest.raises(UserError, match="^--data: nothing to predict: none of the 2 documents"):
        sequences_of([Document("", "a"), Document("", "b")], 8)


def test_tokens_the_model_does_not_know_are_refused():
    assert sequences_of(text_documents(20), 16, vocab_size=258)[0]
    with pytest.raises(UserError, match="^7: token 257 is outside the model's vocabulary of 257: the tokenizer"):
        sequences_of([Document("a" * 20, "7")], 16, vocab_size=257)


def test_a_lone_surrogate_is_refused_by_name(tmp_path):
    """JSON may hold half a character, which no tokenizer takes."""
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "broken \\ud83d here"}')
    with pytest.raises(UserError, match="a.jsonl:2"):
        sequences_of(read_documents([str(tmp_path / "a.jsonl")]), 8)


def test_embedded_text_is_long_and_held_out_apart():
    train, held_out = python_reference(), python_reference(held_out=True)
    assert len(train) > 4 * len(held_out) > 0
    assert not {d.content for d in train} & {d.content for d in held_out}
    assert min(len(d.content.encode()) for d in train + held_out) >= 4096


# --------------------------------------------------------------------------------------------------------------- chats

UNMARKED = re.sub(r"{% (end)?generation %}", "", CHAT_TEMPLATE)
# Shows what was said before the last message by its first letter only, as templates do that drop earlier reasoning.
REWRITING = CHAT_TEMPLATE.replace("message['content']", "(message['content'] if loop.last else message['content'][0])")


def chat_tokenizer(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learned_text(template, chat=CHAT):
    tokenizer = chat_tokenizer(template)
    tokens, learned = tokenize(Document(chat, "here"), tokenizer)
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(chat, tokenize=False)
    runs = np.split(tokens, np.flatnonzero(np.diff(learned)) + 1)
    return [tokenizer.decode(run) for run in runs[1 - learned[0] :: 2]]


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, UNMARKED, CHAT_TEMPLATE.replace("{% ", "{%- ")],
    ids=["marked", "unmarked", "marked, trimmed"],
)
def test_only_what_the_assistant_says_is_learned(template):
    assert ("generation %}" in template) == (template != UNMARKED)
    assert learned_text(template) == ["Fünf 🕔<|end_of_turn|>", "Yes.<|end_of_turn|>"]
    assert learned_text(template, [{"role": "system", "content": "Be brief."}, *CHAT[:2]]) == ["Fünf 🕔<|end_of_turn|>"]


def test_both_ways_to_tell_what_the_assistant_says_agree():
    two_in_a_row = [*CHAT, {"role": "assistant", "content": "Really."}]
    open_end = CHAT + [{"role": "user", "content": "Thanks"}]
    for chat in (CHAT, CHAT[:2], two_in_a_row, open_end):
        marked, unmarked = (tokenize(Document(chat, "here"), chat_tokenizer(t)) for t in (CHAT_TEMPLATE, UNMARKED))
        np.testing.assert_array_equal(marked[0], unmarked[0])
        np.testing.assert_array_equal(marked[1], unmarked[1])


def test_a_chat_may_begin_with_the_assistant():
    for template in (CHAT_TEMPLATE, UNMARKED):
        assert learned_text(template, CHAT[1:]) == ["Fünf 🕔<|end_of_turn|>", "Yes.<|end_of_turn|>"]


def test_labels_of_a_chat_are_on_assistant_turns_only():
    tokenizer = byte_tokenizer()
    (sequence,), _ = make_sequences([Document(CHAT, "here")], tokenizer, 128, 261)
    tokens, learned = tokenize(Document(CHAT, "here"), tokenizer)
    expected = np.append(np.where(learned[1:], tokens[1:], IGNORED), IGNORED)  # each predicted by the token before it
    np.testing.assert_array_equal(sequence.labels, expected)
    assert tokenizer.decode(expected[expected != IGNORED]) == "Fünf 🕔<|end_of_turn|>Yes.<|end_of_turn|>"


def test_pieces_of_a_chat_without_assistant_are_left_out():
    chat = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]
    pieces, stats = sequences_of([Document(chat, "here")], 64)
    assert stats.dropped == 3 and [p.tokens.size for p in pieces] == [28]


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "^here: a chat, but the model's tokenizer has no chat template; use a model with one"),
        (
            REWRITING.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
            "^here: the chat template leaves text of message 1 out of what is learned. Lost: 'Fünf 🕔'",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            "^here: the model's chat template refuses this chat: roles must",
        ),
        ("{% if %}", "^here: the model's chat template refuses this chat: "),
    ],
)
def test_chats_that_cannot_be_told_apart_are_refused(template, message):
    with pytest.raises(UserError, match=message):
        sequences_of_chat(template)


def sequences_of_chat(template):
    return make_sequences([Document(CHAT, "here")], chat_tokenizer(template), 64, 261)


def test_a_rewriting_template_with_marks_is_refused_with_the_lost_text():
    with pytest.raises(UserError, match="leaves text of message 1 out of what is learned. Lost: 'Fünf 🕔'"):
        learned_text(REWRITING)
