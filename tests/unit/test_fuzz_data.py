# pytest tests/unit/test_fuzz_data.py; all examples: pytest -m slow tests/unit/test_fuzz_data.py, a part: -k 'part3'
"""Made-up records, tables and chats are read and tokenised, or refused with a UserError. No other error, and no hang."""

import bz2
import contextlib
import gzip
import json
import lzma
import pathlib

import numpy as np
import pyarrow
import pytest
from hypothesis import strategies as st

from alst_jax.config import UserError
from alst_jax.data.files import Selection
from alst_jax.data.labels import Labels, tokenize
from alst_jax.data.messages import REASONING, ROLES, UNDERSTOOD
from alst_jax.data.named import Source
from alst_jax.data.records import HARMLESS, INPUTS, OUTPUTS, SHAREGPT, Fields
from alst_jax.data.sources import Reading, open_source
from alst_jax.data.tokenizer import byte_tokenizer
from tests.unit.test_fuzz import PARTS, run

TEMPLATES = sorted((pathlib.Path(__file__).parents[1] / "data" / "templates").rglob("*.jinja"))
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}

TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            " ",
            "Hi",
            "Hello, world",
            "[]",
            "{}",
            '{"a": 1}',
            '[{"name": "f"}]',
            "\ud800",
            "\udc00x",
            "\0",
            "\u2028",
            "\ufdd0turn0:0\ufdd1",
            "<|end_of_turn|>",
            "null",
        ]
    ),
)
NUMBERS = st.one_of(st.integers(-2, 2), st.floats(), st.sampled_from([10**40, 2**63, 1e308, -0.0, 10**500]))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
NAMES = st.one_of(TEXT, st.sampled_from(["name", "arguments", "function", "type", "text", "id", "role", "content"]))
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)
DEEP = st.integers(1, 300).map(lambda depth: _nested(depth))
ANY = st.one_of(JSON, JSON, JSON, DEEP)
PARTS_OF_TEXT = st.lists(st.one_of(st.builds(lambda text: {"type": "text", "text": text}, TEXT), JSON), max_size=3)
CALLS = st.lists(
    st.one_of(
        JSON,
        st.fixed_dictionaries(
            {
                "function": st.fixed_dictionaries(
                    {"name": TEXT, "arguments": st.one_of(JSON, st.dictionaries(TEXT, JSON, max_size=2))}
                )
            },
            optional={"id": LEAVES, "type": LEAVES},
        ),
    ),
    max_size=2,
)


def _nested(depth: int):
    value = "end"
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


@st.composite
def messages(draw):
    """A list of messages, most of them right. Some have further keys, or other values."""
    sharegpt = draw(st.integers(0, 3)) == 0
    role, content = ("from", "value") if sharegpt else ("role", "content")
    chat = []
    for i in range(draw(st.integers(1, 4))):
        names = ("human", "gpt") if sharegpt else ("user", "assistant")
        message = {role: names[i % 2], content: draw(TEXT)}
        more = {
            role: st.one_of(st.sampled_from([*ROLES, "", "Assistant"]), ANY),
            "weight": st.one_of(st.integers(0, 1), ANY),
            content: st.one_of(TEXT, PARTS_OF_TEXT, ANY),
            "tool_calls": st.one_of(CALLS, CALLS, ANY),
        }
        more |= {name: st.one_of(TEXT, ANY) for name in REASONING}
        for name in draw(st.lists(st.sampled_from([*more, *sorted(UNDERSTOOD), "mask", ""]), max_size=2)):
            message[name] = draw(more.get(name, ANY))
        if draw(st.integers(0, 9)) == 0:
            message.pop(draw(st.sampled_from([role, content])))
        chat.append(draw(ANY) if draw(st.integers(0, 19)) == 0 else message)
    return chat


@st.composite
def records(draw):
    """A record of one of the formats. Some fields are replaced, added or taken out."""
    tools = st.one_of(st.just([{"name": "f", "parameters": {}}]), CALLS, ANY)
    record = draw(
        st.one_of(
            st.fixed_dictionaries({"text": TEXT}),
            st.fixed_dictionaries({"messages": messages()}, optional={"tools": tools, "system": TEXT}),
            st.fixed_dictionaries(
                {draw(st.sampled_from(SHAREGPT)): messages()}, optional={"tools": tools, "system": TEXT}
            ),
            st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
            st.fixed_dictionaries({"prompt": messages(), "completion": messages()}, optional={"tools": tools}),
            st.fixed_dictionaries(
                {"instruction": TEXT, draw(st.sampled_from(OUTPUTS)): TEXT},
                optional={draw(st.sampled_from(INPUTS)): TEXT, "system": TEXT},
            ),
        )
    )
    known = [
        "text",
        "messages",
        "prompt",
        "tools",
        "system",
        *SHAREGPT,
        *OUTPUTS,
        *INPUTS,
        *sorted(HARMLESS)[:4],
        "extra",
        "",
    ]
    for name in draw(st.lists(st.sampled_from(known), max_size=1)):
        if draw(st.integers(0, 1)):
            record[name] = draw(st.one_of(st.none(), ANY))
    return draw(ANY) if draw(st.integers(0, 19)) == 0 else record


def _bytes(draw, text: str) -> bytes:
    """A text as bytes, of which some are changed."""
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1]))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@st.composite
def json_files(draw):
    """(suffix, bytes) of a file of JSON lines, or of one list."""
    lines, kind = (
        draw(st.lists(records(), min_size=1, max_size=3)),
        draw(st.sampled_from([".jsonl", ".jsonl", ".json"])),
    )
    escaped = draw(st.booleans())
    dump = lambda value: json.dumps(value, ensure_ascii=escaped)
    text = "\n".join(map(dump, lines)) if kind == ".jsonl" or draw(st.booleans()) else dump(lines)
    return kind, _bytes(draw, text)


@st.composite
def tables(draw):
    """(suffix, bytes) of a table, written as tables are or with any quotes."""
    cell = st.one_of(TEXT, st.text('",\t\n\r ab', max_size=6))
    header = draw(st.one_of(st.just(["text", "id"]), st.just(["prompt", "completion"]), st.lists(cell, max_size=3)))
    rows = [
        header,
        *draw(st.lists(st.one_of(st.lists(cell, min_size=2, max_size=2), st.lists(cell, max_size=3)), max_size=3)),
    ]
    kind, quoted = draw(st.sampled_from([".csv", ".tsv"])), draw(st.booleans())
    quote = (lambda text: '"' + text.replace('"', '""') + '"') if quoted else str
    return kind, _bytes(draw, "\n".join(({".csv": ",", ".tsv": "\t"}[kind]).join(map(quote, row)) for row in rows))


def read(file: pathlib.Path, skip_bad: bool, learn: str, tokenizer) -> int:
    """The number of documents of a file, each tokenised. A document that is refused is a UserError."""
    source = open_source(Source("d", str(file)), Reading(Fields(), Selection(), skip_bad))
    count = 0
    for document in source.documents:
        tokens, learned = tokenize(document, tokenizer, Labels(learn, "2026-11-27"))
        assert tokens.shape == learned.shape and tokens.dtype == np.int32 and learned.any()
        count += 1
    "".join(source.report.lines()).encode()  # every run prints them
    return count


def check_files(tmp_path, strategy, seed, examples):
    """Each file is read or refused: with its bad records refused, and with them left out."""
    tokenizer, whole = byte_tokenizer(), []
    own = tokenizer.chat_template
    templates = [own, *(file.read_text() for file in TEMPLATES)]

    def check(content, packed, damaged, skip_bad, learn, template):
        kind, data = content
        data = bytearray(PACK[packed](data))
        if packed and damaged and data:
            data[damaged % len(data)] ^= 1 + damaged % 255
        tokenizer.chat_template = templates[template % len(templates)] if template % 2 else own
        file = tmp_path / f"data{kind}{packed}"
        file.write_bytes(data)
        try:
            whole.append(read(file, skip_bad, learn, tokenizer))
        except UserError as error:
            assert str(error).strip()

    arguments = st.tuples(
        strategy,
        st.sampled_from(["", "", "", *PACK]),
        st.sampled_from([0, 0, 5, 40, 77]),
        st.booleans(),
        st.sampled_from(["assistant", "last", "all"]),
        st.integers(0, 2 * len(templates)),
    )
    run(arguments, lambda given: check(*given), seed, examples)
    assert sum(whole) > examples / 20  # not all are refused


@pytest.mark.parametrize("seed,examples", PARTS)
def test_records(tmp_path, seed, examples):
    check_files(tmp_path, json_files(), seed, examples)


@pytest.mark.parametrize("seed,examples", PARTS)
def test_tables(tmp_path, seed, examples):
    check_files(tmp_path, tables(), seed, examples)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"text":' * 100_000,
        '{"text": ' + "9" * 5000 + "}",
        "\ufeff",
        "\x00",
        '{"text": "a"}' * 2,
        "nan",
        '{"messages": [{"role": "assistant", "content": "a", "tool_calls": "' + "[" * 100_000 + '"}]}',
        '{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"name": "f", "a": '
        + '{"a":' * 900
        + "1"
        + "}" * 900
        + "}]}",
    ],
    ids=range(9),
)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_texts_that_are_no_data(tmp_path, text, kind):
    file = tmp_path / f"data{kind}"
    file.write_text(text, encoding="utf-8")
    for skip_bad in (False, True):
        with contextlib.suppress(UserError):
            read(file, skip_bad, "assistant", byte_tokenizer())
