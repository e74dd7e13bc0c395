"""Documents -> tokens with already-shifted labels -> sequences of at most seq_len tokens, one document in each."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from alst_jax.config import IGNORED, UserError
from alst_jax.data.labels import Labels, tokenize
from alst_jax.data.records import Document
from alst_jax.data.report import SourceReport


@dataclasses.dataclass(frozen=True)
class Sequence:
    """tokens int32[n] and labels int32[n], n <= seq_len; labels[t] is what follows tokens[t], or IGNORED."""

    tokens: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass
class Stats:
    """What became of the documents."""

    documents: int = 0
    tokens: int = 0
    labels: int = 0
    sequences: int = 0
    longest: int = 0
    dropped: int = 0
    sources: dict[str, SourceReport] = dataclasses.field(default_factory=dict)

    def source(self, document: Document) -> SourceReport:
        """The counts of a document's source."""
        return self.sources.setdefault(document.source, SourceReport(document.source))

    def summary(self, seq_len: int) -> str:
        padding = 1 - self.tokens / max(1, self.sequences * seq_len)
        dropped = f", {self.dropped} pieces without anything to predict left out" if self.dropped else ""
        return (f"{self.documents:,} documents, {self.tokens:,} tokens ({self.labels:,} to predict; longest document "
                f"{self.longest:,}) -> {self.sequences:,} sequences of {seq_len:,}, {padding:.1%} padding{dropped}")


def make_sequences(
    documents: Iterable[Document], tokenizer: Any, seq_len: int, vocab_size: int, flag: str = "--data",
    labels: Labels = Labels()
) -> tuple[list[Sequence], Stats]:
    """Tokenise and cut. A longer document gives consecutive pieces; the label of a piece's last token is the next
    piece's first token, so that each token but a document's first is predicted exactly once.

    UserError if there is nothing to predict, if the longest document fills less than half a sequence, or if the
    tokenizer has tokens the model does not know.
    """
    sequences, stats = [], Stats()
    for document in documents:
        tokens, is_target = tokenize(document, tokenizer, labels)
        if tokens.size and tokens.max() >= vocab_size:
            raise UserError(f"{document.origin}: token {tokens.max()} is outside the model's vocabulary of {vocab_size}: "
                            "the tokenizer belongs to another model")
        source = stats.source(document)
        source.add(document, tokens.size, int(np.count_nonzero(is_target[1:])))
        stats.documents += 1
        stats.longest = max(stats.longest, tokens.size)
        targets = np.append(np.where(is_target, tokens, IGNORED)[1:], IGNORED).astype(np.int32)
        for start in range(0, tokens.size, seq_len):
            piece = Sequence(tokens[start : start + seq_len], targets[start : start + seq_len])
            if np.all(piece.labels == IGNORED):
                stats.dropped += 1
                source.leave_out("pieces without anything to learn")
                continue
            sequences.append(piece)
            stats.tokens += piece.tokens.size
            stats.labels += int(np.count_nonzero(piece.labels != IGNORED))
    stats.sequences = len(sequences)
    if not sequences:
        raise UserError(f"{flag}: {stats.documents} documents and nothing in them to predict (fewer than two tokens each)")
    if stats.longest * 2 < seq_len:
        fitting = min(-(-stats.longest // 128) * 128, 2 * stats.longest)
        raise UserError(
            f"{flag} is shorter than asked for: the longest of {stats.documents} documents has {stats.longest} tokens, "
            f"so that more than half of every sequence of {seq_len} would be padding. Use --seq-len {fitting} or less, "
            "or longer documents")
    return sequences, stats
