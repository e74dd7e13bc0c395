"""Watches a run: numbers that look wrong, steps that take too long, memory that runs out, GPUs that slow down.

An event is one line with its cause and the action, and a record of metrics.jsonl with the key "event". Losses and
gradient norms are judged between a step's gradient and its update, so that a step can be left out. Throughput is judged
only if a step takes a second or more: times of shorter steps vary with the other work of the machine.
"""

import collections
import dataclasses
import functools
import math
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from alst_jax.hardware.host_limits import host_memory
from alst_jax.processes.hang import FIRST, HUNG
from alst_jax.processes.link import link
from alst_jax.watch_flags import WatchFlags

WINDOW, ENOUGH = 50, 10  # steps whose median is usual, and how many of them must be there
# A standard deviation is no less than this part of the median loss, and than this in the logarithm of the norm.
FLOORS = {"loss": 0.01, "grad_norm": 0.1}
TINY = 1e-30
SHORTEST = 1.0  # seconds of a step whose time is judged
STALLED, LEAST_STALL = 5.0, 60.0  # times the usual seconds, and seconds, after which a step in progress has stalled
# A run in several processes ends after so many times the longest of the last steps, and so many seconds at least: a
# collective may wait for ever. A new length of rows is compiled in its first step.
LEAST_HUNG = 300.0
SLOWER = 0.7  # of the best throughput
LEFT, LEFT_AGAIN = 0.03, 0.06  # part of host memory: less is an event, and after more than the second one again
ASK_GPU = 60.0  # seconds between two looks at the GPUs' clocks
REASONS = {  # of nvidia-smi: why a GPU's clock is held down. A power cap at full load is usual and not asked for.
    "clocks_throttle_reasons.hw_thermal_slowdown": "it is too hot",
    "clocks_throttle_reasons.sw_thermal_slowdown": "it is hot",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "its power supply is short",
}


@dataclasses.dataclass(frozen=True)
class Event:
    """kind: "nonfinite", "spike", "stall", "memory", "throughput" or "throttled". step: the step in which it
    was seen."""

    kind: str
    step: int
    cause: str
    action: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.kind}: {self.cause}; {self.action}"

    def record(self) -> dict[str, Any]:
        return {"step": self.step, "event": self.kind, "cause": self.cause, "action": self.action}


def limits_of(planned: float | None, several_lengths: bool) -> tuple[float, float]:
    """(limit of each of the first two steps, which include compilation; least limit of each later step), in seconds.

    planned: seconds of a step by the plan. several_lengths: any step may include compilation,
    and be slower than earlier steps.
    """
    first = FIRST + HUNG * (planned or 0.0)
    return first, first if several_lengths else max(LEAST_HUNG, HUNG * (planned or 0.0))


class Watch:
    """tell(event): prints or records an event; a separate thread calls it for a stalled step. on_gpu: whether
    nvidia-smi is asked. give_up(words): ends the run where a step in progress takes HUNG times as long as the longest.
    By default it ends all processes of a run of several; a single process has no limit. limits:
    see `limits_of`."""

    def __init__(
        self,
        config: WatchFlags,
        tell: Callable[[Event], None],
        on_gpu: bool = False,
        clock=time.monotonic,
        give_up: Callable[[str], None] | None = None,
        limits: tuple[float, float] = (FIRST, LEAST_HUNG),
    ):
        self.config, self.tell, self._clock, self._give_up = config, tell, clock, give_up
        self._limits = limits
        if give_up is None and link().several:
            self._give_up = functools.partial(link().failed, code=1)
        self._values = {name: collections.deque(maxlen=WINDOW) for name in FLOORS}
        self._seconds, self._rates = (collections.deque(maxlen=ENOUGH) for _ in range(2))
        self._best, self._memory_low, self._asked = 0.0, False, -math.inf
        self._nvidia_smi = shutil.which("nvidia-smi") if on_gpu else None
        self._began, self._step = None, 0  # of the step in progress
        self._done, self._thread = threading.Event(), None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    # ---------------------------------------------------------------------------------------------- loss and gradient

    def judge(self, step: int, values: dict[str, Any]) -> str | None:
        """Why a step must not be applied; None if it may. values: "loss" and "grad_norm"."""
        for name, floor in FLOORS.items():
            value, usual = values[name], [old for _, old in self._values[name]]
            if len(usual) < ENOUGH:
                continue
            if name == "grad_norm":  # norms vary by factors: a short batch has several times the usual one
                value, usual, least = math.log(max(value, TINY)), [math.log(max(x, TINY)) for x in usual], floor
            else:
                least = floor * abs(statistics.median(usual))
            median = statistics.median(usual)
            spread = 1.4826 * statistics.median(abs(x - median) for x in usual)  # of a normal distribution
            deviations = (value - median) / max(spread, least, TINY)
            if deviations > self.config.spike_deviations:
                words = "loss" if name == "loss" else "gradient norm"
                median = math.exp(median) if name == "grad_norm" else median
                cause = (
                    f"{words} {values[name]:.4g} is {deviations:.1f} standard deviations above {median:.4g}, the "
                    f"median of {len(usual)} steps"
                )
                if self.config.on_spike != "warn":
                    return cause
                self.tell(Event("spike", step, cause, "the step is applied (--on-spike)"))
                break
        for name, usual in self._values.items():
            usual.append((step, values[name]))
        return None

    def rewind(self, step: int) -> None:
        """Forget the values of the steps after this one."""
        self._began = None
        for name, usual in self._values.items():
            self._values[name] = collections.deque((pair for pair in usual if pair[0] <= step), maxlen=WINDOW)

    # ------------------------------------------------------------------------------------------------ time and machine

    def begin(self, step: int) -> None:
        """A step begins."""
        self._step, self._began = step, self._clock()

    def rest(self) -> None:
        """No step is in progress."""
        self._began = None

    def end(self, values: dict[str, Any]) -> None:
        """A step is done. values: its "seconds" and "tokens_per_second"."""
        self._began = None
        self._check_throughput(values)
        self._seconds.append(values["seconds"])
        self._check_memory()
        self._check_gpus()

    def _check_throughput(self, values):
        self._rates.append(values["tokens_per_second"])
        if values["seconds"] < SHORTEST or len(self._rates) < ENOUGH:
            return
        now = statistics.median(self._rates)
        if now < SLOWER * self._best:
            self.tell(
                Event(
                    "throughput",
                    self._step,
                    f"{now:,.0f} tokens/s, the median of {ENOUGH} steps, after "
                    f"{self._best:,.0f}: another process, a hot GPU or a slow disk",
                    "none",
                )
            )
            self._best = now  # one line for each fall
        self._best = max(self._best, now)

    def _check_memory(self):
        left, total = memory_left(), host_memory()
        if left < LEFT * total and not self._memory_low:
            self._memory_low = True
            self.tell(
                Event(
                    "memory",
                    self._step,
                    f"{left / 2**30:.1f} of {total / 2**30:.1f} GiB of host memory are "
                    "left; the kernel kills processes when none is left",
                    "none; end other processes, or resume with a smaller plan (--host-memory)",
                )
            )
        self._memory_low &= left < LEFT_AGAIN * total

    def _check_gpus(self):
        if self._nvidia_smi is None or self._clock() - self._asked < ASK_GPU:
            return
        self._asked = self._clock()
        for gpu, reason in throttled(self._nvidia_smi):
            cause = f"GPU {gpu} has slowed its clock: {reason}"
            self.tell(Event("throttled", self._step, cause, "none; check its cooling"))

    def _look(self):
        """The thread that watches the seconds of the step in progress."""
        told = None
        while not self._done.wait(1.0):
            began, step = self._began, self._step
            if began is None:
                continue
            seconds = self._clock() - began
            if len(self._seconds) < 2:  # the first steps are compiled
                if self._give_up is not None and seconds > self._limits[0]:
                    self._give_up(
                        f"gives up: step {step}, one of the first two, has run for {seconds:.0f} s: a "
                        "collective that hangs"
                    )
                continue
            usual = statistics.median(self._seconds)
            longest = max(self._seconds)
            if self._give_up is not None and seconds > max(self._limits[1], HUNG * longest):
                self._give_up(
                    f"gives up: step {step} has run for {seconds:.0f} s, and the longest of the last ones "
                    f"took {longest:.1f} s: a collective that hangs"
                )
            if step != told and seconds > max(LEAST_STALL, STALLED * usual):
                told = step
                self.tell(
                    Event(
                        "stall",
                        step,
                        f"it has run for {seconds:.0f} s, and {usual:.1f} s are usual: a device "
                        "or a collective that hangs, or memory that is swapped",
                        "none; if it does not end, kill the process and go on with --resume",
                    )
                )


def memory_left() -> int:
    """Bytes of host memory that this process may still take."""
    return min(psutil.virtual_memory().available, host_memory() - psutil.Process().memory_info().rss)


def throttled(nvidia_smi: str) -> list[tuple[str, str]]:
    """(GPU, reason) for each GPU whose clock is held down."""
    command = [nvidia_smi, f"--query-gpu=index,{','.join(REASONS)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):  # no answer is no event
        return []
    found = [[part.strip() for part in line.split(",")] for line in lines]
    return [
        (gpu, reason) for gpu, *states in found for state, reason in zip(states, REASONS.values()) if state == "Active"
    ]
