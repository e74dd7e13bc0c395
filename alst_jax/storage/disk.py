"""Messages for a disk that refuses: full, out of inodes, over quota, read-only, gone."""

import errno
import os
import pathlib
import re
import traceback

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CAUSES = {
    errno.ENOSPC: "free space there, or inodes (df -h and df -i say which is used up)",
    errno.EDQUOT: "free space of your quota there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable: the file system is mounted read-only",
    errno.EACCES: "give this user the right to it",
    errno.EPERM: "give this user the right to it",
    errno.EIO: "check the disk: it fails",
    errno.ENOENT: "put it back: it was there before, or its directory was",
    errno.ESTALE: "mount the network file system again",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def disk_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error, or None. tensorstore and orbax put its number into the text of another."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, BaseExceptionGroup):
            return next(filter(None, map(disk_error, error.exceptions)), None)
        if isinstance(error, OSError) and error.errno in CAUSES:
            return error
        for number in map(int, re.findall(r"os_error_code='(\d+)'", str(error))):
            if number in CAUSES:
                paths = re.findall(r'"(/[^"]+)"', str(error))
                return OSError(number, os.strerror(number), paths[-1] if paths else None)
        error = error.__cause__ or error.__context__
    return None


def describe(error: OSError) -> str:
    """`PATH: No space left on device; free space there ...`."""
    path = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None
    where = f"{os.fsdecode(path)}: " if path is not None else ""
    advice = f"; {CAUSES[error.errno]}" if error.errno in CAUSES else ""
    return f"{where}{error.strerror or error}{advice}"


def stopped(error: OSError, out: str | None) -> str:
    """The message of a run that an OSError ended: the error, its place in the program, the safe checkpoint, advice."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "alst_jax" in frame.filename]
    where = f" ({pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{describe(error)}{where}. {what_is_safe(out)}"


def what_is_safe(out: str | os.PathLike | None) -> str:
    """The newest checkpoint of a run directory and the command that goes on from it."""
    folder = pathlib.Path(out) / "checkpoints" if out is not None else None
    try:
        steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder is not None else []
    except OSError:
        steps = []
    if not steps:
        return "No checkpoint was saved yet, so none is lost"
    return f"Step {steps[-1]} is saved in {folder}; go on from it with: python train.py --resume --out {out}"
