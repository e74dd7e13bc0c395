"""The work on a checkpoint between its last byte and its final name, by orbax's own option for that."""

import asyncio
import pathlib
from collections.abc import Callable

import orbax.checkpoint as ocp

Committing = type[ocp.path.atomicity.AtomicRenameTemporaryPath]


def committing(before: Callable[[pathlib.Path, int], None]) -> Committing:
    """orbax's class of temporary directories, which calls before(directory, step) when all of a step is written.

    The directory is renamed to its final name after that. A kill in between leaves no checkpoint.
    """

    class Commit(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            if (name := self.get_final().name).isdigit():  # not of an item inside
                await asyncio.to_thread(before, pathlib.Path(self.get()), int(name))
            await super().finalize()

    return Commit
