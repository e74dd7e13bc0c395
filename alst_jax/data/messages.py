"""Lists of messages, as people have them -> the form that chat templates take. Other forms are refused.

A message has `role` and `content`, or ShareGPT's `from` and `value`. Further keys, each optional:

    weight             0 or 1: whether an assistant turn is learned
    tool_calls         an assistant's calls; `content` may then be null or missing
    reasoning_content  an assistant's thoughts (also named `reasoning` or `thinking`); the template places them
    name, tool_call_id given to the template

`content` is text, or a list of parts of the type text, which are joined.
"""

import dataclasses
import json
from typing import Any

from alst_jax.config import UserError

# ShareGPT's names of roles.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
}
REASONING = ("reasoning_content", "thinking", "reasoning")
UNDERSTOOD = frozenset({"role", "content", "weight", "tool_calls", "tool_call_id", "name", *REASONING})
PLAIN = {"role", "content"}
HARMLESS = frozenset({"id", "timestamp", "created_at", "lang", "language", "source", "model", "token_count"})


@dataclasses.dataclass(frozen=True)
class Chat:
    """Messages for a template; for each, whether it may be learned; and whether they were written as ShareGPT."""

    messages: list[dict[str, Any]]
    learned: tuple[bool, ...]
    sharegpt: bool


def chat_messages(value: Any, origin: str, field: str, prompt: bool = False, ignore: tuple[str, ...] = ()) -> Chat:
    """The chat of a record's field. UserError names the message that is wrong.

    prompt: the messages are a prompt, which needs no assistant turn. ignore: keys that need not be understood.
    """
    rule = f"{field!r} is a list of objects with 'role' and 'content' (--messages-field)"
    if not isinstance(value, list) or not value:
        raise UserError(f"{origin}: {rule}, and not empty")
    sharegpt = isinstance(value[0], dict) and {"from", "value"} <= value[0].keys()
    messages, learned = [], []
    for i, message in enumerate(value):
        place = f"{origin}: message {i}"
        if _is_plain(message):
            _check_role(message["role"], place)
            messages.append(message)
            learned.append(message["role"] == "assistant")
            continue
        if not isinstance(message, dict):
            raise UserError(f"{place} lacks 'role' or 'content'; {rule}")
        if sharegpt:
            message = _from_sharegpt(message, place)
        present = {name: item for name, item in message.items() if item is not None}
        if (
            not isinstance(present.get("role", ""), str)
            or "role" not in present
            or ("content" not in present and not present.get("tool_calls"))
        ):
            raise UserError(f"{place} lacks 'role' or 'content'; {rule}")
        _check_role(present["role"], place)
        messages.append(_message(present, place, ignore))
        learned.append(_learned(present, place))
    if not prompt and not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{origin}: the chat has no message of the role 'assistant', so nothing in it is to be learned")
    if not prompt and not any(learned):
        raise UserError(f"{origin}: every assistant message has weight 0, so nothing in the chat is to be learned")
    for i, message in enumerate(messages):
        if learned[i] and not prompt and _is_empty(message):
            raise UserError(
                f"{origin}: message {i} of the assistant is empty, so an empty answer would be learned; "
                "take it out of the data, or give it weight 0"
            )
    return Chat(messages, tuple(learned), sharegpt)


def _is_plain(message: Any) -> bool:
    """Whether a message is a role and a text, which nothing has to be checked of: most messages are."""
    return (
        isinstance(message, dict)
        and message.keys() == PLAIN
        and isinstance(message["role"], str)
        and isinstance(message["content"], str)
    )


def _check_role(role: str, place: str) -> None:
    """UserError for another name of the assistant, whose messages would not be learned."""
    if role != "assistant" and ROLES.get(role.lower()) == "assistant":
        raise UserError(
            f"{place}: the role {role!r}, which means the assistant and would not be learned; write "
            "'assistant', or ShareGPT's 'from' and 'value'"
        )


def _is_empty(message: dict[str, Any]) -> bool:
    """Whether a message has no text, thoughts or calls."""
    texts = (message.get("content"), message.get("reasoning_content"))
    return not message.get("tool_calls") and not any(text and text.strip() for text in texts)


def _message(message: dict[str, Any], place: str, ignore: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a message that a template takes. UserError for keys that are not understood."""
    role = message["role"]
    unknown = sorted(message.keys() - UNDERSTOOD - HARMLESS - set(ignore))
    if unknown:
        raise UserError(
            f"{place}: {', '.join(map(repr, unknown))} is not known, and might change what is learned; "
            f"a message has {', '.join(sorted(UNDERSTOOD))}. Ignore it with --ignore-fields "
            f"{' '.join(unknown)}"
        )
    plain = {"role": role}
    if "content" in message:
        plain["content"] = _content(message["content"], place)
    plain |= {name: message[name] for name in ("name", "tool_call_id") if name in message}
    thoughts = {message[name] for name in REASONING if isinstance(message.get(name), str) and message[name]}
    if any(not isinstance(message.get(name, ""), str) for name in REASONING) or len(thoughts) > 1:
        raise UserError(f"{place}: 'reasoning_content' is one text")
    if thoughts and role != "assistant":
        raise UserError(f"{place}: 'reasoning_content' of the role {role!r}; only the assistant's is learned")
    if thoughts:
        plain["reasoning_content"] = thoughts.pop()
    if message.get("tool_calls"):
        if role != "assistant":
            raise UserError(f"{place}: 'tool_calls' of the role {role!r}; only the assistant calls tools")
        plain["tool_calls"] = _tool_calls(message["tool_calls"], place)
    return plain


def _content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{place}: 'content' is text or a list of parts of the type text, not {type(content).__name__}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{place}: a content part of the type {kind!r}; only parts of the type 'text', with a text "
                "each, are supported"
            )
    return "".join(part["text"] for part in content)


def _learned(message: dict[str, Any], place: str) -> bool:
    """Whether a message may be learned: an assistant's, unless its weight is 0."""
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UserError(f"{place}: weight {weight!r}; a weight is 0 (not learned) or 1 (learned)")
    if message["role"] != "assistant" and message.get("weight") == 1:
        raise UserError(f"{place}: weight 1 of the role {message['role']!r}; only assistant messages are learned")
    return message["role"] == "assistant" and weight == 1


# --------------------------------------------------------------------------------------------------------------- tools


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls as {"type": "function", "function": {"name", "arguments"}}, the arguments an object."""
    if isinstance(calls, str):
        calls = _parsed(calls, place, "tool_calls")
    if not isinstance(calls, list):
        raise UserError(f"{place}: 'tool_calls' is a list, not {type(calls).__name__}")
    plain = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{place}: a tool call is an object with 'function': {{'name', 'arguments'}}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", place, "arguments")
        if not isinstance(arguments, dict):
            raise UserError(
                f"{place}: the arguments of {function['name']} are an object, or a JSON text of one, not "
                f"{type(arguments).__name__}"
            )
        extra = sorted(
            (function.keys() - {"name", "arguments", "id", "type"})
            | (call.keys() - {"function", "id", "type", "index", "name", "arguments"})
        )
        if extra:
            raise UserError(f"{place}: {', '.join(map(repr, extra))} in a tool call is not known")
        outer = {"id": call["id"]} if call.get("id") is not None else {}
        plain.append(outer | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return plain


def tool_schemas(tools: Any, origin: str) -> list[dict[str, Any]] | None:
    """The `tools` of a record: a list of JSON schemas, or a JSON text of one. None if it is empty."""
    if isinstance(tools, str):
        tools = _parsed(tools, origin, "tools") if tools.strip() else []
    if not isinstance(tools, list):
        raise UserError(
            f"{origin}: 'tools' is a list of JSON schemas, or a JSON text of one, not {type(tools).__name__}"
        )
    schemas = [_parsed(tool, origin, "tools") if isinstance(tool, str) else tool for tool in tools]
    for schema in schemas:
        function = schema.get("function", schema) if isinstance(schema, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{origin}: each of the 'tools' is a JSON schema of a function, with a 'name'")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in schemas] or None


def _parsed(text: str, place: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {what!r} is text that is not JSON: {error}") from error


# ------------------------------------------------------------------------------------------------------------ ShareGPT


def _from_sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    """{from, value} -> {role, content}."""
    role = message.get("from")
    if not isinstance(role, str) or role not in ROLES or not isinstance(message.get("value"), str):
        rule = f"'from' is one of {', '.join(ROLES)}; 'value' is text"
        raise UserError(f"{place}: from {role!r} with a value of {type(message.get('value')).__name__}; {rule}")
    rest = {name: item for name, item in message.items() if name not in ("from", "value")}
    if role == "function_call":
        calls = _parsed(message["value"], place, "function_call")
        return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}
    return {"role": ROLES[role], "content": message["value"], **rest}
