"""Sources -> documents, or tokenised sequences, with counts; source by source."""

from collections.abc import Collection, Iterator

from alst_jax.config import UserError
from alst_jax.data.documents import Cutting, Sequence, Stats, cut_documents
from alst_jax.data.embedded import python_reference
from alst_jax.data.named import parse_sources
from alst_jax.data.records import Document
from alst_jax.data.report import SourceReport
from alst_jax.data.sources import Reading, read_source

BySource = dict[str, tuple[list[Sequence], Stats]]


def read_sources(
    given: Collection[str], reading: Reading, flag: str
) -> Iterator[tuple[list[Document], SourceReport]]:
    """The documents and counts of each source that --data or --eval-data (`flag`) names; of none, the embedded text."""
    held_out = flag == "--eval-data"
    if not given:
        yield embedded(held_out)
    for source in parse_sources(given, flag, held_out):
        yield read_source(source, reading, flag, held_out)


def cut_sources(given: Collection[str], reading: Reading, flag: str, cutting: Cutting) -> BySource:
    """The sequences of each source, by the sources' names.

    UserError for a bad source, and for a weighted source with nothing to predict.
    """
    sources = {}
    for documents, report in read_sources(given, reading, flag):
        sequences, stats = cut_documents(documents, cutting, report)
        report.check_documents()
        if report.weight is not None and not sequences:
            raise UserError(f"{report.place}: {stats.documents} documents and nothing in them to predict, so that no "
                            "weight can be given to it")
        sources[report.name] = sequences, stats
    return sources


def embedded(held_out: bool) -> tuple[list[Document], SourceReport]:
    """The documents of the embedded text, and their counts."""
    documents = python_reference(held_out)
    report = SourceReport("python_reference", "the embedded text", records=len(documents))
    for document in documents:
        report.count_document(document)
    return documents, report
