"""Records -> documents. A record's format is recognised from its keys; every key is understood, harmless, or refused.

format                | keys                                                    | learned
text                  | text                                                    | all of it
messages              | messages [tools, system]: role and content              | assistant turns
ShareGPT              | conversations [tools, system]: from and value           | assistant turns
prompt/completion     | prompt, completion: two texts                           | the completion
prompt/completion     | prompt, completion [tools, system]: two message lists   | assistant turns of the completion
instruction           | instruction, output or response [input or context, system] | the output

Keys in brackets are optional. `text` and `messages` are the names of --text-field and --messages-field. A key whose
value is null counts as missing. An instruction is a chat of one question: the instruction, an empty line, the input.
"""

import dataclasses
import functools
from typing import Any

from alst_jax.config import UserError
from alst_jax.data.messages import chat_messages, tool_schemas

# Keys of a record that say where it is from. They are ignored, and named once for each source.
HARMLESS = frozenset(
    """
    _id added author blob_id category chat_id commit conv_id conversation_id created created_at dataset date domain
    dump file file_name file_path filename hash id idx index lang language language_score license licenses meta
    metadata model name num_turns original_id path prompt_id repo repo_name repository row_id sha1 sha256 size
    source split subset tags task timestamp title token_count topic url uuid version warc_record_id""".split()
)
SHAREGPT = ("conversations", "conversation")
DEEPEST = 100  # levels of lists and objects
OUTPUTS, INPUTS = ("output", "response"), ("input", "context")


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of the fields of a text and of a chat, and fields to leave out (--ignore-fields)."""

    text: str = "text"
    messages: str = "messages"
    ignore: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document: a text, or a chat as a list of messages in the form that chat templates take.

    origin: its place, as file:line. prompt: the number of first characters of a text, or of first messages of a chat,
    that are given and not learned. learned: for each message, whether it may be learned; empty for all assistant turns.
    ignored: the harmless keys of the record.
    """

    content: str | list[dict[str, Any]]
    origin: str
    format: str = "text"
    prompt: int = 0
    learned: tuple[bool, ...] = ()
    tools: list[dict[str, Any]] | None = None
    ignored: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.content, str)


class Reader:
    """Converts the records of one source. A file has one format: UserError names the first record of another."""

    def __init__(self, fields: Fields):
        self._fields = fields
        self._first: Document | None = None

    def start_file(self) -> None:
        """The next record is the first of a file."""
        self._first = None

    def read(self, record: Any, origin: str) -> Document:
        """The document of a record."""
        document = to_document(record, origin, self._fields)
        first = self._first = self._first or document
        if document.format != first.format:
            raise UserError(
                f"{origin}: a record of the format {document.format}, in a file that began with "
                f"{first.format} ({first.origin}); a file has one format, so make two files of it"
            )
        return document


def to_document(record: Any, origin: str, fields: Fields) -> Document:
    """The document of one record. UserError names the record's file and line, and the key that is wrong or unknown."""
    if not isinstance(record, dict):
        raise UserError(
            f"{origin}: a record is a JSON object with {fields.text!r} or {fields.messages!r}, not "
            f"{type(record).__name__}"
        )
    present = {name: value for name, value in record.items() if value is not None and name not in fields.ignore}
    keys = _recognise(tuple(present), fields)
    if len(keys.formats) > 1:
        given = " and ".join(map(repr, keys.used))
        raise UserError(
            f"{origin}: both {given}, which are keys of {len(keys.formats)} formats; leave out those of "
            "one (--ignore-fields NAME...), or name another field with --text-field or --messages-field"
        )
    if not keys.formats:
        filled = [n for n, value in record.items() if value is not None or n not in (fields.text, fields.messages)]
        raise UserError(no_format(origin, filled, fields))
    document = _CONVERT[keys.formats[0]](_Record(present, origin, fields, keys))
    _check_texts(document.content, origin)
    _check_texts(document.tools, origin)
    if not keys.unknown:
        return document
    # The first question of a chat is often repeated as `prompt`.
    unknown = [n for n in keys.unknown if n != "prompt" or not _repeats(present[n], document)]
    if unknown:
        raise UserError(
            f"{origin}: {', '.join(map(repr, unknown))} beside {', '.join(map(repr, keys.used))} is not "
            "known, and might change what is learned. Remove it from the data, or ignore it "
            f"with --ignore-fields {' '.join(unknown)}"
        )
    return dataclasses.replace(document, ignored=keys.harmless + keys.unknown)


def _check_texts(content: Any, origin: str, levels: int = DEEPEST) -> None:
    """UserError for half a surrogate pair, which JSON may hold and no tokenizer takes, in a text, chat or schema; and
    for lists and objects nested deeper than DEEPEST levels, at which programs that follow them would end."""
    if isinstance(content, dict | list):
        if not levels:
            raise UserError(
                f"{origin}: lists and objects are nested deeper than {DEEPEST} levels; write them flatter, "
                "or leave the record out"
            )
        for part in (*content, *content.values()) if isinstance(content, dict) else content:
            _check_texts(part, origin, levels - 1)
    elif isinstance(content, str) and not content.isascii():
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{origin}: not Unicode text (character {error.start} is half of a surrogate pair)"
            ) from error


def no_format(origin: str, names: Any, fields: Fields) -> str:
    """The error message for keys that fit no format."""
    has = ", ".join(names) or "none"
    return (
        f"{origin}: neither a {fields.text!r} nor a {fields.messages!r} field (it has: {has}); name the right one "
        "with --text-field or --messages-field, or use the keys of another format: conversations; prompt and "
        "completion; instruction and output"
    )


# --------------------------------------------------------------------------------------------------------- recognition


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of a record: the formats they fit, and which are used, harmless and unknown."""

    formats: tuple[str, ...]
    used: tuple[str, ...]
    harmless: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclasses.dataclass(slots=True)
class _Record:
    """A record whose format is known."""

    values: dict[str, Any]
    origin: str
    fields: Fields
    keys: _Keys

    def document(self, content: str | list[dict[str, Any]], kind: str, **more: Any) -> Document:
        """The document of this record."""
        return Document(content, self.origin, kind, ignored=self.keys.harmless, **more)

    def first(self, names: tuple[str, ...]) -> tuple[str, Any] | None:
        """The first of these keys that the record has, and its value."""
        return next(((name, self.values[name]) for name in names if name in self.values), None)

    def text(self, name: str) -> str:
        """The text of a key. UserError for anything but text."""
        if not isinstance(self.values[name], str):
            hint = " (--text-field)" if name == self.fields.text else ""
            raise UserError(f"{self.origin}: {name!r} holds {type(self.values[name]).__name__}, not text{hint}")
        return self.values[name]


@functools.lru_cache(maxsize=1024)
def _recognise(names: tuple[str, ...], fields: Fields) -> _Keys:
    """The formats that keys fit. Cached, because the records of a file repeat their keys."""
    required = {
        "text": [fields.text],
        "messages": [n for n in (fields.messages, *SHAREGPT) if n in names] or ["\0"],
        "prompt/completion": ["prompt", "completion"],
        "instruction": ["instruction", next((n for n in OUTPUTS if n in names), "\0")],
    }
    formats = tuple(name for name, keys in required.items() if set(keys) <= set(names))
    used = [key for name in formats for key in required[name]]
    if len(formats) == 1:
        extra = {
            "text": (),
            "messages": ("tools", "system"),
            "prompt/completion": ("tools", "system"),
            "instruction": ("system", *[n for n in INPUTS if n in names][:1]),
        }[formats[0]]
        used += [key for key in extra if key in names]
    rest = [name for name in names if name not in used]
    harmless = tuple(name for name in rest if name in HARMLESS)
    return _Keys(formats, tuple(used), harmless, tuple(name for name in rest if name not in HARMLESS))


def _repeats(prompt: Any, document: Document) -> bool:
    return document.format != "text" and any(m.get("content") == prompt for m in document.content)


# ---------------------------------------------------------------------------------------------------------- conversion


def without_nulls(value: Any) -> Any:
    """A value without the keys whose value is null: columnar files give each row the keys of all other rows."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _text(record: _Record) -> Document:
    return record.document(record.text(record.fields.text), "text")


def _messages(record: _Record) -> Document:
    fields = [key for key in record.keys.used if key not in ("tools", "system")]
    if len(fields) > 1:
        raise UserError(
            f"{record.origin}: both {' and '.join(map(repr, fields))}; leave out one of them (--ignore-fields NAME...)"
        )
    chat = chat_messages(record.values[fields[0]], record.origin, fields[0], ignore=record.fields.ignore)
    return _chat(record, chat.messages, chat.learned, "ShareGPT" if chat.sharegpt else "messages")


def _prompt_completion(record: _Record) -> Document:
    values = [record.values[name] for name in ("prompt", "completion")]
    if all(isinstance(value, str) for value in values):
        extra = [name for name in ("tools", "system") if name in record.keys.used]
        if extra:
            raise UserError(
                f"{record.origin}: {extra[0]!r} belongs to a chat, and prompt and completion are texts; "
                "write them as lists of messages"
            )
        if not values[1].strip():
            raise UserError(f"{record.origin}: an empty 'completion', so nothing in the record is to be learned")
        return record.document("".join(values), "prompt/completion", prompt=len(values[0]))
    if not all(isinstance(value, list) for value in values):
        raise UserError(
            f"{record.origin}: 'prompt' and 'completion' are two texts or two lists of messages, not "
            f"{' and '.join(type(value).__name__ for value in values)}"
        )
    prompt, completion = (
        chat_messages(value, record.origin, name, name == "prompt", record.fields.ignore)
        for value, name in zip(values, ("prompt", "completion"))
    )
    document = _chat(
        record, prompt.messages + completion.messages, prompt.learned + completion.learned, "prompt/completion messages"
    )
    return dataclasses.replace(document, prompt=len(document.content) - len(completion.messages))


def _instruction(record: _Record) -> Document:
    question, (output, _) = record.text("instruction"), record.first(OUTPUTS)
    if not record.text(output).strip():
        raise UserError(f"{record.origin}: an empty {output!r}, so nothing in the record is to be learned")
    given = record.first(INPUTS)
    if given is not None and record.text(given[0]).strip():
        question += "\n\n" + record.text(given[0])
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": record.text(output)}]
    return _chat(record, chat, (False, True), "instruction")


def _chat(record: _Record, messages: list[dict[str, Any]], learned: tuple[bool, ...], kind: str) -> Document:
    """A chat with the record's `system` and `tools`."""
    if "system" in record.keys.used and record.text("system"):
        if messages[0]["role"] == "system":
            raise UserError(f"{record.origin}: 'system' beside a chat that has a system message; leave out one of them")
        messages = [{"role": "system", "content": record.text("system")}, *messages]
        learned = (False, *learned)
    tools = tool_schemas(record.values["tools"], record.origin) if "tools" in record.keys.used else None
    return record.document(messages, kind, learned=learned, tools=tools)


_CONVERT = {"text": _text, "messages": _messages, "prompt/completion": _prompt_completion, "instruction": _instruction}
