"""Files that all processes of a run must see."""

import hashlib
import pathlib
import time

from alst_jax.processes.link import link

SEEN_WITHIN = 20  # seconds after which a file that another process has written must be seen


def check_seen(file: pathlib.Path) -> None:
    """UserError unless all processes see the file that process 0 sees. A shared file system may need a while."""
    if not link().several:
        return
    content = lambda: hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "nothing"
    wanted, began = link().told("content of a file", content), time.monotonic()
    while (same := content() == wanted) is False and time.monotonic() - began < SEEN_WITHIN:
        time.sleep(0.2)
    blind = [
        f"process {rank} ({host})"
        for rank, (host, sees) in enumerate(zip(link().hosts, link().exchange("seen", same)))
        if not sees
    ]
    if blind:
        link().disagree(
            f"{', '.join(blind[:4])} sees another {file} than process 0 ({link().hosts[0]}), or none: the run "
            "directory must be on storage that all processes share (--out)"
        )


def check_same_files(what: str, files: list[pathlib.Path]) -> None:
    """UserError unless all processes have files of the same names and sizes."""
    link().same(f"names and sizes of {what}", [[file.name, file.stat().st_size] for file in sorted(files)])
