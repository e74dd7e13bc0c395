"""Which process of a run this one is: from the flags, srun or mpirun. Pure Python: jax starts later."""

import dataclasses
import pathlib
import re
import socket
from collections.abc import Mapping
from typing import Any

from alst_jax.declare import UserError

# srun sets the first three in each task of a step. In a batch script, which is one process, they are not set.
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_JOB_ID")
OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
FIRST_PORT, PORTS = 61440, 4096  # the range from which jax too takes the port of a job


@dataclasses.dataclass(frozen=True)
class Place:
    """count: processes of the run. rank: number of this one. how: "flags", "SLURM" or "Open MPI"."""

    host: str  # of process 0
    port: int
    count: int
    rank: int
    how: str

    def __str__(self) -> str:
        return f"process {self.rank} of {self.count}"


def find_place(config: Any, environment: Mapping[str, str]) -> Place | None:
    """The place of this process; None where it is the only one. UserError for flags that do not name one."""
    if config.processes == 1:
        if config.process not in (None, 0):
            raise UserError(f"--process {config.process} with --processes 1: the only process is number 0")
        return None
    count, rank, address, how = _launcher(environment)
    typed = config.coordinator is not None or config.processes is not None or config.process is not None
    how = "flags" if typed and how is None else how
    if how is None:
        if config.start_timeout != type(config).start_timeout and not _launched(environment):
            raise UserError(
                f"--start-timeout {config.start_timeout}: the run has one process, which waits for no other; leave it "
                "out, or name the processes with --coordinator, --processes and --process"
            )
        return None
    count = count if config.processes is None else config.processes
    rank = rank if config.process is None else config.process
    address = address if config.coordinator is None else config.coordinator
    lacking = [
        name
        for name, value in (("--coordinator HOST:PORT", address), ("--processes", count), ("--process", rank))
        if value is None
    ]
    if lacking:
        found = "" if how == "flags" else f" ({how} was found, which does not say it)"
        raise UserError(f"several processes need {' and '.join(lacking)}{found}; or --processes 1 for one alone")
    if rank >= count:
        raise UserError(
            f"--process {rank}: processes are counted from 0, and --processes is {count}; use 0 to {count - 1}"
        )
    host, port = _address(address)
    return Place(host, port, count, rank, how)


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[?([^\[\]]+?)\]?:(\d+)", text.strip())
    if match is None or not 0 < int(match[2]) < 65536:
        raise UserError(
            f"--coordinator {text}: write HOST:PORT of process 0, as in node001:6123, with a port from 1 to 65535"
        )
    return match[1], int(match[2])


def _launcher(environment: Mapping[str, str]) -> tuple[int | None, int | None, str | None, str | None]:
    """(processes, number of this one, HOST:PORT, name) of the program that started this process; None for what is not
    known."""
    number = lambda name: int(environment[name]) if environment.get(name, "").isdigit() else None
    if all(name in environment for name in SLURM) and (number(SLURM[0]) or 0) > 1:
        job, step = number("SLURM_JOB_ID") or 0, number("SLURM_STEP_ID") or 0
        port = FIRST_PORT + (job + step) % PORTS
        return number(SLURM[0]), number(SLURM[2]), f"{first_node(environment[SLURM[1]])}:{port}", "SLURM"
    if all(name in environment for name in OPEN_MPI) and (number(OPEN_MPI[0]) or 0) > 1:
        return number(OPEN_MPI[0]), number(OPEN_MPI[1]), None, "Open MPI"  # nothing says where process 0 is
    return None, None, None, None


def machine() -> str:
    """The name of this machine or container, and the number of its kernel's boot: containers of two machines may have
    the same name."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _launched(environment: Mapping[str, str]) -> bool:
    """Whether srun or mpirun started this process, maybe as the only one."""
    return SLURM[0] in environment or OPEN_MPI[0] in environment


def first_node(nodes: str) -> str:
    """`node[001-004,7],other` -> `node001`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes}: not a list of nodes; name process 0 with --coordinator HOST:PORT"
        )
    return match[1] + (match[2] or "") + (match[3] or "")
