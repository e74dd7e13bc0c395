"""Tokenizers: a Hugging Face directory's own, or one token a byte for the embedded model."""

import importlib.util
import json
import pathlib
from typing import Any

from alst_jax.config import UserError

BOS, EOS, PAD, TURN_START, TURN_END = "<|bos|>", "<|eos|>", "<|pad|>", "<|turn|>", "<|end_of_turn|>"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
PROBE = "Hello  world,\n\n\tdef f(x):\n    return 'x' + \"12345\"  # Größe, naïve, 東京, 🕔 <b>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end_of_turn|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end_of_turn|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def has_tokenizer(directory: pathlib.Path) -> bool:
    """Whether a directory has files of a tokenizer."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def load_tokenizer(directory: str | pathlib.Path) -> Any:
    """The tokenizer of a Hugging Face directory. UserError if its files are missing or unreadable."""
    from transformers import AutoTokenizer

    path = pathlib.Path(directory)
    if not has_tokenizer(path):
        raise UserError(
            f"{path} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); copy the files of "
            "the tokenizer the model was trained with into it"
        )
    _check_readable(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        _check_same_tokens(tokenizer, path)
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever its parsers raise
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "its code comes with the checkpoint (auto_map in tokenizer_config.json), and is never executed"
        raise UserError(f"{path}: the tokenizer cannot be read: {reason}") from error


def _check_readable(path: pathlib.Path) -> None:
    """UserError for two kinds of files whose fault transformers does not name."""
    file, settings = path / "tokenizer.model", {}
    if file.is_file() and not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        with open(file, "rb") as raw:
            package = "sentencepiece" if raw.read(1) == b"\n" else "tiktoken"  # a protobuf message, or lines of text
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{path}: its only tokenizer is tokenizer.model, which the package {package} reads; "
                f"install {package}, or make tokenizer.json where it is installed (transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))"
            )
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            read = json.loads((path / name).read_text(encoding="utf-8")) if (path / name).is_file() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path / name} is not valid JSON: {error}") from error
        if not isinstance(read, dict):
            raise UserError(f"{path / name} holds no JSON object")
        settings |= {(name, key): value for key, value in read.items()}
    for (name, key), value in settings.items():
        if key in SPECIAL and (value.get("content") if isinstance(value, dict) else value) == "":
            raise UserError(
                f'{path / name}: {key} is "", which is no token. Early conversions of LLaMA have this '
                'mistake: there eos_token is "</s>", bos_token "<s>", unk_token "<unk>". Write the '
                "token, or remove the field if there is none"
            )


def _check_same_tokens(tokenizer: Any, path: pathlib.Path) -> None:
    """UserError if transformers makes other tokens than tokenizer.json says.

    Some versions of transformers rebuild a tokenizer from the class that tokenizer_config.json names, and lose the
    file's own rules for spaces.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    if not file.is_file():
        return
    reference = Tokenizer.from_file(str(file))
    reference.no_truncation()
    reference.no_padding()
    expected = reference.encode(PROBE, add_special_tokens=False).ids
    given = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if given != expected:
        import transformers

        raise UserError(
            f"{path}: transformers {transformers.__version__} loads the tokenizer as "
            f"{type(tokenizer).__name__}, which splits a text into {len(given)} tokens; by "
            f"tokenizer.json it has {len(expected)} other tokens; install a newer transformers, or set "
            '"tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
        )


def use_template(tokenizer: Any, file: str | None, same: bool = False) -> None:
    """Replace the tokenizer's chat templates by the one in a file (--chat-template); None keeps them.

    same: the tokenizer has the template already, as a resumed run's has. UserError if the file holds another one; the
    file may be gone.
    """
    if file is None or same and not pathlib.Path(file).exists():
        return
    try:
        template = pathlib.Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {file}: name a file with a chat template in Jinja ({error})") from error
    if not template.strip():
        raise UserError(f"--chat-template {file}: the file is empty")
    if same and tokenizer.chat_template != template:
        raise UserError(
            f"--chat-template {file}: not the template that the run began with; a resumed run keeps its "
            "own. Leave it out, or start a new run with --model on this run's directory"
        )
    tokenizer.chat_template = template


def byte_tokenizer() -> Any:
    """A tokenizer with one token a byte of UTF-8, and a few special ones; saves and loads like any other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
