"""Documents -> tokens with already-shifted labels -> sequences of at most seq_len tokens, one document in each."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from alst_jax.config import UserError
from alst_jax.data.labels import Labels
from alst_jax.data.pieces import Pieces, Sequence, Tokenised, labels_in, spans_of
from alst_jax.data.records import Document
from alst_jax.data.report import SourceReport, tokenized

__all__ = ["Cutting", "Sequence", "Stats", "check_length", "check_targets", "cut", "cut_documents", "make_sequences"]


@dataclasses.dataclass
class Stats:
    """Counts of the documents."""

    documents: int = 0
    tokens: int = 0
    labels: int = 0
    sequences: int = 0
    longest: int = 0
    dropped: int = 0
    sources: list[SourceReport] = dataclasses.field(default_factory=list)
    held_out: list[SourceReport] = dataclasses.field(default_factory=list)
    fullness: Any = None  # of packs: a packing.Fullness
    lengths: str | None = None  # of sequences, in words, if several
    packing: tuple[int, int | None] | None = None  # of packs: a batches.Packing

    def add(self, other: "Stats") -> None:
        """Count the documents of another source too."""
        for name in ("documents", "tokens", "labels", "sequences", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.sources += other.sources

    def summary(self, seq_len: int) -> str:
        padding = 1 - self.tokens / max(1, self.sequences * seq_len)
        dropped = f", {self.dropped} pieces without anything to predict left out" if self.dropped else ""
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens ({self.labels:,} to predict; longest document "
            f"{self.longest:,}) -> {self.sequences:,} sequences of {seq_len:,}, {padding:.1%} padding{dropped}"
        )


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
    documents: Iterable[Document],
    tokenizer: Any,
    seq_len: int,
    vocab_size: int,
    flag: str = "--data",
    labels: Labels = Labels(),
) -> tuple[Pieces, Stats]:
    """Tokenise, cut and check. UserError without a token to predict, if the longest document fills less than half a
    sequence, or if the tokenizer has tokens the model does not know."""
    documents, report = list(documents), SourceReport("")
    for document in documents:
        report.count_document(document)
    sequences, stats = cut_documents(documents, Cutting(tokenizer, seq_len, vocab_size, labels), report)
    check_length(stats, seq_len, flag)
    return sequences, stats


def cut_documents(documents: Iterable[Document], cutting: Cutting, report: SourceReport) -> tuple[Pieces, Stats]:
    """Tokenise in memory, and cut.

    report: the counts of the documents' source. UserError if the tokenizer has tokens the model does not know.
    """
    return cut(tokenise_in_memory(documents, cutting, report), cutting, report)


def tokenise_in_memory(documents: Iterable[Document], cutting: Cutting, report: SourceReport) -> Tokenised:
    """The tokens of all documents, counted in `report`."""
    tokens, learned, highs = [np.zeros(0, np.int32)], [np.zeros(0, bool)], []
    for of_document, is_learned in checked_tokens(documents, cutting, report, highs):
        tokens.append(of_document)
        learned.append(is_learned)
    lengths = np.asarray([part.size for part in tokens[1:]], np.int64)
    return Tokenised(np.concatenate(tokens), np.concatenate(learned), lengths, highs)


def checked_tokens(
    documents: Iterable[Document], cutting: Cutting, report: SourceReport, highs: list[tuple[int, str]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of each document and whether each is learned. highs: gets the items of `Tokenised.highs`.

    UserError if the tokenizer has tokens the model does not know.
    """
    for document, tokens, learned in tokenized(documents, cutting.tokenizer, cutting.labels, report, cutting.skip_bad):
        highest = int(tokens.max(initial=-1))
        if not highs or highest > highs[-1][0]:
            highs.append((highest, document.origin))
            check_vocabulary(highs[-1:], cutting.vocab_size)
        yield tokens, learned


def check_vocabulary(highs: list[tuple[int, str]], vocab_size: int) -> None:
    """UserError, for the first document with a token that the model does not know."""
    for token, origin in highs:
        if token >= vocab_size:
            raise UserError(
                f"{origin}: token {token} is outside the model's vocabulary of {vocab_size}: the tokenizer "
                "belongs to another model, or tokens were added to it; --resize-vocabulary gives the model "
                "rows for added tokens"
            )


def cut(source: Tokenised, cutting: Cutting, report: SourceReport) -> tuple[Pieces, Stats]:
    """Cut documents. A longer document gives consecutive pieces; the label of a piece's last token is the next piece's
    first token, so that each token but a document's first is predicted exactly once.

    report: the counts of the documents' source.
    """
    stats, seq_len = Stats(documents=source.lengths.size, sources=[report]), cutting.seq_len
    kept = source.lengths <= seq_len if cutting.drop_long else np.ones(source.lengths.size, bool)
    spans = spans_of(source.lengths, seq_len, kept)
    labels = labels_in(source, spans)
    stats.longest = int(source.lengths[kept].max(initial=0))
    stats.dropped = int(np.count_nonzero(labels == 0))
    left_out = {
        f"longer than {seq_len:,} tokens": np.count_nonzero(~kept),
        "without anything to learn": stats.dropped,
        "of no token": np.count_nonzero(source.lengths == 0),
    }
    report.pieces_left_out.update({reason: int(count) for reason, count in left_out.items() if count})
    report.cut = int(np.count_nonzero(source.lengths[kept] > seq_len))
    if cutting.drop_long:  # the rest is not learned
        report.learned = int(labels.sum())
    pieces = Pieces(source, spans[:, labels > 0])
    stats.tokens, stats.labels = int(pieces.lengths.sum()), int(labels.sum())
    stats.sequences = report.sequences = len(pieces)
    return pieces, stats


def check_length(stats: Stats, seq_len: int, flag: str, pack: bool = False) -> None:
    """UserError without a token to predict, or if the longest document (packed: all of them) fills less than half a
    sequence."""
    check_targets(stats, flag)
    if pack and stats.tokens * 2 < seq_len:
        raise UserError(
            f"{flag} is too short: its {stats.documents} documents have {stats.tokens} tokens in all, so more than "
            f"half of a sequence of {seq_len} would be padding. Use a shorter --seq-len, or more data"
        )
    if not pack and stats.longest * 2 < seq_len:
        fitting = min(-(-stats.longest // 128) * 128, 2 * stats.longest)
        raise UserError(
            f"{flag} is too short: the longest of its {stats.documents} documents has {stats.longest} tokens, "
            f"so more than half of every sequence of {seq_len} would be padding. Use --seq-len {fitting} or less, "
            "longer documents, or --pack, which puts several into one sequence"
        )


def check_targets(stats: Stats, place: str) -> None:
    """UserError without a token to predict."""
    if not stats.sequences:
        raise UserError(
            f"{place}: nothing to predict: none of the {stats.documents} documents has two tokens"
            + "".join(report.left_out() for report in stats.sources)
        )
