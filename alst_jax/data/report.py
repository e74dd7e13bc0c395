"""What a run learns, for people: the counts of each source, and samples with their learned tokens marked."""

import collections
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from alst_jax.data.labels import Labels, tokenize
from alst_jax.data.records import Document

TEXTS = ("text", "prompt/completion")  # formats whose documents get an end token
SHOWN = 1200  # characters of one run of tokens in a sample; longer runs are cut in the middle


@dataclasses.dataclass
class SourceReport:
    """The counts of one source (an entry of --data).

    records: rows and lines that were read, if their reader counts them. left_out: reason -> count.
    """

    name: str
    records: int = 0
    documents: int = 0
    tokens: int = 0
    learned: int = 0
    formats: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    ignored: dict[str, None] = dataclasses.field(default_factory=dict)
    left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, document: Document, tokens: int, learned: int) -> None:
        """Count a document. learned: the tokens that are predicted; a document's first token is not."""
        self.documents += 1
        self.tokens += tokens
        self.learned += learned
        self.formats[document.format] += 1
        self.ignored |= dict.fromkeys(document.ignored)

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count records or pieces that are not learned."""
        self.left_out[reason] += count

    def lines(self) -> Iterator[str]:
        """The source in one line, and a second for ignored keys."""
        formats = ", ".join(self.formats) or "nothing"
        left_out = "; ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        yield (f"{self.name or 'embedded text'}: {formats}, {max(self.records, self.documents):,} records, "
               f"{self.documents:,} documents, {self.tokens:,} tokens, {self.learned:,} learned, "
               f"left out: {left_out or 'none'}")
        if self.ignored:
            yield f"{self.name}: ignored keys {', '.join(self.ignored)}"


def print_sources(sources: Iterable[SourceReport], label: str = "source") -> None:
    """Print the lines of each source."""
    for source in sources:
        for line in source.lines():
            print(f"{label:<7} {line}", flush=True)


def warn_without_end(tokenizer: Any, sources: Iterable[SourceReport]) -> None:
    """Print a warning if texts end without an end token, because the tokenizer has none."""
    texts = sum(count for source in sources for name, count in source.formats.items() if name in TEXTS)
    if texts and tokenizer.eos_token_id is None:
        print(f"warning: the tokenizer names no end token (eos_token in tokenizer_config.json), so {texts:,} texts end "
              "without one: the model does not learn where a text ends, and what is generated does not stop by itself",
              file=sys.stderr, flush=True)


def print_samples(documents: list[Document], tokenizer: Any, labels: Labels, count: int) -> None:
    """Print the first documents of each source in turn, with learned tokens marked, then the counts of each source."""
    seen: collections.Counter = collections.Counter()
    place = []  # of each document among those of its source
    for document in documents:
        place.append(seen[document.source])
        seen[document.source] += 1
    chosen = sorted(range(len(documents)), key=place.__getitem__)[:count]
    sources: dict[str, SourceReport] = {}
    for i in chosen:
        print_sample(documents[i].origin, *tokenize(documents[i], tokenizer, labels), tokenizer)
    for document in documents:
        tokens, learned = tokenize(document, tokenizer, labels)
        source = sources.setdefault(document.source, SourceReport(document.source))
        source.add(document, tokens.size, int(np.count_nonzero(learned[1:])))
    print_sources(sources.values())
    warn_without_end(tokenizer, sources.values())


def runs(tokens: np.ndarray, learned: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """The tokens, cut where learned and other tokens meet."""
    cuts = np.flatnonzero(np.diff(learned)) + 1
    for run, flags in zip(np.split(tokens, cuts), np.split(learned, cuts)):
        if run.size:
            yield run, bool(flags[0])


def print_sample(
    origin: str, tokens: np.ndarray, learned: np.ndarray, tokenizer: Any, console: Any = None
) -> None:
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
