"""How much host memory this process may use. Pure Python, no jax."""

import pathlib

from alst_jax.hardware.machines import GIB

# Where the controllers are mounted, and the files of their limits: version 2 alone, beside version 1, version 1.
MOUNTS = (
    ("sys/fs/cgroup", "", "memory.max"),
    ("sys/fs/cgroup/unified", "", "memory.max"),
    ("sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes"),
)


def host_memory(cap_gib: float | int | None = None, root: pathlib.Path = pathlib.Path("/")) -> int:
    """Bytes: the machine's memory, the limits of the process's control groups, or `cap_gib` (--host-memory), whichever
    is least. root: of the file system, for tests."""
    cap = [] if cap_gib is None else [int(cap_gib * GIB)]
    import psutil  # not for --help

    return min([psutil.virtual_memory().total, *cgroup_limits(root), *cap])


def cgroup_limits(root: pathlib.Path) -> list[int]:
    """Memory limits of the process's control group and of all groups above it, of both versions, in bytes. Inside a
    container the path of the group may be the host's path, of which the container sees the top alone."""
    limits = []
    for mount, controller, file in MOUNTS:
        top = root / mount
        for path in (*_group_paths(root, controller), "/"):
            group = top / path.strip("/")
            found = (_read(folder / file) for folder in (group, *group.parents) if folder.is_relative_to(top))
            limits += [limit for limit in found if limit is not None]
    return limits


def _group_paths(root: pathlib.Path, controller: str) -> list[str]:
    """Of the process, for a controller of version 1; "" for version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    entries = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return [path for _, controllers, path in entries if controller in controllers.split(",")]


def _read(file: pathlib.Path) -> int | None:
    """The number in a file; None without the file, and for "max" (no limit)."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) else None
