"""The reports of a run: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import functools
import json
import math
import pathlib
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.summary import Writer

from alst_jax.data.batches import Arrays
from alst_jax.hardware.environment import peak_flops
from alst_jax.models.sizes import needed_flops
from alst_jax.processes.link import link
from alst_jax.step import TrainStep

COMPILED = "/jax/core/compile/backend_compile_duration"  # the event of jax.monitoring
OF_A_HOST = ("memory", "throttled")  # events that differ from host to host; the others are the same in all processes
QUIET_SECONDS = 5.0  # between plain lines, without a terminal


class MetricsLog:
    """One JSON object a step in DIR/metrics.jsonl, the same numbers in DIR/tensorboard."""

    def __init__(self, directory: pathlib.Path, resume_step: int):
        self.path = directory / "metrics.jsonl"
        self.seconds: list[float] = []  # of the steps of this process
        # Steps after the checkpoint are run again: their old lines would stand there twice.
        self._lock = threading.Lock()  # events come from another thread
        self._file = None
        self.rewind(resume_step)
        self._hook, threading.excepthook = threading.excepthook, quiet_writer
        self.tensorboard = Writer(str(directory / "tensorboard"))

    def rewind(self, step: int) -> None:
        """Leave out the lines of the steps after this one. Events stay: they have happened."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            partial = self.path.with_name(f".{self.path.name}")  # a kill here loses no line
            partial.write_text("".join(line for line in self._lines() if _step(line) <= step or _is_event(line)))
            partial.replace(self.path)
            self._file = self.path.open("a", buffering=1)

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def write(self, values: dict[str, Any]) -> None:
        """Append one step's values."""
        self.seconds.append(values["seconds"])
        self.event(values)
        self.scalars(values["step"], values)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Numbers for TensorBoard alone."""
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self.tensorboard.add_scalar(name, value, step=step)

    def event(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl alone; not-finite numbers become null, which JSON can hold."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self._lock:
            self._file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        try:
            self._file.close()
            self.tensorboard.close()
        finally:
            threading.excepthook = self._hook


class NoLog(MetricsLog):
    """The log of a process that does not log."""

    def __init__(self):
        self.seconds: list[float] = []

    def write(self, values: dict[str, Any]) -> None:
        self.seconds.append(values["seconds"])

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Nothing."""

    def event(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def quiet_writer(failed: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's thread: its error is raised by the next call of the writer."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failed)


def _step(line: str) -> float:
    """The step of a line; infinity for a line that cannot be read, so that it is removed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _is_event(line: str) -> bool:
    try:
        return "event" in json.loads(line)
    except (ValueError, TypeError):
        return False


class ProgressDisplay:
    """A progress bar on a terminal; elsewhere a line now and then, the first and the last step always."""

    def __init__(self, first_step: int, last_step: int):
        self._last_step, self._last_line = last_step, -math.inf
        self._bar = None
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns)
            self._bar.start()
            self._task = self._bar.add_task("step", total=last_step, completed=first_step)

    def show(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step == self._last_step or time.monotonic() - self._last_line >= QUIET_SECONDS:
            print(f"step {step}/{self._last_step}  {text}", flush=True)
            self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def compilations() -> int:
    """Programs that XLA compiled, or read from its cache on disk, in this process since the first call."""
    return len(_compiled())


def teller(display: ProgressDisplay, log: MetricsLog) -> Callable[[Any], None]:
    """A function that prints an event of watch.py and writes it into the log. In several processes process 0 does so,
    and prints those of other hosts with the number of the process."""

    def tell(event: Any) -> None:
        if link().first:
            display.say(f"warning: {event}")
        elif event.kind in OF_A_HOST and link().local_ranks[0] == link().rank:
            link().say(f"warning: {event}")
        log.event(event.record())

    return tell


@functools.cache
def _compiled() -> list[float]:
    """The seconds of each compilation from now on; jax appends to it."""
    seconds: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: seconds.append(duration) if event == COMPILED else None
    )
    return seconds


def peak_memory() -> tuple[str, float]:
    """("GPU", peak GiB of the fullest device) or, without device statistics, ("RAM", the program's peak GiB)."""
    stats = [d.memory_stats() for d in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return "GPU", max(peaks) / 2**30
    return "RAM", peak_host_memory()


def peak_host_memory() -> float:
    """Peak GiB of host memory of this process: Python, libraries and memory pinned for the devices."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def speed(step: TrainStep, batches: list[Arrays], padding: list[np.ndarray | None], seconds: float) -> dict[str, Any]:
    """Throughput over all positions that were computed, padding included. padding: for each batch, of its packed rows.
    Then it is over the tokens of documents; attention stays inside of them, or of the pack that is one text."""
    tokens, flops, packed = 0, 0, {}
    work = lambda lengths: sum(
        n * needed_flops(step.model, step.freeze, length)
        for length, n in zip(*map(np.ndarray.tolist, np.unique(lengths, return_counts=True)))
    )
    for batch, of_rows in zip(batches, padding):
        rows, length = batch["tokens"].shape
        tokens += rows * length
        if of_rows is None:
            flops += rows * needed_flops(step.model, step.freeze, length)
            continue
        packed["padding"] = packed.get("padding", 0) + int(of_rows.sum())
        flops += work(np.diff(batch["documents"])) - work(of_rows) if "documents" in batch else work(length - of_rows)
    tokens -= packed.get("padding", 0)
    peak, (place, gibibytes) = peak_flops(step.mesh.devices.flat[0].device_kind), peak_memory()
    return {
        "tokens": tokens,
        **packed,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / (peak * step.mesh.size) if peak else None,
        f"peak_{place.lower()}_gib": gibibytes,
    }


def compiled(values: dict[str, Any], batches: list[Arrays]) -> str:
    """A line about the programs that a step compiled."""
    lengths = " and ".join(map(str, sorted({batch["tokens"].shape[1] for batch in batches})))
    return f"step {values['step']}: {values['compilations']} programs compiled, for {lengths} tokens"


def summary(values: dict[str, Any]) -> str:
    """One line of a step's values."""
    memory = next(f"{k.split('_')[1].upper()} {v:.1f} GiB" for k, v in values.items() if k.startswith("peak_"))
    mfu = f"  MFU {values['mfu']:.0%}" if values["mfu"] is not None else ""
    return (
        f"loss {values['loss']:.4f}  grad {values['grad_norm']:.3f}  lr {values['learning_rate']:.2e}  "
        f"{values['tokens_per_second']:,.0f} tok/s{mfu}  {memory}"
    )
