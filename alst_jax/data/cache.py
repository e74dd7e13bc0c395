"""Tokenised documents on disk, so that a second run reads them at once, whatever its --seq-len.

    DIR/KEY/tokens.bin    int32: the tokens of all documents, one behind the other
    DIR/KEY/learned.bin   one byte a token: whether it is learned
    DIR/KEY/lengths.bin   int64: the tokens of each document
    DIR/KEY/store.json    the counts of the source, the sizes and checksums of the files, and its own checksum
    DIR/fingerprints/KEY  the hash of all sequences of a run

A store is written in a directory .partial-* beside, and renamed when it is complete. The key is a hash of all that
the tokens depend on: the files, the flags, the tokenizer, and the programs in this package.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from alst_jax.config import UserError
from alst_jax.data.cache_files import Output, mapped, release_pages, remove_abandoned
from alst_jax.data.cache_keys import FORMAT, checksum_of, file_checksum, hash_of, keys_of, programs
from alst_jax.data.documents import Cutting, check_vocabulary, checked_tokens
from alst_jax.data.pieces import Tokenised
from alst_jax.data.progress import shown
from alst_jax.data.report import TEXTS, SourceReport
from alst_jax.data.sources import OpenSource, Reading

SMALL = 5_000_000  # bytes of files: less is tokenised in memory each time
DTYPES = {"tokens": np.int32, "learned": np.bool_, "lengths": np.int64}
COUNTS = ("records", "first_bad", "documents", "tokens", "learned")
COUNTERS = ("records_left_out", "formats")


class Unusable(UserError):
    """No store can be read or written in the directory; no document was read yet."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """The stores in a directory. small: bytes of files below which a source has no store. chosen: the user named the
    directory, so that it is an error if it cannot be used."""

    directory: pathlib.Path
    small: int = SMALL
    chosen: bool = True

    def tokenised(self, source: OpenSource, reading: Reading, cutting: Cutting) -> Tokenised | None:
        """The tokens of a source from its store, which is written first if it does not exist; counted in the source's
        report. None for a source that is too small for a store, and with a warning if the directory cannot be used and
        was not chosen.

        UserError for bad documents, and if the store cannot be written.
        """
        try:
            return self._tokenised(source, reading, cutting)
        except Unusable as error:
            if self.chosen:
                raise
            print(f"cache   {source.report.name}: tokenised in memory. {error}", flush=True)
            return None

    def _tokenised(self, source: OpenSource, reading: Reading, cutting: Cutting) -> Tokenised | None:
        size = sum(file.path.stat().st_size for file in source.files)
        if size < self.small:
            return None
        keys = keys_of(source, reading, cutting.tokenizer, cutting.labels)
        for key in keys:
            if (store := self._read(key, source.report)) is not None:
                check_vocabulary(store.highs, cutting.vocab_size)
                print(
                    f"cache   {source.report.name}: {store.tokens.size:,} tokens of {store.lengths.size:,} documents "
                    f"from {self.directory / key}",
                    flush=True,
                )
                return store
        with shown(source, size) as documents:
            key = self._write(keys, dataclasses.replace(source, documents=documents), cutting)
        print(f"cache   {source.report.name}: tokenised into {self.directory / key}", flush=True)
        if (store := self._read(key)) is None:
            raise UserError(
                f"--data-cache {self.directory}: the tokens of {source.report.place} were written to {key} "
                "and are no longer there; does another program clear the directory? Start again, name "
                "another directory, or use --data-cache off"
            )
        return store

    # --------------------------------------------------------------------------------------------------------- reading

    def _read(self, key: str, report: SourceReport | None = None) -> Tokenised | None:
        """A store, or None without a complete one. report: gets its counts."""
        folder = self.directory / key
        try:
            meta = json.loads((folder / "store.json").read_text())
            sizes = {name: (folder / f"{name}.bin").stat().st_size for name in DTYPES}
        except (FileNotFoundError, ValueError):
            return None
        except OSError as error:
            raise Unusable(
                f"--data-cache {self.directory}: cannot be read: {error}; name another directory, or use "
                "--data-cache off"
            ) from error
        if not isinstance(meta, dict) or (meta.get("format"), meta.get("key")) != (FORMAT, key):
            return None
        if damaged := self._damaged(folder, meta, sizes):
            print(f"cache   {folder}: {damaged} is damaged: tokenised again", flush=True)
            return None
        if report is not None:
            for name in COUNTS:
                setattr(report, name, meta["report"][name])
            for name in COUNTERS:
                setattr(report, name, collections.Counter(meta["report"][name]))
            report.ignored = dict.fromkeys(meta["report"]["ignored"])
        maps = {name: mapped(folder / f"{name}.bin", dtype) for name, dtype in DTYPES.items()}
        release = functools.partial(release_pages, [maps["tokens"][1], maps["learned"][1]])
        highs = [(token, origin) for token, origin in meta["highs"]]
        return Tokenised(*(array for array, _ in maps.values()), highs, key, release)

    def _damaged(self, folder: pathlib.Path, meta: dict[str, Any], sizes: dict[str, int]) -> str | None:
        """The name of a file that was changed. All of a store is read: 1.8 GB/s a core here."""
        if meta.pop("self", None) != checksum_of(meta):
            return "store.json"
        if wrong := [name for name in DTYPES if meta["sizes"][name] != sizes[name]]:
            return f"{wrong[0]}.bin"
        try:
            with concurrent.futures.ThreadPoolExecutor(len(DTYPES)) as pool:
                found = dict(zip(DTYPES, pool.map(lambda name: file_checksum(folder / f"{name}.bin"), DTYPES)))
        except OSError as error:
            raise Unusable(
                f"--data-cache {self.directory}: cannot be read: {error}; name another directory, or use "
                "--data-cache off"
            ) from error
        return next((f"{name}.bin" for name in DTYPES if found[name] != meta["checksums"][name]), None)

    # --------------------------------------------------------------------------------------------------------- writing

    def _write(self, keys: tuple[str, str], source: OpenSource, cutting: Cutting) -> str:
        """Tokenise into a store. The key: the first, or the second if chats may hold the date."""
        failed = functools.partial(self.failed, source.report)
        with self.new_store(source.report) as folder:
            highs: list[tuple[int, str]] = []
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(Output(folder / f"{name}.bin", failed)) for name in DTYPES]
                for tokens, learned in checked_tokens(source.documents, cutting, source.report, highs):
                    for file, array in zip(files, (tokens, learned, np.asarray([tokens.size], np.int64))):
                        file.write(array)
            report = source.report
            report.check_documents()
            key = keys[any(name not in TEXTS for name in report.formats)]
            counts = {name: getattr(report, name) for name in (*COUNTS, *COUNTERS)} | {"ignored": list(report.ignored)}
            sizes = {name: (folder / f"{name}.bin").stat().st_size for name in DTYPES}
            meta = {
                "format": FORMAT,
                "key": key,
                "sizes": sizes,
                "highs": highs,
                "report": counts,
                "checksums": {name: file.checksum for name, file in zip(DTYPES, files)},
            }
            meta["self"] = checksum_of(meta)
            with Output(folder / "store.json", failed) as file:
                file.write(np.frombuffer(json.dumps(meta).encode(), np.uint8))
            self.publish(folder, key, report)
        return key

    @contextlib.contextmanager
    def new_store(self, report: SourceReport) -> Iterator[pathlib.Path]:
        """A new directory for a store, which is removed at the end unless it was renamed. A lock says that its writer
        lives: files of killed writers are removed."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for old in self.directory.glob(".partial-*"):
                remove_abandoned(old)
            folder = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=self.directory))
        except OSError as error:
            raise Unusable(self.failed(report, error)) from error
        try:
            lock = (folder / "lock").open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some file systems have no locks
            shutil.rmtree(folder, ignore_errors=True)
            raise Unusable(self.failed(report, error)) from error
        try:
            with lock:
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # it is gone if it was renamed

    def publish(self, folder: pathlib.Path, key: str, report: SourceReport) -> None:
        """Rename a complete store. Another process may have been faster with the same."""
        target = self.directory / key
        try:
            if target.exists() and self._read(key) is None:
                shutil.rmtree(target)  # damaged
            os.chmod(folder, 0o755)
            folder.rename(target)
        except OSError as error:
            if self._read(key) is None:
                raise self.failed(report, error) from error

    def failed(self, report: SourceReport, error: OSError) -> UserError:
        """The error of a store that cannot be written."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; they need five bytes each. Make room, name" if full else ". Name"
        return UserError(
            f"--data-cache {self.directory}: the tokens of {report.place} cannot be written there "
            f"({error.strerror or error}){hint} another directory, or use --data-cache off, which keeps "
            "them in memory"
        )

    # --------------------------------------------------------------------------------------------------- fingerprints

    def fingerprint_file(self, parts: list[Any]) -> pathlib.Path:
        """The file that remembers the hash of sequences that depend on `parts`."""
        return self.directory / "fingerprints" / hash_of(FORMAT, programs(), *parts)

    def remembered(self, file: pathlib.Path) -> str | None:
        """The text in a small file; None if it does not exist or is damaged."""
        try:
            text, checksum = file.read_text().rsplit(" ", 1)
        except (OSError, ValueError):  # computed again
            return None
        return text if checksum == str(checksum_of(text)) else None

    def remember(self, file: pathlib.Path, text: str) -> None:
        """Write a small file, complete or not at all. If it cannot be written, the next run computes the hash again."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent, prefix=".partial-") as folder:
                written = pathlib.Path(folder) / file.name
                written.write_text(f"{text} {checksum_of(text)}")
                os.replace(written, file)
        except OSError as error:
            print(
                f"cache   the hash of the sequences is not stored: {file.parent} cannot be written "
                f"({error.strerror or error})",
                flush=True,
            )


def default_directory() -> pathlib.Path:
    """~/.cache/alst_jax/data, or below $XDG_CACHE_HOME."""
    top = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(top) if top else pathlib.Path.home() / ".cache") / "alst_jax" / "data"
