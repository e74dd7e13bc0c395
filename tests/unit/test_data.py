# pytest tests/unit/test_data.py
"""Files to documents, documents to sequences, sequences to batches; everything wrong with a file is named."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from alst_jax.config import IGNORED, UserError
from alst_jax.data.batches import TrainingBatches, evaluation_batches, fingerprint, pad_sequence
from alst_jax.data.documents import Sequence, make_sequences
from alst_jax.data.embedded import python_reference
from alst_jax.data.labels import tokenize
from alst_jax.data.records import Document
from alst_jax.data.sources import read_documents
from alst_jax.data.tokenizer import CHAT_TEMPLATE, byte_tokenizer, load_tokenizer

CHAT = [{"role": "user", "content": "Wie spät?"}, {"role": "assistant", "content": "Fünf 🕔"},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
PAD = 258

# ------------------------------------------------------------------------------------------------------------- sources


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
    with pytest.raises(UserError, match="a.jsonl:1: 'text' beside 'body' is not understood.*--ignore-fields text"):
        contents(*files, **names)


def record(value):
    return json.dumps(value).encode()


def messages(*turns):
    return record({"messages": list(turns)})


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b"", "{file}: the file is empty"),
    ("a.parquet", b"", "{file}: the file is empty"),
    ("a.txt", b" \n\t\n", "--data {file}: no documents in there"),
    ("a.jsonl", b"\n\n", "--data {file}: no documents in there"),
    ("a.jsonl", b'{"text": "fine"}\n\n{"text": \n', "{file}:3: not valid JSON: Expecting value.*each line of a .jsonl"),
    ("a.jsonl", b'{"body": "x", "id": 1}', r"{file}:1: neither a 'text' nor a 'messages' field \(it has: body, id\); "
     "name the right one with --text-field or --messages-field"),
    ("a.jsonl", b"{}", r"{file}:1: neither .* \(it has: none\)"),
    ("a.jsonl", b'{"text": null, "messages": null}', r"{file}:1: neither .* \(it has: none\)"),
    ("a.jsonl", b'{"text": "a"}\n["text"]', "{file}:2: a record is a JSON object with 'text' or 'messages', not list"),
    ("a.jsonl", b'"text"', "{file}:1: a record is a JSON object with 'text' or 'messages', not str"),
    ("a.jsonl", b'{"text": 3}', r"{file}:1: 'text' holds int, not text \(--text-field\)"),
    ("a.jsonl", b'{"text": "a\xff"}', r"{file}:1: not UTF-8 text \(byte 11\); data are .jsonl, .json, .csv, .*UTF-8"),
    ("a.bin", b"abc\xfe", r"{file}: not UTF-8 text \(byte 3\)"),
    ("a.json", b'{"text":\n"a"}\n{"text": "b"}', "{file}: not valid JSON: Extra data.*a .json file is a list of objects, "
     "one object, or one object a line"),
    ("a.json", b'[{"text": "a"}, 5]', r"{file}\[1\]: a record is a JSON object with 'text' or 'messages', not int"),
    ("a.parquet", b"PAR1 and then nothing", "{file}: not a readable Parquet file: "),
    ("a.jsonl", messages(), "{file}:1: 'messages' is a list of objects with 'role' and 'content'.*and not empty"),
    ("a.jsonl", b'{"messages": "hello"}', r"{file}:1: 'messages' is a list.*\(--messages-field\), and not empty"),
    ("a.jsonl", messages(CHAT[1], {"role": "user"}), "{file}:1: message 1 lacks 'role' or 'content'"),
    ("a.jsonl", messages(CHAT[1], "hello"), "{file}:1: message 1 lacks 'role' or 'content'"),
    ("a.jsonl", messages({"role": "assistant", "content": [{"type": "image"}]}),
     "{file}:1: message 0: a content part of the type 'image'; only parts of the type 'text'"),
    ("a.jsonl", messages(CHAT[0]), "{file}:1: the chat has no message of the role 'assistant'"),
])
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match="^" + message.replace("{file}", re.escape(str(file)))):
        read_documents([str(file)])


def test_wrong_parquet_columns_are_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet\[0\]: neither a 'text' nor a 'messages' field \(it has: body, id\)"):
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
    with pytest.raises(UserError, match="loads the tokenizer as CodeLlamaTokenizer, which makes .* tokens of a text of "
                       "which tokenizer.json makes .* others; install a newer transformers, or set \"tokenizer_class\""):
        load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------------- documents


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
    with pytest.raises(UserError, match="^--data is shorter than asked for: the longest of 2 documents has 500 tokens, "
                       "so that more than half of every sequence of 1001 would be padding. Use --seq-len 512 or less"):
        sequences_of(documents, 1001)
    with pytest.raises(UserError, match="^--eval-data is shorter"):
        sequences_of(documents, 1001, flag="--eval-data")


@pytest.mark.parametrize("length", [5, 40, 63, 64, 129])
def test_the_advised_length_is_accepted(length):
    documents = text_documents(length)
    with pytest.raises(UserError, match="Use --seq-len") as refusal:
        sequences_of(documents, 4096)
    sequences_of(documents, int(re.search(r"--seq-len (\d+)", str(refusal.value))[1]))


def test_data_with_nothing_to_predict_are_refused():
    with pytest.raises(UserError, match="^--data: 2 documents and nothing in them to predict"):
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


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED, CHAT_TEMPLATE.replace("{% ", "{%- ")],
                         ids=["marked", "unmarked", "marked, trimmed"])
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


@pytest.mark.parametrize("template, message", [
    (None, "^here: a chat, but the model's tokenizer has no chat template; use a model with one"),
    (REWRITING.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
     "^here: the chat template leaves text of message 1 out of what is learned. Lost: 'Fünf 🕔'"),
    ("{{ raise_exception('roles must alternate') }}", "^here: the model's chat template refuses this chat: roles must"),
    ("{% if %}", "^here: the model's chat template refuses this chat: "),
])
def test_chats_that_cannot_be_told_apart_are_refused(template, message):
    with pytest.raises(UserError, match=message):
        sequences_of_chat(template)


def sequences_of_chat(template):
    return make_sequences([Document(CHAT, "here")], chat_tokenizer(template), 64, 261)


def test_a_rewriting_template_with_marks_is_refused_with_the_lost_text():
    with pytest.raises(UserError, match="leaves text of message 1 out of what is learned. Lost: 'Fünf 🕔'"):
        learned_text(REWRITING)


# ------------------------------------------------------------------------------------------------------------- batches


def numbered(n, length=4):
    """Sequences that tell which one they are: the first token is the number."""
    return [Sequence(np.full(length, i, np.int32), np.full(length, i, np.int32)) for i in range(n)]


def training(n=10, rows=2, grad_accum=1, seed=0):
    return TrainingBatches(numbered(n), 6, rows, grad_accum, seed, pad_token=PAD)


def order(batches, count):
    """The numbers of the sequences in the next `count` batches."""
    return [int(number) for _ in range(count) for number in next(batches)["tokens"][..., 0].reshape(-1)]


def test_order_is_a_function_of_the_seed():
    assert order(training(seed=3), 15) == order(training(seed=3), 15)
    assert order(training(seed=3), 5) != order(training(seed=4), 5)
    assert order(training(seed=3), 5) != sorted(order(training(seed=3), 5))
    assert order(training(rows=2, grad_accum=5), 3) == order(training(rows=10), 3) == order(training(rows=1), 30)


@pytest.mark.parametrize("rows, grad_accum", [(2, 1), (3, 1), (2, 2), (3, 5)])
def test_each_epoch_holds_every_sequence_once_in_another_order(rows, grad_accum):
    """Also where a batch holds the end of one epoch and the start of the next, or more than a whole one."""
    seen = order(training(rows=rows, grad_accum=grad_accum), -(-40 // (rows * grad_accum)))
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("done", [0, 1, 3, 4, 7, 20])
def test_resuming_goes_on_exactly_where_it_stopped(done):
    straight = training(n=7, rows=2)  # batches cross epochs
    order(straight, done)
    state = json.loads(json.dumps(straight.get_state()))
    rest = order(straight, 12)
    fresh, advanced = training(n=7, rows=2), training(n=7, rows=2)
    order(advanced, 5)
    for resumed in (fresh, advanced, straight):
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert order(resumed, 12) == rest
    assert order(training(n=7, rows=2), done + 12)[2 * done :] == rest


def test_batches_are_shaped_and_padded():
    batch = next(training(rows=2, grad_accum=3))
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == dict.fromkeys(
        ("tokens", "labels", "positions"), ((3, 2, 6), "int32"))
    np.testing.assert_array_equal(batch["positions"], np.broadcast_to(np.arange(6), (3, 2, 6)))
    np.testing.assert_array_equal(batch["tokens"][..., 4:], PAD)
    np.testing.assert_array_equal(batch["labels"][..., 4:], IGNORED)
    np.testing.assert_array_equal(batch["labels"][..., :4], batch["tokens"][..., :4])


def test_a_full_sequence_needs_no_padding():
    tokens, labels = np.arange(6, dtype=np.int32), np.arange(1, 7, dtype=np.int32)
    padded = pad_sequence(Sequence(tokens, labels), 6, PAD)
    np.testing.assert_array_equal(padded["tokens"], tokens)
    np.testing.assert_array_equal(padded["labels"], labels)


@pytest.mark.parametrize("n, rows", [(1, 4), (4, 4), (10, 4), (3, 1)])
def test_evaluation_covers_every_sequence_once(n, rows):
    batches = list(evaluation_batches(numbered(n), 6, rows, PAD))
    assert len(batches) == -(-n // rows)
    assert all(array.shape == (rows, 6) and array.dtype == np.int32 for batch in batches for array in batch.values())
    tokens, labels, positions = (np.concatenate([b[key] for b in batches]) for key in ("tokens", "labels", "positions"))
    assert tokens[:n, 0].tolist() == list(range(n))
    targets = [set(row[row != IGNORED].tolist()) for row in labels]
    assert targets == [{i} for i in range(n)] + [set()] * (len(labels) - n)
    assert (tokens[n:] == PAD).all() and (positions == np.arange(6)).all()


def test_the_fingerprint_tells_other_data():
    sequence = lambda tokens, labels: Sequence(np.array(tokens, np.int32), np.array(labels, np.int32))
    base = [sequence([1, 2, 3, 4], [2, 3, 4, IGNORED])]
    variants = {
        "tokens": [sequence([1, 2, 9, 4], [2, 3, 4, IGNORED])],
        "labels": [sequence([1, 2, 3, 4], [2, 3, IGNORED, IGNORED])],
        "cut": [sequence([1, 2], [2, 3]), sequence([3, 4], [4, IGNORED])],
        "cut elsewhere": [sequence([1], [2]), sequence([2, 3, 4], [3, 4, IGNORED])],
        "order": [sequence([3, 4], [4, IGNORED]), sequence([1, 2], [2, 3])],
        "more": base * 2,
    }
    assert fingerprint(base) == fingerprint([sequence([1, 2, 3, 4], [2, 3, 4, IGNORED])])
    assert len({fingerprint(base), *map(fingerprint, variants.values())}) == 1 + len(variants)
    assert fingerprint([sequence([1, 2], [3, 4])]) != fingerprint([sequence([1], [2]), sequence([3], [4])])
