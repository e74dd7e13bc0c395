"""The flags about records, chats and labels. `TrainConfig` has them all; this file holds the fields of a new group."""

import dataclasses
from typing import Literal


@dataclasses.dataclass
class RecordFlags:
    """Flags that say what a record means and what is learned of it."""

    learn: Literal["assistant", "last", "all"] = "assistant"
    """What is learned of a chat: all turns of the assistant, the last of them, or all tokens."""
    chat_template: str | None = None
    """File with a chat template (Jinja), used instead of the model's own and written to the export."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of a record that are left out, as if the data lacked them."""
    show_samples: int | None = None
    """Print this many samples with their learned tokens marked, and stop: needs no --seq-len and no --out."""
    template_date: str | None = None
    """Date that chat templates print, as 2026-11-27. Default: the day on which the run began."""
