# python -m pytest tests/cli/test_records.py
"""train.py with chats: samples are shown, sources counted, a template of one's own exported, its date kept."""

import json
import sys
import types

import pytest
from transformers import AutoTokenizer

import train
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.hardware import environment

CHAT = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
DATED = "Today is {{ strftime_now('%d %b %Y') }}. " + byte_tokenizer().chat_template


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit code, standard output, standard error) of train.main() with these arguments."""
    monkeypatch.setattr(environment, "prepare", lambda *_, **__: None)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        return train.main(), *capsys.readouterr()

    return main


def user_first(folder):
    """A file with a template that refuses chats that the user does not begin."""
    file = folder / "user-first.jinja"
    file.write_text(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        + byte_tokenizer().chat_template
    )
    return file


def write(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_samples_are_shown_with_their_learned_tokens(run, tmp_path):
    chats = write(tmp_path / "chats.jsonl", {"messages": CHAT, "id": 1}, {"messages": CHAT * 2, "id": 2})
    texts = write(tmp_path / "texts.jsonl", {"text": "one"}, {"text": "two"})
    code, out, err = run("--data", chats, texts, "--show-samples", 3)
    assert code == 0 and not err
    assert (
        out
        == f"""\
--- {chats}:1: 24 tokens, 2 learned
<|turn|>user
2+3?<|end_of_turn|><|turn|>assistant
[[5<|end_of_turn|>]]
--- {texts}:1: 4 tokens, 3 learned
o[[ne<|eos|>]]
--- {chats}:2: 48 tokens, 4 learned
<|turn|>user
2+3?<|end_of_turn|><|turn|>assistant
[[5<|end_of_turn|>]]<|turn|>user
2+3?<|end_of_turn|><|turn|>assistant
[[5<|end_of_turn|>]]
source  {chats}: 1 file, messages, 2 records, 2 documents, 72 tokens, 6 learned; nothing left out
source  {chats}: ignored keys id
source  {texts}: 1 file, text, 2 records, 2 documents, 8 tokens, 6 learned; nothing left out
"""
    )
    bad = write(tmp_path / "bad.jsonl", {"messages": CHAT[1:] * 2}, {"messages": CHAT}, {"messages": CHAT[:1]})
    _, out, _ = run(
        "--data", bad, chats, "--show-samples", 1, "--skip-bad-records", "--chat-template", user_first(tmp_path)
    )
    assert f"--- {bad}:2: 24 tokens" in out and "1 document, 24 tokens, 2 learned; records left out: 2 bad" in out
    assert "[[5<|end_of_turn|>]]<|turn|>user" not in run("--data", chats, "--show-samples", 2, "--learn", "last")[1]
    assert run("--show-samples", 1, "--data", tmp_path / "nowhere")[0] == 2
    assert run("--show-samples", 0)[0] == 2


def test_a_run_keeps_its_template_and_its_date(run, tmp_path, monkeypatch):
    template = tmp_path / "own.jinja"
    template.write_text(DATED)
    data = write(tmp_path / "chats.jsonl", *({"messages": CHAT * n} for n in range(1, 9)))
    flags = (
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--dp",
        1,
        "--sp",
        1,
        "--seq-len",
        128,
        "--chat-template",
        template,
    )
    on = lambda day: monkeypatch.setattr(train, "time", types.SimpleNamespace(strftime=lambda _: day))
    on("2026-11-27")
    code, out, err = run(*flags, "--steps", 1)
    assert (code, err) == (0, "")
    assert f"source  {data}: 1 file, messages, 8 records, 8 documents" in out
    on("2026-11-28")
    code, _, err = run("--resume", "--out", tmp_path / "run", "--steps", 2)
    assert code == 0, err
    _, _, err = run("--resume", "--out", tmp_path / "run", "--steps", 3, "--template-date", "2026-11-28")
    assert "--resume: changed since the checkpoint: --data" in err
    template.write_text("other")
    _, _, err = run("--resume", "--out", tmp_path / "run", "--steps", 3)
    assert "own.jinja: not the template that the run began with" in err
    template.unlink()
    assert run("--resume", "--out", tmp_path / "run", "--steps", 3)[0] == 0
    for folder in ("model", "hf"):
        assert AutoTokenizer.from_pretrained(tmp_path / "run" / folder).chat_template == DATED


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--chat-template", "nowhere.jinja"),
            "--chat-template nowhere.jinja: name a file with a chat template in Jinja",
        ),
        (("--template-date", "yesterday"), "--template-date yesterday: write a date as 2026-11-27"),
        (("--show-samples", "-1"), "--show-samples -1: must be at least 1"),
    ],
)
def test_bad_flags_are_refused(run, flags, message):
    code, _, err = run(*flags)
    assert code == 2 and message in err


def test_a_tokenizer_without_an_end_token_is_warned_of(tmp_path, capsys):
    from alst_jax.data.documents import make_sequences
    from alst_jax.data.records import Document
    from alst_jax.data.report import warn_without_end

    tokenizer = byte_tokenizer()
    for end in (tokenizer.eos_token, None):
        tokenizer.eos_token = end
        for document in (Document("ab", "here"), Document(CHAT, "here", format="messages")):
            _, stats = make_sequences([document], tokenizer, 4, 261)
            warn_without_end(tokenizer, stats.sources)
            warned = "names no end token" in capsys.readouterr().err
            assert warned == (end is None and not document.is_chat)
