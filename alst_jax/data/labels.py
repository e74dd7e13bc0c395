"""Documents -> tokens, and which of them are learned.

A text is learned whole; of a prompt with a completion, the completion; of a chat, the assistant's messages.

A chat is rendered once, as text, and tokenised once with character offsets, so the time is linear. An assistant's turn
is learned from the end of the generation prompt (where a model starts to write) to the turn's end token. White space
behind the end token is not learned. In templates with `{% generation %}` marks, the marks decide.

A token is learned if it holds a learned character. So a token that joins the last space of the prompt to the first
word of the answer is learned.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import os
from typing import Any, Literal

import numpy as np

from alst_jax.config import UserError
from alst_jax.data.own_texts import check_learned, check_written, own_texts
from alst_jax.data.records import Document
from alst_jax.data.templates import ChatTemplate, Rendered, Span

PROBE = "alst-probe"  # the answer of a made-up chat, that shows how a template opens an assistant's turn


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which turns of a chat are learned, and the date that chat templates print.

    learn: `assistant` all turns of the assistant, `last` the last of them, `all` every token of every chat, except
    turns of weight 0. date: ISO date; None for today.
    """

    learn: Literal["assistant", "last", "all"] = "assistant"
    date: str | None = None


def tokenize(document: Document, tokenizer: Any, labels: Labels = Labels()) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32[n] and bool[n]: whether each is learned. A text gets an end-of-text token.

    UserError if a chat cannot be rendered, or if not all of a learned message is found in the learned text.
    """
    if document.is_chat:
        return _tokenize_chat(document, tokenizer, labels)
    if document.prompt:
        return _tokenize_completion(document, tokenizer, labels)
    return tokenize_texts([document.content], tokenizer)[0]


def tokenize_texts(texts: list[str], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """`tokenize` for texts without a prompt. A fast tokenizer works on several of them at a time."""
    rows = tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"]
    return [_with_ends(np.asarray(ids, np.int32), np.ones(len(ids), bool), tokenizer) for ids in rows]


def _with_ends(ids: np.ndarray, learned: np.ndarray, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """One begin token, also if the text begins with the tokenizer's own; so for the end token, which is learned."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2].tolist() == [bos, bos]:
        ids, learned = ids[1:], learned[1:]
    if eos is not None and ids[-2:].tolist() == [eos, eos]:
        ids, learned = ids[:-1], learned[:-1]
    if eos is not None and (not ids.size or ids[-1] != eos):
        ids, learned = np.append(ids, np.int32(eos)), np.append(learned, True)
    if eos is not None:
        learned[-1] = True
    return ids, learned


def _tokenize_completion(document: Document, tokenizer: Any, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """A prompt and its completion, tokenised together; the completion and the end token are learned."""
    ids, offsets = _encode(document.content, tokenizer, document.origin, special=True)
    given = 0 if labels.learn == "all" else document.prompt
    learned = _tokens_in(offsets, [(given, len(document.content))], len(document.content))
    return _with_ends(ids, learned, tokenizer)


def _encode(text: str, tokenizer: Any, origin: str, special: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32[n], and the characters of each: int[n, 2]. special: with the tokenizer's begin and end tokens."""
    if not tokenizer.is_fast:
        raise UserError(f"{origin}: the model's tokenizer ({type(tokenizer).__name__}) does not tell which characters "
                        "a token holds, so answers cannot be told from prompts; use a model with a tokenizer.json")
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False,
                    return_token_type_ids=False, verbose=False)
    return np.asarray(out["input_ids"], np.int32), np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2)


def _tokens_in(offsets: np.ndarray, spans: list[Span], length: int) -> np.ndarray:
    """Whether each token holds a character of the spans. A token without characters counts as the next character.

    Some tokenizers leave white space out of the offsets (trim_offsets). A token then begins where the last one ends.
    """
    inside = np.zeros(length + 1, bool)
    for start, end in spans:
        inside[start:end] = True
    before = np.concatenate([[0], np.cumsum(inside)])
    start, end = offsets[:, 0], offsets[:, 1].copy()
    start = np.minimum(start, np.append(0, np.maximum.accumulate(end)[:-1])[: start.size])
    end[-1:][end[-1:] > start[-1:]] = length
    return before[np.maximum(end, np.minimum(start + 1, length))] > before[start]


# --------------------------------------------------------------------------------------------------------------- chats


def _tokenize_chat(document: Document, tokenizer: Any, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    template, rendered, messages = _render(document, tokenizer, labels)
    turns = _learned_turns(document, labels)
    try:
        if document.tools and _same_without_tools(template, rendered, messages):
            raise UserError("the chat template does not write the tools, so the model would not see them; use a "
                            "template with tools (--chat-template FILE)")
        document = dataclasses.replace(document, content=messages)
        spans = _spans(document, tokenizer, template, rendered, turns)
        check_written(rendered, messages)
        if labels.learn == "all":
            silent = [_turn(rendered, i) for i, message in enumerate(messages)
                      if message["role"] == "assistant" and document.learned and not document.learned[i]]
            edges = [0, *itertools.chain(*silent), len(rendered.text)]
            spans = list(zip(edges[::2], edges[1::2]))
    except UserError as error:
        raise UserError(f"{document.origin}: {error}") from error
    ids, offsets = _encode(rendered.text, tokenizer, document.origin, special=False)
    return ids, _tokens_in(offsets, spans, len(rendered.text))


def _same_without_tools(template: ChatTemplate, rendered: Rendered, messages: list[dict[str, Any]]) -> bool:
    """Whether the template writes the same text without the tools: then it ignores them."""
    try:
        return template.render(messages).text == rendered.text
    except UserError:
        raise
    except Exception:  # templates raise what they like
        return False


def _learned_turns(document: Document, labels: Labels) -> list[int]:
    """The numbers of the messages that are learned."""
    may = document.learned or tuple(message["role"] == "assistant" for message in document.content)
    turns = [i for i, learned in enumerate(may) if learned and i >= document.prompt]
    if labels.learn == "last":
        last = max(i for i, message in enumerate(document.content) if message["role"] == "assistant")
        turns = [i for i in turns if i == last]
    if not turns:
        raise UserError(f"{document.origin}: nothing in the chat is to be learned: --learn {labels.learn}, and the "
                        "last turn of the assistant has weight 0")
    return turns


def chat_template(tokenizer: Any, tools: Any, labels: Labels) -> ChatTemplate:
    """The tokenizer's template for chats with or without tools: of several, `tool_use` or `default`."""
    source = tokenizer.get_chat_template(None, tools)
    date = datetime.datetime.fromisoformat(labels.date) if labels.date else datetime.datetime.now()
    return ChatTemplate(source, tokenizer.special_tokens_map, date)


def _render(
    document: Document, tokenizer: Any, labels: Labels
) -> tuple[ChatTemplate, Rendered, list[dict[str, Any]]]:
    """The template, the rendered chat, and the messages in the form that the template took."""
    if not tokenizer.chat_template:
        raise UserError(f"{document.origin}: a chat, but the model's tokenizer has no chat template; use a model with "
                        "one (an Instruct model), name one with --chat-template FILE, or give text instead")
    forms = [document.content]
    if any("tool_calls" in message for message in document.content):
        forms.append([_as_api_form(message) for message in document.content])
    first: Exception | None = None
    for messages in forms:
        try:
            template = chat_template(tokenizer, document.tools, labels)
            rendered = template.render(messages, document.tools)
            if not _prints_python(rendered, messages):
                return template, rendered, messages
            first = first or ValueError("it prints the arguments of tool calls as Python does, not as JSON")
        except UserError as error:
            raise UserError(f"{document.origin}: {error}") from error
        except Exception as error:  # templates raise what they like, e.g. for roles that do not alternate
            first = first or error
    raise UserError(f"{document.origin}: the model's chat template refuses this chat: {first}") from first


def _prints_python(rendered: Rendered, messages: list[dict[str, Any]]) -> bool:
    """Whether a template prints the Python form of an object of arguments, {'now': True}, which is no JSON."""
    for message, spans in zip(messages, rendered.turns):
        for call in message.get("tool_calls", []):
            arguments = call["function"]["arguments"]
            printed = str(arguments) if isinstance(arguments, dict) and arguments else None
            if printed and printed not in (message.get("content") or "") and any(
                    printed in rendered.text[start:end] for start, end in spans):
                return True
    return False


def _as_api_form(message: dict[str, Any]) -> dict[str, Any]:
    """Tool calls with null content and arguments as JSON text: some templates join these to text, or print them."""
    if "tool_calls" not in message:
        return message
    text = lambda arguments: json.dumps(arguments, ensure_ascii=False)
    calls = [call | {"function": call["function"] | {"arguments": text(call["function"]["arguments"])}}
             for call in message["tool_calls"]]
    return {"content": None} | message | {"tool_calls": calls}


# --------------------------------------------------------------------------------------------------------------- spans


def _spans(
    document: Document, tokenizer: Any, template: ChatTemplate, rendered: Rendered, turns: list[int]
) -> list[Span]:
    """The characters that are learned. UserError if they lack text of a learned message."""
    openings: dict[str, str] = {}  # role of the message before -> opening of the assistant's turn
    ends = _added_tokens(tokenizer)
    spans = []
    for i in turns:
        message, (start, end) = document.content[i], _turn(rendered, i)
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


def _turn(rendered: Rendered, number: int) -> Span:
    spans = rendered.turns[number]
    if len(spans) != 1:
        how = "in several places" if spans else "outside of a loop over the messages, or not at all"
        raise UserError(f"the chat template writes message {number} {how}, so that it cannot be told from the rest; "
                        "use a template that writes each message in a loop (--chat-template FILE)")
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
            start, end = _turn(answered, len(prompt))
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
