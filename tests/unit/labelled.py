"""Tokenizers and templates with labels."""

import json
import pathlib

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alst_jax.data.labels import Labels, tokenize
from alst_jax.data.records import Fields, to_document

TEMPLATES = pathlib.Path(__file__).parents[1] / "data/templates"
TOKENS = json.loads((TEMPLATES / "tokens.json").read_text())
CHATS = json.loads((TEMPLATES / "chats.json").read_text())


def byte_tokenizer(bos=None, eos=None, added=()):
    """One token a byte, and these special tokens."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, additional_special_tokens=list(added)
    )


def family_tokenizer(family):
    tokenizer = byte_tokenizer(**TOKENS[family])
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    return tokenizer


# ------------------------------------------------------------------------------------------------ which turns, and text

CHATML = family_tokenizer("chatml").chat_template
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "5"},
]


def learned_texts(record, tokenizer, **labels):
    """The decoded runs of learned tokens."""
    tokens, learned = tokenize(to_document(record, "here:1", Fields()), tokenizer, Labels(**labels))
    runs = np.split(np.arange(tokens.size), np.flatnonzero(np.diff(learned)) + 1)
    return [tokenizer.decode(tokens[run]) for run in runs if learned[run[0]]]


def with_template(template, **tokens):
    tokenizer = byte_tokenizer(**({"eos": "<|im_end|>", "added": ["<|im_start|>"]} | tokens))
    tokenizer.chat_template = template
    return tokenizer


MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}GENERATION{{ message.content + '<|im_end|>' }}END"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def marked(generation, end):
    return MARKED.replace("GENERATION", generation).replace("END", end)
