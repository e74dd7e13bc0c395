"""Sources -> tokenised sequences and counts, source by source."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from alst_jax.config import UserError
from alst_jax.data.documents import Sequence, Stats, cut_documents
from alst_jax.data.embedded import python_reference
from alst_jax.data.named import parse_sources
from alst_jax.data.sources import Document, Reading, SourceReport, read_source

BySource = dict[str, tuple[list[Sequence], Stats]]


def cut_sources(
    given: Iterable[str], reading: Reading, flag: str, tokenizer: Any, seq_len: int, vocab_size: int
) -> BySource:
    """The sequences of what --data or --eval-data (`flag`) names, by source.

    UserError for a bad source, and for a weighted source with nothing to predict.
    """
    held_out, sources = flag == "--eval-data", {}
    for source in parse_sources(given, flag, held_out):
        documents, report = read_source(source, reading, flag, held_out)
        cut = functools.partial(cut_documents, tokenizer=tokenizer, seq_len=seq_len, vocab_size=vocab_size)
        sequences, stats = _cut_good(documents, cut, report) if reading.skip_bad else cut(documents)
        report.tokens, report.learned, report.sequences = stats.tokens, stats.labels, stats.sequences
        report.documents, report.weight, stats.sources = stats.documents, source.weight, [report]
        if not stats.documents:
            raise UserError(f"{flag} {source.path}: no documents in there{report.left_out()}")
        if source.weight is not None and not sequences:
            raise UserError(f"{flag} {source.path}: {stats.documents} documents and nothing in them to predict, so "
                            "that no weight can be given to it")
        sources[source.name] = sequences, stats
    return sources


def _cut_good(
    documents: list[Document], cut: Callable[[list[Document]], tuple[list[Sequence], Stats]], report: SourceReport
) -> tuple[list[Sequence], Stats]:
    """The sequences of the documents that can be tokenised; the others are counted as bad records."""
    sequences, stats = [], Stats()
    for document in documents:
        try:
            more, of_document = cut([document])
        except UserError as error:
            report.count_bad(error)
            continue
        sequences += more
        stats.add(of_document)
    return sequences, stats


def cut_embedded(held_out: bool, tokenizer: Any, seq_len: int, vocab_size: int) -> BySource:
    """The sequences of the embedded text."""
    return {"python_reference": cut_documents(python_reference(held_out), tokenizer, seq_len, vocab_size)}
