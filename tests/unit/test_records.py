# pytest tests/unit/test_records.py
"""Formats of records: what each becomes, and every key that is not understood is refused by name."""

import json

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from alst_jax.config import UserError
from alst_jax.data.records import HARMLESS, Fields, Reader, to_document
from alst_jax.data.sources import read_documents

USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def document(record, **fields):
    return to_document(record, "here:1", Fields(**fields))


@pytest.mark.parametrize(
    "record, kind, content",
    [
        ({"text": "a"}, "text", "a"),
        ({"text": "a", "messages": None, "id": 3}, "text", "a"),
        ({"messages": [USER, ANSWER]}, "messages", [USER, ANSWER]),
        (
            {"messages": [USER, ANSWER], "system": "Be brief."},
            "messages",
            [{"role": "system", "content": "Be brief."}, USER, ANSWER],
        ),
        ({"conversations": [USER, ANSWER]}, "messages", [USER, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5"}]},
            "ShareGPT",
            [USER, ANSWER],
        ),
        (
            {"messages": [{"from": "user", "value": "2+3?"}, {"from": "assistant", "value": "5", "weight": None}]},
            "ShareGPT",
            [USER, ANSWER],
        ),
        ({"prompt": "2+", "completion": "3"}, "prompt/completion", "2+3"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt/completion messages", [USER, ANSWER]),
        ({"instruction": "2+3?", "output": "5"}, "instruction", [USER, ANSWER]),
        ({"instruction": "2+3?", "input": "", "response": "5"}, "instruction", [USER, ANSWER]),
        (
            {"instruction": "Add.", "input": "2, 3", "output": "5", "system": "Be brief."},
            "instruction",
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add.\n\n2, 3"}, ANSWER],
        ),
        (
            {"instruction": "Add.", "context": "2, 3", "response": "5", "category": "sums"},
            "instruction",
            [{"role": "user", "content": "Add.\n\n2, 3"}, ANSWER],
        ),
    ],
)
def test_formats(record, kind, content):
    found = document(record)
    assert (found.format, found.content) == (kind, content)


def test_what_is_given_and_what_is_learned():
    assert document({"prompt": "2+", "completion": "3"}).prompt == 2  # characters
    early = [USER, ANSWER, USER]
    chat = document({"prompt": early, "completion": [ANSWER], "system": "Be brief."})
    assert (chat.prompt, chat.learned) == (4, (False, False, True, False, True))  # messages
    weighted = document({"messages": [USER, ANSWER | {"weight": 0}, USER | {"weight": 0}, ANSWER | {"weight": 1}]})
    assert weighted.learned == (False, False, False, True)
    assert weighted.content == [USER, ANSWER, USER, ANSWER]


def test_roles_of_sharegpt():
    call = json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})
    turns = [
        ("system", "s"),
        ("human", "h"),
        ("function_call", call),
        ("observation", "sun"),
        ("gpt", "g"),
        ("user", "u"),
        ("chatgpt", "c"),
        ("tool", "t"),
        ("model", "m"),
    ]
    found = document(
        {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": json.dumps([WEATHER])}
    )
    assert [m["role"] for m in found.content] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found.content[2] == {"role": "assistant", "tool_calls": [CALL]}
    assert found.tools == [WEATHER]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}, "index": 0},
        {"name": "weather", "arguments": '{"city": "Oslo"}'},
    ],
)
def test_tool_calls_have_one_form(call):
    for content in ({}, {"content": None}):
        found = document({"messages": [USER, {"role": "assistant", "tool_calls": [call], **content}]})
        assert found.content[1] == {"role": "assistant", "tool_calls": [CALL]}


@pytest.mark.parametrize("tools", [[WEATHER], [WEATHER["function"]], json.dumps([WEATHER]), [json.dumps(WEATHER)]])
def test_tools_have_one_form(tools):
    assert document({"messages": [USER, ANSWER], "tools": tools}).tools == [WEATHER]
    for nothing in ([], "", "[]", None):
        assert document({"messages": [USER, ANSWER], "tools": nothing}).tools is None


def test_text_parts_are_joined_and_reasoning_kept():
    parts = {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "3?"}]}
    for name in ("reasoning_content", "reasoning", "thinking"):
        found = document({"messages": [parts, ANSWER | {name: "Add."}]})
        assert found.content == [USER, ANSWER | {"reasoning_content": "Add."}]


def test_harmless_keys_are_ignored_and_named():
    assert document({"text": "a"} | dict.fromkeys(HARMLESS, 1)).ignored == tuple(HARMLESS)
    assert document({"text": "a", "id": None, "source": "x"}).ignored == ("source",)
    assert document({"prompt": "2+3?", "messages": [USER, ANSWER]}).ignored == ("prompt",)  # repeats the first question
    with pytest.raises(UserError, match="'prompt' beside 'messages' is not known"):
        document({"prompt": "other", "messages": [USER, ANSWER]})


def test_ignored_fields_are_as_if_missing():
    record = {"instruction": "2+3?", "output": "5", "text": "### 2+3? ### 5"}
    with pytest.raises(UserError, match="both 'text' and 'instruction' and 'output', which are keys of 2 formats"):
        document(record)
    assert document(record, ignore=("text",)).content == [USER, ANSWER]


def test_ignored_fields_of_messages():
    """Those that are not understood. A weight is."""
    noted = {"messages": [USER | {"annotations": 1}, ANSWER, USER, ANSWER | {"annotations": [], "weight": 0}]}
    with pytest.raises(UserError, match="message 0: 'annotations' is not known.* --ignore-fields annotations$"):
        document(noted)
    found = document(noted, ignore=("annotations", "weight"))
    assert found.content == [USER, ANSWER, USER, ANSWER] and found.learned == (False, True, False, False)


def chat(*messages):
    return {"messages": list(messages)}


@pytest.mark.parametrize(
    "record, message",
    [
        (
            {"text": "a", "label": 1},
            "'label' beside 'text' is not known, and might change what is learned.*--ignore-fields label",
        ),
        ({"text": "a", "messages": [USER, ANSWER]}, "both 'text' and 'messages'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "neither a 'text' .* prompt, chosen, rejected"),
        ({"messages": [USER, ANSWER], "conversations": [USER, ANSWER]}, "both 'messages' and 'conversations'"),
        (chat(USER, ANSWER | {"weight": 0.5}), "message 1: weight 0.5; a weight is 0"),
        (chat(USER, ANSWER | {"weight": True}), "message 1: weight True; a weight is 0"),
        (chat(USER, ANSWER | {"weight": "0"}), "message 1: weight '0'; a weight is 0"),
        (chat(USER | {"weight": 1}, ANSWER), "message 0: weight 1 of the role 'user'"),
        (chat(USER, ANSWER | {"weight": 0}), "every assistant message has weight 0"),
        (chat(USER, ANSWER | {"train": False}), "message 1: 'train' is not known"),
        (chat(USER, ANSWER | {"function_call": {"name": "f"}}), "message 1: 'function_call' is not known"),
        (chat(USER, {"role": "assistant", "content": None}), "message 1 lacks 'role' or 'content'"),
        (
            chat({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
            "message 0: a content part of the type 'image_url'",
        ),
        (chat(USER, {"role": "assistant", "content": {"a": 1}}), "message 1: 'content' is text or a list of parts"),
        (chat(USER | {"reasoning_content": "x"}, ANSWER), "message 0: 'reasoning_content' of the role 'user'"),
        (
            chat(USER, ANSWER | {"reasoning_content": "x", "thinking": "y"}),
            "message 1: 'reasoning_content' is one text",
        ),
        (chat(USER | {"tool_calls": [CALL]}, ANSWER), "message 0: 'tool_calls' of the role 'user'"),
        (
            chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
            "message 1: 'arguments' is text that is not JSON",
        ),
        (
            chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
            "message 1: the arguments of f are an object",
        ),
        (
            chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "mask": 1}}]}),
            "'mask' in a tool call",
        ),
        (chat(USER, ANSWER) | {"tools": "weather"}, "'tools' is text that is not JSON"),
        (chat(USER, ANSWER) | {"tools": [{"type": "function"}]}, "each of the 'tools' is a JSON schema"),
        (
            chat({"role": "system", "content": "a"}, USER, ANSWER) | {"system": "b"},
            "'system' beside a chat that has a system",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "x"}, {"from": "gpt", "value": "y"}]},
            "message 0: from 'narrator'",
        ),
        (
            {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "y"}]},
            "message 0: from 'human' .* int",
        ),
        ({"prompt": "a", "completion": [ANSWER]}, "'prompt' and 'completion' are two texts or two lists"),
        ({"prompt": "a", "completion": " "}, "an empty 'completion'"),
        ({"prompt": "a", "completion": "b", "tools": [WEATHER]}, "'tools' belongs to a chat"),
        ({"instruction": 3, "output": "b"}, "'instruction' holds int, not text"),
        ({"instruction": "a", "response": " \n"}, "an empty 'response'"),
        (chat(USER, ANSWER | {"content": " "}), "message 1 of the assistant is empty"),
        (chat(USER, ANSWER, USER, ANSWER | {"content": "", "name": "x"}), "message 3 of the assistant is empty"),
        ({"prompt": [USER], "completion": [ANSWER | {"content": ""}]}, "message 0 of the assistant is empty"),
        (chat(USER, ANSWER, USER, {"role": "model", "content": "b"}), "message 3: the role 'model', which means the"),
        (chat(USER, ANSWER, USER, ANSWER | {"role": "Assistant", "weight": 0}), "message 3: the role 'Assistant'"),
    ],
)
def test_what_is_not_understood_is_refused(record, message):
    with pytest.raises(UserError, match=f"^here:1: .*{message}|^here:1: {message}"):
        document(record)


def test_a_file_has_one_format(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(chat(USER, ANSWER)) + "\n")
    with pytest.raises(
        UserError,
        match="a.jsonl:2: a record of the format messages, in a file that began with text "
        rf"\({file}:1\)",
    ):
        read_documents([str(file)])
    reader = Reader(Fields())
    assert reader.read({"text": "a"}, "a:1").format == "text"
    reader.start_file()
    assert reader.read(chat(USER, ANSWER), "b:1").format == "messages"


def test_a_directory_has_files_of_several_formats(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    (tmp_path / "b.jsonl").write_text(json.dumps(chat(USER, ANSWER)))
    assert [d.format for d in read_documents([str(tmp_path)])] == ["text", "messages"]


def test_rows_have_no_keys_of_other_rows(tmp_path):
    """Columns of Parquet and Arrow files give each row the keys of all rows, with null."""
    calls = [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        for arguments in ({"city": "Oslo"}, {"unit": "C"})
    ]
    table = pyarrow.table({"messages": [[USER, call] for call in calls]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "a.arrow", compression="uncompressed")
    for name in ("a.parquet", "a.arrow"):
        calls = [d.content[1]["tool_calls"][0] for d in read_documents([str(tmp_path / name)])]
        assert [call["function"]["arguments"] for call in calls] == [{"city": "Oslo"}, {"unit": "C"}]
