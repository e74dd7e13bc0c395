"""The texts of a message that a model must write itself, and checks that they are learned and others written."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

from alst_jax.config import UserError
from alst_jax.data.templates import Rendered

CHANGE = "learn the last turn only (--learn last), give the turn weight 0, or use another --chat-template FILE"
PYTHON = {"true": ("True",), "false": ("False",), "null": ("None",)}  # as some templates write single arguments


def own_texts(message: dict[str, Any]) -> Iterator[str]:
    """The texts of a message that a model must write itself."""
    if "reasoning_content" in message:
        yield message["reasoning_content"]
    yield from [message["content"]] if message.get("content") else []
    for call in message.get("tool_calls", []):
        yield call["function"]["name"]
        arguments = call["function"]["arguments"]
        yield from _leaves(json.loads(arguments) if isinstance(arguments, str) else arguments)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from itertools.chain(value, *map(_leaves, value.values()))
    elif isinstance(value, list):
        yield from itertools.chain(*map(_leaves, value))
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def check_learned(learned: str, message: dict[str, Any], number: int) -> None:
    """UserError that shows the text of a message that is not in the learned text.

    The content must follow the thoughts: the same text once does not stand for both.
    """
    at = 0
    for text in own_texts({name: message[name] for name in ("reasoning_content", "content") if name in message}):
        found = learned.find(text.strip(), at)
        if found < 0:
            _refuse_lost(text, learned if text.strip() not in learned else "", number)
        at = found + len(text.strip())
    for text in own_texts({"tool_calls": message.get("tool_calls", [])}):
        if not any(form in learned for form in (*_forms(text), *PYTHON.get(text, ()))):
            _refuse_lost(text, learned, number)


def _forms(text: str) -> tuple[str, str, str]:
    """How templates write a text: unchanged, or within JSON."""
    return text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def check_written(rendered: Rendered, messages: list[dict[str, Any]]) -> None:
    """UserError for a message of another role than the assistant whose text is not in the rendered chat.

    A text is searched in the message's own turn, then behind the one before, then everywhere. The first finds nearly
    all texts, so the time is linear.
    """
    at = 0
    for i, message in enumerate(messages):
        text = (message.get("content") or "").strip()
        if message["role"] == "assistant" or not text:
            continue
        places = [(start, end) for start, end in rendered.turns[i]] + [(at, None), (0, None)]
        found = (rendered.text.find(form, *place) for place in places for form in _forms(text))
        at = next((position for position in found if position >= 0), -1)
        if at < 0:
            shown = text if len(text) <= 300 else text[:300] + " ..."
            raise UserError(
                f"the chat template does not write message {i} of the role {message['role']!r}, so the "
                f"model would not see it. Lost: {shown!r}. Take it out of the data, or use a template that "
                "writes it (--chat-template FILE)"
            )


def _refuse_lost(text: str, learned: str, number: int) -> None:
    lines = [line for line in text.split("\n") if line.strip() and line.strip() not in learned]
    lost = "\n".join(lines) or text.strip()
    shown = lost if len(lost) <= 300 else lost[:300] + " ..."
    raise UserError(
        f"the chat template leaves text of message {number} out of what is learned. Lost: {shown!r}. Instead, {CHANGE}"
    )
