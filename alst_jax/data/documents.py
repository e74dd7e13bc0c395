"""Documents -> tokens with already-shifted labels -> sequences of at most seq_len tokens, one document in each."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from alst_jax.config import IGNORED, UserError
from alst_jax.data.labels import Labels
from alst_jax.data.records import Document
from alst_jax.data.report import SourceReport, tokenized


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
    fullness: Any = None  # of packs: a packing.Fullness
    packing: tuple[int, int] | None = None  # (data-parallel replicas, documents of a replica at most)

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


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How documents become sequences. vocab_size: the model's. skip_bad: count documents that cannot be tokenised.
    drop_long: leave out, and count, documents of more than seq_len tokens."""

    tokenizer: Any
    seq_len: int
    vocab_size: int
    labels: Labels = Labels()
    skip_bad: bool = False
    drop_long: bool = False


def make_sequences(
    documents: Iterable[Document], tokenizer: Any, seq_len: int, vocab_size: int, flag: str = "--data",
    labels: Labels = Labels()
) -> tuple[list[Sequence], Stats]:
    """Tokenise, cut and check. UserError if there is nothing to predict, if the longest document fills less than half a
    sequence, or if the tokenizer has tokens the model does not know."""
    documents, report = list(documents), SourceReport("")
    for document in documents:
        report.count_document(document)
    sequences, stats = cut_documents(documents, Cutting(tokenizer, seq_len, vocab_size, labels), report)
    check_length(stats, seq_len, flag)
    return sequences, stats


def cut_documents(
    documents: Iterable[Document], cutting: Cutting, report: SourceReport
) -> tuple[list[Sequence], Stats]:
    """Tokenise and cut. A longer document gives consecutive pieces; the label of a piece's last token is the next
    piece's first token, so that each token but a document's first is predicted exactly once.

    report: the counts of the documents' source. UserError if the tokenizer has tokens the model does not know.
    """
    sequences, stats, seq_len = [], Stats(sources=[report]), cutting.seq_len
    for document, tokens, is_target in tokenized(
            documents, cutting.tokenizer, cutting.labels, report, cutting.skip_bad):
        if tokens.size and tokens.max() >= cutting.vocab_size:
            raise UserError(f"{document.origin}: token {tokens.max()} is outside the model's vocabulary of "
                            f"{cutting.vocab_size}: the tokenizer belongs to another model, or tokens were added to "
                            "it; --resize-vocabulary gives the model rows for added tokens")
        stats.documents += 1
        if cutting.drop_long and tokens.size > seq_len:
            report.pieces_left_out[f"longer than {seq_len:,} tokens"] += 1
            continue
        stats.longest = max(stats.longest, tokens.size)
        labels = np.append(np.where(is_target, tokens, IGNORED)[1:], IGNORED).astype(np.int32)
        for start in range(0, tokens.size, seq_len):
            piece = Sequence(tokens[start : start + seq_len], labels[start : start + seq_len])
            if np.all(piece.labels == IGNORED):
                stats.dropped += 1
                report.pieces_left_out["without anything to learn"] += 1
                continue
            sequences.append(piece)
            stats.tokens += piece.tokens.size
            stats.labels += int(np.count_nonzero(piece.labels != IGNORED))
    stats.sequences = report.sequences = len(sequences)
    return sequences, stats


def check_length(stats: Stats, seq_len: int, flag: str, pack: bool = False) -> None:
    """UserError if there is nothing to predict, or the longest document (packed: all of them) fills less than half a
    sequence."""
    check_targets(stats, flag)
    if pack and stats.tokens * 2 < seq_len:
        raise UserError(f"{flag} is shorter than asked for: {stats.documents} documents have {stats.tokens} tokens in all, "
                        f"so that more than half of a sequence of {seq_len} would be padding. Use a shorter --seq-len, or "
                        "more data")
    if not pack and stats.longest * 2 < seq_len:
        fitting = min(-(-stats.longest // 128) * 128, 2 * stats.longest)
        raise UserError(
            f"{flag} is shorter than asked for: the longest of {stats.documents} documents has {stats.longest} tokens, "
            f"so that more than half of every sequence of {seq_len} would be padding. Use --seq-len {fitting} or less, "
            "longer documents, or --pack, which puts several into one sequence")


def check_targets(stats: Stats, place: str) -> None:
    """UserError if there is nothing to predict."""
    if not stats.sequences:
        raise UserError(f"{place}: {stats.documents} documents and nothing in them to predict (fewer than two tokens each)")
