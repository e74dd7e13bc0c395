# pytest tests/unit/test_labels.py
"""What is learned of a chat: masks token by token for ten families of templates, and everything that is refused."""

import json
import pathlib
import re
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alst_jax.config import UserError
from alst_jax.data.labels import Labels, chat_template, tokenize
from alst_jax.data.records import Fields, to_document

TEMPLATES = pathlib.Path(__file__).parents[1] / "data/templates"
TOKENS = json.loads((TEMPLATES / "tokens.json").read_text())
CHATS = json.loads((TEMPLATES / "chats.json").read_text())
DATE = Labels(date="2024-07-26")


def byte_tokenizer(bos=None, eos=None, added=()):
    """One token a byte, and these special tokens."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos,
                                   additional_special_tokens=list(added))


def family_tokenizer(family):
    tokenizer = byte_tokenizer(**TOKENS[family])
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    return tokenizer


def expectations():
    """(family, case, expected text) of the hand-written files; learned text is in double brackets."""
    for family in TOKENS:
        sections = re.split(r"^=== (.*)\n", (TEMPLATES / f"{family}.txt").read_text(), flags=re.M)[1:]
        for case, text in zip(sections[::2], sections[1::2]):
            if case != "end":
                yield pytest.param(family, case, text.removesuffix("\n"), id=f"{family}, {case}")


def expected_tokens(text, tokenizer):
    """Tokens and mask of a text whose learned parts are in brackets."""
    ids, mask = [], []
    for i, part in enumerate(re.split("[⟦⟧]", text)):
        tokens = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += tokens
        mask += [i % 2 == 1] * len(tokens)
    return ids, mask


@pytest.mark.parametrize("family, case, expected", expectations())
def test_the_learned_tokens_of_a_family(family, case, expected):
    tokenizer, document = family_tokenizer(family), to_document(CHATS[case], "here:1", Fields())
    if expected.startswith("REFUSED: "):
        with pytest.raises(UserError, match="^here:1: .*" + re.escape(expected.removeprefix("REFUSED: "))):
            tokenize(document, tokenizer, DATE)
        return
    tokens, learned = tokenize(document, tokenizer, DATE)
    ids, mask = expected_tokens(expected, tokenizer)
    assert tokenizer.decode(tokens) == tokenizer.decode(ids)
    assert tokens.tolist() == ids and learned.tolist() == mask


def test_every_family_is_tried_with_system_and_turns():
    cases = {family: {p.values[1] for p in expectations() if p.values[0] == family} for family in TOKENS}
    assert len(cases) == 10 and all({"turns", "system"} <= tried for tried in cases.values())


@pytest.mark.parametrize("family", [family for family in TOKENS if family != "llama-3.1"])
def test_the_text_is_what_transformers_renders(family):
    """Except for today's date."""
    tokenizer = family_tokenizer(family)
    for case in ("turns", "system", "thinking"):
        try:
            expected = tokenizer.apply_chat_template(CHATS[case]["messages"], tokenize=False)
        except Exception:
            continue
        messages = to_document(CHATS[case], "here", Fields()).content
        assert chat_template(tokenizer, None, DATE).render(messages).text == expected
