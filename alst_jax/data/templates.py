"""A chat template, rendered once, that says where each message's turn is in the text.

The template's program (its Jinja syntax tree) gets marks: one at the start of each pass of a loop over messages, one
behind the loop, and a pair around each `{% generation %}` block. A chat is rendered with and without the marks; the
texts must be the same apart from them. The time is linear in the length of the chat.
"""

import dataclasses
import datetime
import functools
import re
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes

from alst_jax.config import UserError

# Marks are numbers between two code points that Unicode keeps out of texts (noncharacters).
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARK = re.compile(f"{OPEN}(turn\\d+|end\\d+|start|stop):(\\d*){CLOSE}")
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """The text of a chat, and character spans in it.

    turns: for each message, the spans of its turn: one for most templates, none if no loop renders the message.
    generated: the spans of `{% generation %}` blocks. tail: where the text behind the last turn starts.
    """

    text: str
    turns: list[list[Span]]
    generated: list[Span]
    tail: int


class ChatTemplate:
    """The template of a tokenizer for chats with or without tools. plain, marked: its sandboxed programs, the latter
    with marks around each turn."""

    def __init__(self, source: str, special_tokens: dict[str, Any], date: datetime.datetime):
        self.has_marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self.plain, self.marked = _compile(source)
        self._variables = special_tokens | {"strftime_now": date.strftime}

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, prompt: bool = False
    ) -> Rendered:
        """Render a chat. prompt: with the opening of the assistant's next turn (add_generation_prompt).

        UserError if the marks change the text. A template raises any exception for chats that it refuses.
        """
        # Copies: each message is one object, which the marks are told apart by.
        messages = [_with_aliases(message) for message in messages]
        variables = self._variables | dict(messages=messages, tools=tools, documents=None, add_generation_prompt=prompt)
        text = self.plain.render(variables)
        marker = _Marker(messages)
        marked = self.marked.render(variables, alst_turn=marker.turn, alst_end=marker.end)
        if MARK.sub("", marked) != text:
            raise UserError(
                "the chat template changes text that it has rendered, so that turns cannot be told apart; "
                "use a template that writes each message in a loop (--chat-template FILE)"
            )
        return _read_marks(marked, len(messages))


def _with_aliases(message: dict[str, Any]) -> dict[str, Any]:
    """A copy of a message. Reasoning has two names, as transformers gives it to templates."""
    thoughts = {"thinking": message["reasoning_content"]} if "reasoning_content" in message else {}
    return thoughts | message


# --------------------------------------------------------------------------------------------------------------- marks


class _Marker:
    """The functions that the marked template calls."""

    def __init__(self, messages: list[dict[str, Any]]):
        self._number = {id(message): i for i, message in enumerate(messages)}
        self._open: set[int] = set()

    def turn(self, loop: int, item: Any) -> str:
        """The mark of the start of a turn, if a loop's item is a message."""
        number = self._number.get(id(item))
        if number is None:
            return ""
        self._open.add(loop)
        return f"{OPEN}turn{loop}:{number}{CLOSE}"

    def end(self, loop: int) -> str:
        """The mark of the end of a loop, if it was one over messages."""
        if loop not in self._open:
            return ""
        self._open.remove(loop)
        return f"{OPEN}end{loop}:{CLOSE}"


class GenerationMarks(jinja2.ext.Extension):
    """`{% generation %}` with a mark before and behind its text."""

    tags = {"generation"}
    priority = 1000  # parsed after transformers' extension of the same tag, which it replaces

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_text"), [], [], body)
        mark = lambda name: nodes.Output([nodes.TemplateData(f"{OPEN}{name}:{CLOSE}")])
        return [node.set_lineno(line) for node in (mark("start"), block, mark("stop"))]

    def _text(self, caller: Any) -> str:
        return caller()


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> tuple[jinja2.Template, jinja2.Template]:
    """The template as transformers compiles it, and with marks."""
    # The environment has transformers' own filters, functions and sandbox.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    plain = _compile_jinja_template(source)
    environment = plain.environment.overlay(extensions=[GenerationMarks, jinja2.ext.loopcontrols])
    tree = environment.parse(source)
    for number, loop in enumerate(tree.find_all(nodes.For)):
        if isinstance(loop.target, nodes.Name):
            loop.body.insert(0, _call("alst_turn", number, nodes.Name(loop.target.name, "load"), line=loop.lineno))
    _after_loops(tree, {id(loop): number for number, loop in enumerate(tree.find_all(nodes.For))})
    return plain, environment.from_string(tree)


def _call(function: str, number: int, *arguments: nodes.Expr, line: int) -> nodes.Output:
    call = nodes.Call(nodes.Name(function, "load"), [nodes.Const(number), *arguments], [], None, None)
    return nodes.Output([call]).set_lineno(line)


def _after_loops(node: nodes.Node, numbers: dict[int, int]) -> None:
    """Put the mark of its end behind each loop."""
    for name, value in node.iter_fields():
        if isinstance(value, list) and any(isinstance(item, nodes.For) for item in value):
            end = lambda loop: _call("alst_end", numbers[id(loop)], line=loop.lineno)
            setattr(
                node,
                name,
                [each for item in value for each in ((item, end(item)) if isinstance(item, nodes.For) else (item,))],
            )
    for child in node.iter_child_nodes():
        _after_loops(child, numbers)


def _read_marks(marked: str, messages: int) -> Rendered:
    """The text without its marks, and the spans between them."""
    parts, length, last = [], 0, 0
    turns: list[list[Span]] = [[] for _ in range(messages)]
    generated, starts, tail = [], [], 0
    loops: list[tuple[str, int]] = []  # the loops that are open, innermost last, each with the message of its pass
    for mark in MARK.finditer(marked):
        part = marked[last : mark.start()]
        if part and loops:
            _extend(turns[loops[-1][1]], length, length + len(part))
        parts.append(part)
        length, last = length + len(part), mark.end()
        kind, number = mark[1], mark[2]
        if kind == "start":
            starts.append(length)
        elif kind == "stop":
            generated.append((starts.pop(), length))
        elif kind.startswith("turn"):
            loop = kind.removeprefix("turn")
            if loops and loops[-1][0] == loop:
                loops.pop()
            loops.append((loop, int(number)))
        else:
            loops.pop()
            tail = length
    return Rendered("".join([*parts, marked[last:]]), turns, sorted(generated), tail)


def _extend(spans: list[Span], start: int, end: int) -> None:
    if spans and spans[-1][1] == start:
        spans[-1] = (spans[-1][0], end)
    else:
        spans.append((start, end))
