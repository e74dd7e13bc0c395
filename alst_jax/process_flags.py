"""The flags of a run in several processes, and the flags that such a run refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

from alst_jax.declare import AtLeast, default


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
    """Several processes that share a run, on one host or many. Under srun and mpirun they are found."""

    coordinator: Annotated[str | None, default("what srun or mpirun say; without them one process")] = None
    """HOST:PORT of process 0, where the others find it."""
    processes: Annotated[int | None, AtLeast(1), default("what srun or mpirun say; without them 1")] = None
    """Processes of the run. 1: this process alone, whatever srun or mpirun say. With --plan-for: of the planned run."""
    process: Annotated[int | None, AtLeast(0), default("what srun or mpirun say")] = None
    """Number of this process, from 0."""
    local_devices: Annotated[tuple[int, ...], default("the host's GPUs divided by its processes")] = ()
    """Numbers of the host's GPUs that this process takes, as in 0 1."""
    start_timeout: Annotated[int, AtLeast(1)] = 300
    """Seconds within which all processes must connect."""


OF_A_PROCESS = ("process", "local_devices")
"""The flags that may differ between the processes of a run."""


def process_mistakes(config: Any, several: bool) -> Iterator[tuple[Any, str]]:
    """(whether the flags are wrong, message) for each rule. config: all flags. several: whether the run has several
    processes, also without flags."""
    typed = config.coordinator is not None or config.processes not in (None, 1) and not config.plan_for
    typed = typed or config.process is not None or config.start_timeout != ProcessFlags.start_timeout
    alone = {
        "plan_only": "prints a plan",
        "find_max_seq_len": "prints a length",
        "show_samples": "prints samples",
        "explain_run": "prints a record",
    }
    for field, what in alone.items():
        value = getattr(config, field)
        yield (
            typed and value not in (None, False),
            f"--{field.replace('_', '-')} {what} and needs no other process; leave --coordinator, --processes, "
            "--process and --start-timeout out",
        )
    yield (min(config.local_devices, default=0) < 0, f"--local-devices {config.local_devices}: GPUs are counted from 0")
    yield (
        config.local_devices and not several,
        "--local-devices divides a host's GPUs between several processes, and there is one; set "
        "CUDA_VISIBLE_DEVICES instead",
    )
    if not several:
        return
    not_yet = {
        "check_numerics": "compares on the devices of one process",
        "add_data": "is written for one process",
        "merge_adapter": "needs the whole model in one process (python -m convert.merge does it after the run)",
    }
    for field, why in not_yet.items():
        yield (
            getattr(config, field),
            f"--{field.replace('_', '-')} {why}; leave it out, or use one process (--processes 1)",
        )
    for field in ("on_nonfinite", "on_spike"):
        yield (
            getattr(config, field) == "rewind",
            f"--{field.replace('_', '-')} rewind is written for one process; use stop or skip, or one process "
            "(--processes 1)",
        )
