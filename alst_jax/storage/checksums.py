"""Checksums of files: of a checkpoint with the run's own files, and of the weights of a Hugging Face directory.

    DIR/checkpoints/STEP/checksums.json      every file of the step; run.json and model/ of the run
    HF_DIR/model.safetensors.checksums.json  the files of weights and their index

orbax keeps no checksum of uncompressed chunks: a flipped bit would be loaded without a word. The files are hashed when
all of them are written, in threads, before the checkpoint gets its final name.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from alst_jax.config import UserError
from alst_jax.models.hashed_file import Entry
from alst_jax.processes.link import link
from alst_jax.storage import parts
from alst_jax.storage.parts import LATE

FILE = parts.CHECKSUMS.name
WEIGHTS_FILE = "model.safetensors.checksums.json"
ALGORITHM = "sha256"  # one of the fastest in hashlib, and the hub names its files by it
THREADS = 16
BLOCK = 2**20  # bytes that are read at a time


@runtime_checkable
class Beside(Protocol):
    """Work beside which files are hashed."""

    threads: int

    def hashed(self, file: pathlib.Path, position: int, read: int) -> None:
        """Called after each block of `read` bytes, which ends at `position`, and with 0 at the end of the file. May
        wait; CancelledError to end it."""


class Damaged(UserError):
    """Files were changed. The text names each."""


def hash_file(file: pathlib.Path, beside: Beside | None = None) -> Entry:
    """[bytes, hash] of a file. beside: the work that goes on beside this."""
    digest, block = hashlib.new(ALGORITHM), memoryview(bytearray(BLOCK))
    with file.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        read = -1
        while read:
            read = stream.readinto(block)
            digest.update(block[:read])
            if beside is not None:
                beside.hashed(file, stream.tell(), read)
    return [size, digest.hexdigest()]


def hash_files(top: pathlib.Path, names: Iterable[str], beside: Beside | None = None) -> dict[str, Entry]:
    """Name -> [bytes, hash] of files below `top`, hashed in the order given. Threads read them: hashing leaves Python's
    lock. beside: as in `hash_file`; it says how many threads."""

    def entry(name: str) -> Entry:
        return hash_file(top / name, beside)

    names = list(names)
    most = THREADS if beside is None else beside.threads
    with concurrent.futures.ThreadPoolExecutor(min(most, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def files_below(top: pathlib.Path) -> list[str]:
    """The files of a directory, by their paths below it, without hidden ones and LATE ones."""
    found = (path.relative_to(top) for path in top.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in found
        if not any(part.startswith(".") for part in path.parts) and str(path) not in (FILE, *LATE)
    )


def write_record(file: pathlib.Path, record: dict[str, Any]) -> None:
    """Write a record of checksums, with a checksum of itself. On the disk when this returns; whole or not at all."""
    text = json.dumps({"self": _of_record(record)} | record, indent=1)
    partial = file.with_name(f".{file.name}")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def read_record(file: pathlib.Path) -> dict[str, Any] | None:
    """The record in a file; None without a file. Damaged if it was changed."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        whole = record.pop("self") == _of_record(record)
        if whole and record["algorithm"] != ALGORITHM:
            raise UserError(f"{file}: made with {record['algorithm']}, and this version knows {ALGORITHM} only")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{file.name} is damaged: it is not what was written") from error
    if not whole:
        raise Damaged(f"{file.name} is damaged: it is not what was written")
    return record


def _of_record(record: dict[str, Any]) -> str:
    return hashlib.new(ALGORITHM, json.dumps(record, sort_keys=True).encode()).hexdigest()


def compare(
    top: pathlib.Path,
    recorded: dict[str, Entry],
    others: Iterable[str] = (),
    together: bool = False,
    beside: Beside | None = None,
) -> None:
    """Damaged unless the files below `top` are the recorded ones. others: files found beside them. together: each
    process of the run reads a part of the files, and all learn all results. beside: as in `hash_file`.

    Sizes are compared before a file is read. Files are read in the order in which they were written.
    """
    outside = [name for name in recorded if pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/")]
    if outside:
        raise Damaged(f"its checksums name files outside of it: {', '.join(outside[:5])}")
    found = [f"{name} is not one of its files" for name in sorted(set(others) - set(recorded))]
    read, written = [], {}
    for name, (size, _) in recorded.items():
        try:
            about = (top / name).stat()
        except OSError as error:
            found.append(f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}")
            continue
        if about.st_size == size:
            read.append(name)
            written[name] = about.st_mtime_ns
        else:
            found.append(f"{name} has {about.st_size:,} bytes and was written with {size:,}")
    read = read[link().rank :: link().count] if together else read
    try:
        now = hash_files(top, sorted(read, key=lambda name: (written[name], name)), beside)
    except OSError as error:
        raise Damaged(f"{error.filename} cannot be read: {error.strerror}") from error
    found += [f"{name} has other content than was written" for name in read if now[name] != recorded[name]]
    if together:
        found = list(dict.fromkeys(words for of_process in link().exchange("checksums", found) for words in of_process))
    if found:
        raise Damaged("; ".join(found[:5]) + f"; and {len(found) - 5} more" * (len(found) > 5))


# --------------------------------------------------------------------------------------------------------- checkpoints


def seal(
    folder: pathlib.Path,
    step: int,
    run_dir: pathlib.Path,
    hashed: Callable[[pathlib.Path, list[str]], dict[str, Entry]] = hash_files,
) -> None:
    """Write the checksums of a step's folder, which may have a name that is not final, and of the run's own files.
    hashed: hashes the files of the folder."""
    own = [name for name in files_below(run_dir / "model")] if (run_dir / "model").is_dir() else []
    own = [f"model/{name}" for name in own] + ["run.json"] * (run_dir / "run.json").is_file()
    write_record(
        folder / FILE,
        {
            "format": 1,
            "algorithm": ALGORITHM,
            "step": step,
            "files": hashed(folder, files_below(folder)),
            "run": hash_files(run_dir, own),
        },
    )


def verify_step(
    folder: pathlib.Path, item: str | None = None, together: bool = False, beside: Beside | None = None
) -> bool:
    """Whether the checkpoint in a step's folder has checksums, which then are right. Damaged if one is wrong.

    item: verify the files of this part alone (params, optimizer, loop), and those outside of parts. together,
    beside: see `compare`.
    """
    record = read_record(folder / FILE)
    if record is None:
        if _promises(folder):
            raise Damaged(f"{FILE} is missing")
        if item is None and (missing := parts.missing(folder)):
            raise Damaged(f"{' and '.join(missing)} not found")
        return False
    if str(record["step"]) != folder.name:
        raise Damaged(f"it is step {record['step']}, under another name")
    others = files_below(folder)
    if not any(name.startswith(f"{item}/") for name in others) and item is not None:
        raise Damaged(f"{item} not found")
    mine = lambda name: item is None or name.split("/")[0] == item or "/" not in name
    recorded = {name: entry for name, entry in record["files"].items() if mine(name)}
    compare(folder, recorded, filter(mine, others), together, beside)
    return True


def verify_run_files(folder: pathlib.Path, run_dir: pathlib.Path) -> None:
    """UserError unless run.json and model/ are the files that the checkpoint in a step's folder was saved with."""
    try:
        record = read_record(folder / FILE)
        compare(run_dir, record["run"] if record else {})
    except Damaged as error:
        raise Damaged(
            f"{run_dir}: {error}, since {folder} was saved. Put back what was there; or, if you changed it "
            f"yourself, accept it: python -m convert.verify {run_dir} --accept"
        ) from error


def _promises(folder: pathlib.Path) -> bool:
    """Whether a checkpoint was saved with checksums, by its own words in `loop`."""
    try:
        loop = json.loads((folder / parts.LOOP.name / "metadata").read_text())
        return all(loop.get(name) == value for name, value in parts.CHECKED.items())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False  # restoring `loop` names the fault


# ----------------------------------------------------------------------------------------- Hugging Face directories


def seal_weights(hf_dir: pathlib.Path, hashed: dict[str, Entry] | None = None) -> None:
    """Write the checksums of the weight files of a Hugging Face directory. hashed: those that were made while the files
    were written."""
    known = hashed or {}
    rest = hash_files(hf_dir, [name for name in _weights(hf_dir) if name not in known])
    write_record(hf_dir / WEIGHTS_FILE, {"format": 1, "algorithm": ALGORITHM, "files": known | rest})


def verify_weights(hf_dir: pathlib.Path, together: bool = False, beside: Beside | None = None) -> bool:
    """Whether all weight files of a Hugging Face directory have checksums, which then are right. together: see
    `compare`.

    They are ours, or the hub's, whose cache names a file by its hash. UserError if one is wrong. beside: as in
    `hash_file`.
    """
    try:
        record = read_record(hf_dir / WEIGHTS_FILE)
        names = _weights(hf_dir)
        if record is not None:
            compare(hf_dir, record["files"], names, together, beside)
            return True
        recorded = {name: hub for name in names if (hub := _of_hub(hf_dir / name))}
        compare(hf_dir, recorded, together=together, beside=beside)
        return bool(names) and all(name in recorded for name in names if name.endswith(".safetensors"))
    except Damaged as error:
        raise Damaged(
            f"{hf_dir}: {error}. Make or fetch it again; or, if you changed it yourself, accept it: python "
            f"-m convert.verify {hf_dir} --accept"
        ) from error


def _weights(hf_dir: pathlib.Path) -> list[str]:
    return sorted(
        file.name
        for pattern in ("*.safetensors", "*.safetensors.index.json")
        for file in hf_dir.glob(pattern)
        if file.is_file() and not file.name.startswith(".")
    )


def _of_hub(file: pathlib.Path) -> Entry | None:
    """[bytes, hash] of a file in the hub's cache: a link to a file that has its SHA-256 as its name."""
    target = file.resolve()
    known = file.is_symlink() and len(target.name) == 64 and target.parent.name == "blobs"
    return [target.stat().st_size, target.name] if known else None
