"""Sources -> documents, or tokenised sequences, with counts; source by source."""

from collections.abc import Collection, Iterator

from alst_jax.config import UserError
from alst_jax.data.cache import Cache
from alst_jax.data.documents import Cutting, Stats, cut, tokenise_in_memory
from alst_jax.data.embedded import python_reference
from alst_jax.data.named import parse_sources
from alst_jax.data.pieces import Pieces
from alst_jax.data.records import Document
from alst_jax.data.report import SourceReport
from alst_jax.data.sources import OpenSource, Reading, open_source, read_source

HELD_OUT = ("--eval-data", "--eval-long")  # flags that name held-out text
BySource = dict[str, tuple[Pieces, Stats]]


def read_sources(given: Collection[str], reading: Reading, flag: str) -> Iterator[tuple[list[Document], SourceReport]]:
    """The documents and counts of each source of --data or --eval-data (`flag`); without one, of the embedded text."""
    held_out = flag in HELD_OUT
    if not given:
        source = embedded(held_out)
        yield list(source.documents), source.report
    for source in parse_sources(given, flag, held_out):
        yield read_source(source, reading, flag, held_out)


def cut_sources(
    given: Collection[str], reading: Reading, flag: str, cutting: Cutting, cache: Cache | None = None
) -> BySource:
    """The sequences of each source, by the sources' names; large sources are in the cache.

    UserError for a bad source, and for a weighted source with nothing to predict.
    """
    held_out = flag in HELD_OUT
    sources = {}
    for named in parse_sources(given, flag, held_out) or [None]:
        source = embedded(held_out) if named is None else open_source(named, reading, flag, held_out)
        report = source.report
        tokenised = cache.tokenised(source, reading, cutting) if cache else None
        if tokenised is None:
            tokenised = tokenise_in_memory(source.documents, cutting, report)
            report.check_documents()
        sequences, stats = cut(tokenised, cutting, report)
        if report.weight is not None and not sequences:
            raise UserError(
                f"{report.place}: nothing to predict: none of the {stats.documents} documents has two tokens; a source "
                "with a weight needs one"
            )
        sources[report.name] = sequences, stats
    return sources


def embedded(held_out: bool) -> OpenSource:
    """The embedded text."""
    documents = python_reference(held_out)
    report = SourceReport("python_reference", "the embedded text", records=len(documents))
    for document in documents:
        report.count_document(document)
    return OpenSource("", [], report, documents)
