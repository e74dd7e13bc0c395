"""Sources -> tokenised sequences and counts, source by source."""

from collections.abc import Iterable
from typing import Any

from alst_jax.config import UserError
from alst_jax.data.documents import Sequence, Stats, cut_documents
from alst_jax.data.embedded import python_reference
from alst_jax.data.named import parse_sources
from alst_jax.data.sources import Reading, read_source

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
        sequences, stats = cut_documents(documents, tokenizer, seq_len, vocab_size)
        report.tokens, report.learned, report.sequences = stats.tokens, stats.labels, stats.sequences
        report.weight, stats.sources = source.weight, [report]
        if source.weight is not None and not sequences:
            raise UserError(f"{flag} {source.path}: {stats.documents} documents and nothing in them to predict, so "
                            "that no weight can be given to it")
        sources[source.name] = sequences, stats
    return sources


def cut_embedded(held_out: bool, tokenizer: Any, seq_len: int, vocab_size: int) -> BySource:
    """The sequences of the embedded text."""
    return {"python_reference": cut_documents(python_reference(held_out), tokenizer, seq_len, vocab_size)}
