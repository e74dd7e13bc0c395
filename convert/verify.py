"""python -m convert.verify DIR: compare a checkpoint, a run or a Hugging Face directory with its checksums."""

import pathlib
import sys
from collections.abc import Callable

import tyro

from alst_jax.declare import UserError, command_line
from alst_jax.models.weight_files import find_tensors
from alst_jax.storage import checksums, disk
from alst_jax.storage.run_directory import CHECKPOINTS, EXPORT, find_checkpoint, is_checkpoint

UNKNOWN = 1  # exit code: nothing is wrong that could be seen, but some files have no checksums


def verify(directory: tyro.conf.Positional[pathlib.Path], accept: bool = False) -> int:
    """Compare the files of DIRECTORY with the checksums that were written with them. Nothing is run or changed.

    DIRECTORY: a run with its checkpoints and its export, a converted model, one checkpoint (RUN/checkpoints/STEP), or a
    Hugging Face directory. accept: trust the present files, and write their checksums.
    Exit code: 0 if all is as it was written, 1 if some files have no checksums, 2 if a file is damaged.
    """
    parts = _parts(directory)
    problems, unknown = [], 0
    for name, check, write in parts:
        try:
            if accept:
                write()
            verified = check()
            unknown += not verified
            print(f"{name}: {'verified' if verified else 'has no checksums: not verified'}", flush=True)
        except UserError as error:
            problems.append(f"{name}: {error}")
            print(f"{name}: DAMAGED", flush=True)
    if problems:
        raise UserError("\nerror: ".join(problems) + _advice(directory))
    return UNKNOWN if unknown else 0


def _parts(directory: pathlib.Path) -> list[tuple[pathlib.Path, Callable[[], bool], Callable[[], None]]]:
    """(name, whether it is verified, the function that writes its checksums) of each part of a directory."""
    if not directory.is_dir():
        raise UserError(
            f"{directory}: {'it is a file' if directory.is_file() else 'no such directory'}; name a run, a "
            "checkpoint, a converted model or a Hugging Face directory"
        )
    if not is_checkpoint(directory):
        return [_weights(directory)]
    run_dir, newest = find_checkpoint(directory)
    folder = run_dir / CHECKPOINTS
    one = directory.absolute().parent == folder
    steps = [newest] if one else sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())

    def check(step: int) -> bool:
        verified = checksums.verify_step(folder / str(step))
        checksums.verify_run_files(folder / str(step), run_dir)
        return verified

    parts = [
        (
            folder / str(step),
            lambda step=step: check(step),
            lambda step=step: checksums.seal(folder / str(step), step, run_dir),
        )
        for step in steps
    ]
    return parts + ([_weights(run_dir / EXPORT)] if (run_dir / EXPORT).is_dir() and not one else [])


def _weights(hf_dir: pathlib.Path) -> tuple[pathlib.Path, Callable[[], bool], Callable[[], None]]:
    def check() -> bool:
        verified = checksums.verify_weights(hf_dir)
        find_tensors(hf_dir)  # without checksums: whether the headers fit the files
        return verified

    def write() -> None:
        find_tensors(hf_dir)  # UserError without weights
        checksums.seal_weights(hf_dir)

    return hf_dir, check, write


def _advice(directory: pathlib.Path) -> str:
    """Which checkpoint is left, of a run whose newest is damaged."""
    if not is_checkpoint(directory):
        return ""
    from alst_jax.storage.checkpoint import advice

    run_dir, newest = find_checkpoint(directory)
    bad = run_dir / CHECKPOINTS / str(newest)
    try:
        checksums.verify_step(bad)
    except UserError:
        return "\n" + advice(bad)
    return ""


def main() -> int:
    try:
        return command_line(verify)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {disk.describe(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
