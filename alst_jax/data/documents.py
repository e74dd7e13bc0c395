"""Documents -> tokens with already-shifted labels -> sequences of at most seq_len tokens, one document in each."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from alst_jax.config import IGNORED, UserError
from alst_jax.data.sources import Document, SourceReport


@dataclasses.dataclass(frozen=True)
class Sequence:
    """tokens int32[n] and labels int32[n], n <= seq_len; labels[t] is what follows tokens[t], or IGNORED. lengths: those
    of packed documents; None: it is one document."""

    tokens: np.ndarray
    labels: np.ndarray
    lengths: tuple[int, ...] | None = None


@dataclasses.dataclass
class Stats:
    """What became of the documents."""

    documents: int = 0
    tokens: int = 0
    labels: int = 0
    sequences: int = 0
    longest: int = 0
    dropped: int = 0
    sources: list[SourceReport] = dataclasses.field(default_factory=list)
    held_out: list[SourceReport] = dataclasses.field(default_factory=list)

    def add(self, other: "Stats") -> None:
        """Count the documents of another source too."""
        for name in ("documents", "tokens", "labels", "sequences", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.sources += other.sources

    def summary(self, seq_len: int) -> str:
        padding = 1 - self.tokens / max(1, self.sequences * seq_len)
        dropped = f", {self.dropped} pieces without anything to predict left out" if self.dropped else ""
        return (f"{self.documents:,} documents, {self.tokens:,} tokens ({self.labels:,} to predict; longest document "
                f"{self.longest:,}) -> {self.sequences:,} sequences of {seq_len:,}, {padding:.1%} padding{dropped}")


def make_sequences(
    documents: Iterable[Document], tokenizer: Any, seq_len: int, vocab_size: int, flag: str = "--data"
) -> tuple[list[Sequence], Stats]:
    """Tokenise, cut and check. UserError if there is nothing to predict, if the longest document fills less than half a
    sequence, or if the tokenizer has tokens the model does not know."""
    sequences, stats = cut_documents(documents, tokenizer, seq_len, vocab_size)
    check_length(stats, seq_len, flag)
    return sequences, stats


def cut_documents(
    documents: Iterable[Document], tokenizer: Any, seq_len: int, vocab_size: int
) -> tuple[list[Sequence], Stats]:
    """Tokenise and cut. A longer document gives consecutive pieces; the label of a piece's last token is the next
    piece's first token, so that each token but a document's first is predicted exactly once.

    UserError if the tokenizer has tokens the model does not know.
    """
    sequences, stats = [], Stats()
    for document in documents:
        tokens, is_target = tokenize(document, tokenizer)
        if tokens.size and tokens.max() >= vocab_size:
            raise UserError(f"{document.origin}: token {tokens.max()} is outside the model's vocabulary of {vocab_size}: "
                            "the tokenizer belongs to another model")
        stats.documents += 1
        stats.longest = max(stats.longest, tokens.size)
        labels = np.append(np.where(is_target, tokens, IGNORED)[1:], IGNORED).astype(np.int32)
        for start in range(0, tokens.size, seq_len):
            piece = Sequence(tokens[start : start + seq_len], labels[start : start + seq_len])
            if np.all(piece.labels == IGNORED):
                stats.dropped += 1
                continue
            sequences.append(piece)
            stats.tokens += piece.tokens.size
            stats.labels += int(np.count_nonzero(piece.labels != IGNORED))
    stats.sequences = len(sequences)
    return sequences, stats


def check_length(stats: Stats, seq_len: int, flag: str) -> None:
    """UserError if there is nothing to predict, or the longest document fills less than half a sequence."""
    check_targets(stats, flag)
    if stats.longest * 2 < seq_len:
        fitting = min(-(-stats.longest // 128) * 128, 2 * stats.longest)
        raise UserError(
            f"{flag} is shorter than asked for: the longest of {stats.documents} documents has {stats.longest} tokens, "
            f"so that more than half of every sequence of {seq_len} would be padding. Use --seq-len {fitting} or less, "
            "or longer documents")


def check_targets(stats: Stats, place: str) -> None:
    """UserError if there is nothing to predict."""
    if not stats.sequences:
        raise UserError(f"{place}: {stats.documents} documents and nothing in them to predict (fewer than two tokens each)")


def tokenize(document: Document, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32[n] and, for each, whether it is one to be learned. Text: all, with an end-of-text token; chat: what
    the assistant says."""
    if document.is_chat:
        return _tokenize_chat(document, tokenizer)
    try:
        document.content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{document.origin}: not Unicode text (character {error.start} is half of a surrogate pair)") from error
    ids = tokenizer(document.content, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids = [*ids, tokenizer.eos_token_id]
    return np.asarray(ids, np.int32), np.ones(len(ids), bool)


def _tokenize_chat(document: Document, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    if not tokenizer.chat_template:
        raise UserError(f"{document.origin}: a chat, but the model's tokenizer has no chat template; use a model with one "
                        "(an Instruct model) or give text instead")
    try:
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            ids, mask = _render(tokenizer, document.content, return_assistant_tokens_mask=True)
        else:
            ids, mask = _mask_by_prefixes(document, tokenizer)
    except UserError:
        raise
    except Exception as error:  # templates raise what they like, e.g. for roles that do not alternate
        raise UserError(f"{document.origin}: the model's chat template refuses this chat: {error}") from error
    return np.asarray(ids, np.int32), np.asarray(mask, bool)


def _render(tokenizer, messages, **options):
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return out["input_ids"], out.get("assistant_masks")


def _mask_by_prefixes(document: Document, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """For templates that do not mark what the assistant says: it is what follows the prompt before each of its turns."""
    messages = document.content
    ids, _ = _render(tokenizer, messages)
    mask = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            through, _ = _render(tokenizer, messages[: i + 1])
            prompt = _prompt_before(tokenizer, messages[:i], through)
            if ids[: len(prompt)] != prompt or ids[: len(through)] != through:
                raise UserError(
                    f"{document.origin}: the model's chat template changes earlier turns when a later one is added, so "
                    "what the assistant says in it cannot be told from the rest; use a template with {% generation %} marks")
            mask[len(prompt) : len(through)] = True
    return ids, mask.tolist()


def _prompt_before(tokenizer: Any, earlier: list[dict[str, Any]], through: list[int]) -> list[int]:
    """What a model is given before it answers: the earlier turns and the opening of its own."""
    if earlier:
        return _render(tokenizer, earlier, add_generation_prompt=True)[0]
    # An empty chat is not rendered. The opening is what a generation prompt adds to any chat; look for it here.
    some = [{"role": "user", "content": "?"}]
    opening = _render(tokenizer, some, add_generation_prompt=True)[0][len(_render(tokenizer, some)[0]) :]
    ends = [i for i in range(len(opening), len(through) + 1) if through[i - len(opening) : i] == opening]
    return through[: ends[0]] if opening and ends else []
