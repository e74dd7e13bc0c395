"""The learned texts, for people: the counts of each source, and samples with their learned tokens marked."""

import collections
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from alst_jax.config import UserError
from alst_jax.data.files import words
from alst_jax.data.labels import Labels, Prepared, encode, prepare, tokenize_texts
from alst_jax.data.records import Document

TEXTS = ("text", "prompt/completion")  # formats whose documents get an end token
AT_ONCE = 1 << 20  # characters of texts that are tokenised at a time
SHOWN = 1200  # characters of one run of tokens in a sample; longer runs are cut in the middle


@dataclasses.dataclass
class SourceReport:
    """The counts of one source, as every run prints them.

    place: the flag and the path, for errors. weight: its part of the sequences. *_left_out: reason -> count.
    """

    name: str
    place: str = ""
    weight: float | None = None
    files: int = 0
    split: str | None = None
    files_left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    records: int = 0
    records_left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first_bad: str | None = None  # the error of the first bad record
    documents: int = 0
    formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    ignored: dict[str, None] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    learned: int = 0
    pieces_left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sequences: int = 0
    cut: int = 0  # documents that are longer than a sequence

    def count_document(self, document: Document) -> None:
        """Count a document, its format and its ignored keys."""
        self.documents += 1
        self.formats[document.format] += 1
        self.ignored |= dict.fromkeys(document.ignored)

    def count_bad(self, error: UserError, document: Document | None = None) -> None:
        """Count a bad record, and keep the error of the first one. document: the record's, if it was counted."""
        self.records_left_out["bad"] += 1
        # It is printed: a key of the record may hold half a surrogate pair.
        self.first_bad = self.first_bad or str(error).encode("utf-8", "backslashreplace").decode()
        if document is not None:
            self.documents -= 1
            self.formats -= collections.Counter([document.format])  # a format of no document is removed

    def check_documents(self) -> None:
        """UserError if no document is left."""
        if not self.documents:
            raise UserError(f"{self.place}: no documents found{self.left_out()}")

    def lines(self) -> Iterator[str]:
        """The source in one line, and a second for ignored keys."""
        counts = [_counted(self.files, "file") + (f" of split {self.split}" if self.split else "")] * bool(self.files)
        counts += [
            ", ".join(self.formats) or "nothing",
            _counted(self.records, "record"),
            _counted(self.documents, "document"),
            _counted(self.tokens, "token"),
            f"{self.learned:,} learned",
        ]
        counts += [_counted(self.cut, "document") + " cut"] * bool(self.cut)
        yield f"{self.name}: {', '.join(counts)}{self.left_out() or '; nothing left out'}"
        if self.ignored:
            yield f"{self.name}: ignored keys {', '.join(self.ignored)}"

    def left_out(self) -> str:
        """The counts of files, records and pieces of documents that were left out, by reason."""
        text = "".join(
            f"; {what} left out: {words(counts)}"
            for what, counts in (
                ("files", self.files_left_out),
                ("records", self.records_left_out),
                ("pieces", self.pieces_left_out),
            )
            if counts
        )
        return text + (f"; the first bad one: {self.first_bad}" if self.first_bad else "")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def tokenized(
    documents: Iterable[Document], tokenizer: Any, labels: Labels, report: SourceReport, skip_bad: bool = False
) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    """Each document, its tokens, and whether each is learned; counted in `report`.

    skip_bad: documents that cannot be tokenised are left out and counted as bad records, instead of refused.
    """
    for kept in _batches(_prepared(documents, tokenizer, labels, report, skip_bad)):
        texts = [content for _, content in kept if isinstance(content, str)]
        plain = iter(tokenize_texts(texts, tokenizer) if texts else ())
        labelled = iter(encode([content for _, content in kept if isinstance(content, Prepared)], tokenizer))
        for document, content in kept:
            tokens, learned = next(plain if isinstance(content, str) else labelled)
            report.tokens += tokens.size
            report.learned += int(np.count_nonzero(learned[1:]))  # nothing precedes a document's first token
            yield document, tokens, learned


def _prepared(
    documents: Iterable[Document], tokenizer: Any, labels: Labels, report: SourceReport, skip_bad: bool
) -> Iterator[tuple[Document, str | Prepared]]:
    """Each document with its text, which of chats and completions says what is learned."""
    for document in documents:
        try:
            needs_labels = document.is_chat or document.prompt
            yield document, prepare(document, tokenizer, labels) if needs_labels else document.content
        except UserError as error:
            if not skip_bad:
                raise
            report.count_bad(error, document)


def _batches(documents: Iterable[tuple[Document, str | Prepared]]) -> Iterator[list[tuple[Document, str | Prepared]]]:
    """Neighbours of together about AT_ONCE characters of text. Those before an error come before it."""
    batch, characters = [], 0
    try:
        for document, content in documents:
            batch.append((document, content))
            characters += 100 + len(content if isinstance(content, str) else content.text)
            if characters >= AT_ONCE:
                yield batch
                batch, characters = [], 0
    except UserError:
        yield batch
        raise
    yield batch


def print_sources(sources: Iterable[SourceReport], label: str = "source") -> None:
    """Print the lines of each source."""
    for source in sources:
        for line in source.lines():
            print(f"{label:<7} {line}", flush=True)


def warn_without_end(tokenizer: Any, sources: Iterable[SourceReport]) -> None:
    """Print a warning if texts end without an end token, because the tokenizer has none."""
    texts = sum(count for source in sources for name, count in source.formats.items() if name in TEXTS)
    if texts and tokenizer.eos_token_id is None:
        print(
            f"warning: the tokenizer names no end token (eos_token in tokenizer_config.json), so {texts:,} texts end "
            "without one: the model does not learn where a text ends, so it will not stop generating",
            file=sys.stderr,
            flush=True,
        )


def print_samples(
    sources: Iterable[tuple[list[Document], SourceReport]], tokenizer: Any, labels: Labels, count: int, skip_bad: bool
) -> None:
    """Print the first documents of each source in turn, with learned tokens marked, then the counts of each source."""
    sources = list(sources)
    streams = [tokenized(documents, tokenizer, labels, report, skip_bad) for documents, report in sources]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*streams))
    for document, tokens, learned in itertools.islice(filter(None, in_turn), count):
        print_sample(document.origin, tokens, learned, tokenizer)
    for stream, (_, report) in zip(streams, sources):
        collections.deque(stream, maxlen=0)  # the rest is counted
        report.check_documents()
    reports = [report for _, report in sources]
    print_sources(reports)
    warn_without_end(tokenizer, reports)


def runs(tokens: np.ndarray, learned: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """The tokens, cut where learned and other tokens meet."""
    cuts = np.flatnonzero(np.diff(learned)) + 1
    for run, flags in zip(np.split(tokens, cuts), np.split(learned, cuts)):
        if run.size:
            yield run, bool(flags[0])


def print_sample(origin: str, tokens: np.ndarray, learned: np.ndarray, tokenizer: Any, console: Any = None) -> None:
    """Print one sample: learned tokens in colour on a terminal, in double brackets elsewhere.

    A document's first token is never learned, because nothing precedes it. console: of rich; default: standard output.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False, soft_wrap=True)
    learned = np.append(False, learned[1:]) if learned.size else learned
    count = int(np.count_nonzero(learned))
    console.print(Text(f"--- {origin}: {tokens.size:,} tokens, {count:,} learned"), style="bold")
    sample = Text()
    for run, is_learned in runs(tokens, learned):
        text = _shortened(_decode(run, tokenizer))
        if console.is_terminal:
            sample.append(text, "black on green" if is_learned else "")
        else:
            sample.append(f"[[{text}]]" if is_learned else text)
    console.print(sample)


def _decode(tokens: np.ndarray, tokenizer: Any) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]} (... {len(text) - 2 * half:,} characters ...) {text[-half:]}"
