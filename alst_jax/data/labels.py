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
import itertools
import json
from typing import Any, Literal

import numpy as np

from alst_jax.config import UserError
from alst_jax.data.own_texts import check_written
from alst_jax.data.records import Document
from alst_jax.data.spans import spans_of, turn_of
from alst_jax.data.templates import ChatTemplate, Rendered, Span


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which turns of a chat are learned, and the date that chat templates print.

    learn: `assistant` all turns of the assistant, `last` the last of them, `all` every token of every chat, except
    turns of weight 0. date: ISO date; None for today.
    """

    learn: Literal["assistant", "last", "all"] = "assistant"
    date: str | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A chat or completion as text. spans: the characters that are learned. special: the tokenizer adds its begin and
    end tokens."""

    text: str
    spans: list[Span]
    special: bool


def tokenize(document: Document, tokenizer: Any, labels: Labels = Labels()) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32[n] and bool[n]: whether each is learned. A text gets an end-of-text token.

    UserError if a chat cannot be rendered, or if not all of a learned message is found in the learned text.
    """
    if document.is_chat or document.prompt:
        return encode([prepare(document, tokenizer, labels)], tokenizer)[0]
    return tokenize_texts([document.content], tokenizer)[0]


def prepare(document: Document, tokenizer: Any, labels: Labels) -> Prepared:
    """A chat, or a prompt with its completion, ready for `encode`. UserError: see `tokenize`."""
    prepared = _prepare_chat(document, tokenizer, labels) if document.is_chat else _prepare_completion(document, labels)
    if not tokenizer.is_fast:
        raise UserError(
            f"{document.origin}: the model's tokenizer ({type(tokenizer).__name__}) reports no "
            "character positions of its tokens, so answers cannot be separated from prompts; use a model with a "
            "tokenizer.json"
        )
    return prepared


def encode(prepared: list[Prepared], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """`tokenize` for prepared documents. A fast tokenizer works on several of them at a time."""
    results: list[Any] = [None] * len(prepared)
    for special in (False, True):
        chosen = [i for i, one in enumerate(prepared) if one.special == special]
        if not chosen:
            continue
        out = tokenizer(
            [prepared[i].text for i in chosen],
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for i, row, characters in zip(chosen, out["input_ids"], out["offset_mapping"], strict=True):
            ids, offsets = np.asarray(row, np.int32), np.asarray(characters, np.int64).reshape(-1, 2)
            learned = _tokens_in(offsets, prepared[i].spans, len(prepared[i].text))
            results[i] = _with_ends(ids, learned, tokenizer) if special else (ids, learned)
    return results


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


def _prepare_completion(document: Document, labels: Labels) -> Prepared:
    """A prompt and its completion, tokenised together; the completion and the end token are learned."""
    given = 0 if labels.learn == "all" else document.prompt
    return Prepared(document.content, [(given, len(document.content))], special=True)


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


def _prepare_chat(document: Document, tokenizer: Any, labels: Labels) -> Prepared:
    template, rendered, messages = _render(document, tokenizer, labels)
    turns = _learned_turns(document, labels)
    try:
        if document.tools and _same_without_tools(template, rendered, messages):
            raise UserError(
                "the chat template does not write the tools, so the model would not see them; use a "
                "template with tools (--chat-template FILE)"
            )
        document = dataclasses.replace(document, content=messages)
        spans = spans_of(document, tokenizer, template, rendered, turns)
        check_written(rendered, messages)
        if labels.learn == "all":
            silent = [
                turn_of(rendered, i)
                for i, message in enumerate(messages)
                if message["role"] == "assistant" and document.learned and not document.learned[i]
            ]
            edges = [0, *itertools.chain(*silent), len(rendered.text)]
            spans = list(zip(edges[::2], edges[1::2]))
    except UserError as error:
        raise UserError(f"{document.origin}: {error}") from error
    return Prepared(rendered.text, spans, special=False)


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
        raise UserError(
            f"{document.origin}: nothing in the chat is to be learned: --learn {labels.learn}, and the "
            "last turn of the assistant has weight 0"
        )
    return turns


def chat_template(tokenizer: Any, tools: Any, labels: Labels) -> ChatTemplate:
    """The tokenizer's template for chats with or without tools: of several, `tool_use` or `default`."""
    source = tokenizer.get_chat_template(None, tools)
    date = datetime.datetime.fromisoformat(labels.date) if labels.date else datetime.datetime.now()
    return ChatTemplate(source, tokenizer.special_tokens_map, date)


def _render(document: Document, tokenizer: Any, labels: Labels) -> tuple[ChatTemplate, Rendered, list[dict[str, Any]]]:
    """The template, the rendered chat, and the messages in the form that the template took."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{document.origin}: a chat, but the model's tokenizer has no chat template; use a model with "
            "one (an Instruct model), name one with --chat-template FILE, or give text instead"
        )
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
            if (
                printed
                and printed not in (message.get("content") or "")
                and any(printed in rendered.text[start:end] for start, end in spans)
            ):
                return True
    return False


def _as_api_form(message: dict[str, Any]) -> dict[str, Any]:
    """Tool calls with null content and arguments as JSON text: some templates join these to text, or print them."""
    if "tool_calls" not in message:
        return message
    text = lambda arguments: json.dumps(arguments, ensure_ascii=False)
    calls = [
        call | {"function": call["function"] | {"arguments": text(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {"content": None} | message | {"tool_calls": calls}
