"""The characters of a rendered chat that are learned (see labels.py)."""

import functools
import os
from typing import Any

from alst_jax.config import UserError
from alst_jax.data.own_texts import check_learned, own_texts
from alst_jax.data.records import Document
from alst_jax.data.templates import ChatTemplate, Rendered, Span

PROBE = "alst-probe"  # the answer of a made-up chat, that shows how a template opens an assistant's turn


def spans_of(
    document: Document, tokenizer: Any, template: ChatTemplate, rendered: Rendered, turns: list[int]
) -> list[Span]:
    """The characters that are learned. UserError if they lack text of a learned message."""
    openings: dict[str, str] = {}  # role of the message before -> opening of the assistant's turn
    ends = _added_tokens(tokenizer)
    spans = []
    for i in turns:
        message, (start, end) = document.content[i], turn_of(rendered, i)
        if template.has_marks:
            found = [(a, b) for a, b in rendered.generated if start <= a and b <= end]
        else:
            before = document.content[i - 1]["role"] if i else ""
            if before not in openings:  # few roles: the time stays linear
                openings[before] = _opening(document, template, i)
            turn = rendered.text[start:end]
            stop = start + _end(turn, ends)
            # Some templates write the end token of a turn in front of the next one.
            if not turn.rstrip().endswith(ends) and rendered.text.startswith(tokenizer.eos_token or "", stop):
                stop += len(tokenizer.eos_token or "")
            found = [(start + _start(turn, message, openings[before]), stop)]
        check_learned("".join(rendered.text[a:b] for a, b in found), message, i)
        spans += found
    return spans


@functools.lru_cache(maxsize=4)
def _added_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts of the added tokens, among which are a chat's end tokens. Cached: some tokenizers have thousands."""
    return tuple(tokenizer.get_added_vocab())


def turn_of(rendered: Rendered, number: int) -> Span:
    spans = rendered.turns[number]
    if len(spans) != 1:
        how = "in several places" if spans else "outside of a loop over the messages, or not at all"
        raise UserError(
            f"the chat template writes message {number} {how}, so that it cannot be told from the rest; "
            "use a template that writes each message in a loop (--chat-template FILE)"
        )
    return spans[0]


def _opening(document: Document, template: ChatTemplate, number: int) -> str:
    """The text between a prompt and the assistant's answer: the text that add_generation_prompt adds.

    Templates without a generation prompt: the text that they write before an answer, unless it is white space.
    """
    prompt = document.content[:number] or [{"role": "user", "content": "?"}]
    try:
        plain, prompted = (template.render(prompt, document.tools, prompt=p) for p in (False, True))
        if prompted.text.startswith(plain.text):
            opening = prompted.text[len(plain.text) :]
        else:  # the chat's end has separate text
            opening = prompted.text[prompted.tail :]
        if not opening:
            answered = template.render([*prompt, {"role": "assistant", "content": PROBE}], document.tools)
            start, end = turn_of(answered, len(prompt))
            opening = answered.text[start:end].partition(PROBE)[0]
    except UserError:
        raise
    except Exception as error:  # templates raise what they like
        raise UserError(f"the model's chat template refuses the messages before message {number}: {error}") from error
    return opening if opening.strip() else ""


def _start(turn: str, message: dict[str, Any], opening: str) -> int:
    """Where the learned part of a turn starts: behind the opening, but not behind the start of the message's own text.

    A generation prompt may be longer than the turn's opening (`<think>` behind the assistant's header).
    """
    own = next(own_texts(message), "").strip()
    written = turn.find(own) if own else -1
    if opening and opening in turn[: max(written, len(opening))]:
        start = turn.index(opening) + len(opening)
    else:
        start = len(os.path.commonprefix([turn, opening]))
    if 0 <= written < start and own not in turn[start:]:
        return turn.rfind(own, 0, start + len(own) - 1)
    return start


def _end(turn: str, ends: tuple[str, ...]) -> int:
    """Where the learned part of a turn ends: behind an end token that ends it but for white space, else at its end."""
    stripped = turn.rstrip()
    return len(stripped) if stripped.endswith(ends) else len(turn)
