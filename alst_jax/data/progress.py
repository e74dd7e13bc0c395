"""A bar while much data is tokenised, on a terminal."""

import contextlib
from collections.abc import Iterable, Iterator

from alst_jax.data.files import FoundFile
from alst_jax.data.formats import COMPRESSED, kind_of
from alst_jax.data.records import Document
from alst_jax.data.sources import OpenSource

PACKED = (".parquet", ".arrow", ".feather")  # their bytes are not the bytes of their texts


@contextlib.contextmanager
def shown(source: OpenSource, size: int) -> Iterator[Iterable[Document]]:
    """The documents of a source of `size` bytes; while they are read, a bar shows how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield source.documents
        return
    columns = (
        TextColumn("tokenising {task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(source.report.name, total=size if all(map(_is_plain, source.files)) else None, done="")

        def counted() -> Iterator[Document]:
            for document in source.documents:
                yield document
                counts = f"{source.report.documents:,} documents, {source.report.tokens:,} tokens"
                progress.update(task, advance=len(str(document.content)), done=counts)

        yield counted()


def _is_plain(file: FoundFile) -> bool:
    """Whether a file is about as long as its texts."""
    return not file.path.name.lower().endswith(COMPRESSED) and kind_of(file.path.name) not in PACKED
