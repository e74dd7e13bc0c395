"""Tokenizers: a Hugging Face directory's own, or one token a byte for the embedded model."""

import pathlib
from typing import Any

from alst_jax.config import UserError

BOS, EOS, PAD, TURN_START, TURN_END = "<|bos|>", "<|eos|>", "<|pad|>", "<|turn|>", "<|end_of_turn|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end_of_turn|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end_of_turn|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}")


def has_tokenizer(directory: pathlib.Path) -> bool:
    """Whether there are files of a tokenizer in a directory."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def load_tokenizer(directory: str | pathlib.Path) -> Any:
    """The tokenizer of a Hugging Face directory. UserError if its files are missing or unreadable."""
    from transformers import AutoTokenizer

    path = pathlib.Path(directory)
    if not has_tokenizer(path):
        raise UserError(f"{path} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); copy the files of "
                        "the tokenizer the model was trained with into it")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UserError(f"{path}: the tokenizer cannot be read: {error}") from error


def byte_tokenizer() -> Any:
    """A tokenizer with one token a byte of UTF-8, and a few special ones; saves and loads like any other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END], clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast
