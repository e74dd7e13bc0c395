"""The text that `train.py` learns when it is given none: long documents that ship with Python."""

from alst_jax.config import UserError
from alst_jax.data.records import Document

LONG_ENOUGH = 4096  # bytes: shorter topics of the language reference are left out
HELD_OUT_EVERY = 8  # each eighth topic is for evaluation


def python_reference(held_out: bool = False) -> list[Document]:
    """The long topics of the Python language reference (`pydoc_data.topics`), each a document, sorted by name.

    UserError if this Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "the embedded text is the Python language reference in pydoc_data, which this Python was "
            "installed without; name a file with --data"
        ) from error
    names = sorted(name for name in topics if len(topics[name].encode()) >= LONG_ENOUGH)
    chosen = [n for i, n in enumerate(names) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out]
    return [Document(topics[name], f"pydoc_data.topics[{name!r}]") for name in chosen]
