"""A plan as data, shown as a table, one JSON object, a line or a picture; and the choice of a job with its plan."""

import dataclasses
import json

from alst_jax.config import UserError
from alst_jax.hardware.machines import GIB, LARGEST_HOST
from alst_jax.planning.job import Job, describe
from alst_jax.storage import saving

COMPILED, ABSENT, ESTIMATED = "compiled", "compiled for a device that is not here", "estimated"
PARTS = ("weights", "gradients", "optimizer", "kept activations", "working set", "batch", "saving")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One optimizer step. Bytes of one device, and of host memory for that device; FLOPs and tokens of the whole mesh.

    source: COMPILED by the compiler of the devices at hand, ABSENT for devices that are not here, ESTIMATED by the cost
    model. collectives: name -> calls a step and bytes that one device sends in them; in a compiled plan also the
    `instructions` in the program, of which those in a loop run once a trip. seconds: by term; empty where the machine
    is not known. Limits are None where nobody knows them (CPU).
    """

    source: str
    device_kind: str
    device: dict[str, int]
    host: dict[str, int]
    device_limit: int | None
    host_limit: int | None
    flops: float
    collectives: dict[str, dict[str, int]]
    seconds: dict[str, float]
    tokens: int
    devices: int = 1

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def pinned_bytes(self) -> int:
        return pinned(self.host_bytes, self.devices)

    @property
    def step_seconds(self) -> float | None:
        return sum(self.seconds.values()) or None

    @property
    def limiting_term(self) -> str | None:
        """The largest term of the predicted time."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else None

    @property
    def lacks(self) -> dict[str, int]:
        return self.missing()

    def missing(self, margin: float = 0.0, more_on_host: int = 0) -> dict[str, int]:
        """Bytes that are missing of "device" and "host" memory, where a part of each, `margin`, must stay free."""
        places = {
            "device": (self.device_bytes, self.device_limit),
            "host": (self.pinned_bytes + more_on_host, self.host_limit),
        }
        over = {place: need - int(limit * (1 - margin)) for place, (need, limit) in places.items() if limit is not None}
        return {place: bytes for place, bytes in over.items() if bytes > 0}

    def to_json(self) -> str:
        """One JSON object: the fields and the properties. Bytes are integers."""
        return json.dumps(
            dataclasses.asdict(self)
            | {
                "device_bytes": self.device_bytes,
                "host_bytes": self.host_bytes,
                "headroom": None if self.device_limit is None else self.device_limit - self.device_bytes,
                "step_seconds": self.step_seconds,
                "tokens_per_second": self.tokens / self.step_seconds if self.step_seconds else None,
                "limiting_term": self.limiting_term,
                "fits": not self.lacks,
            }
        )

    def table(self) -> str:
        """For people, in GiB."""
        cell = lambda bytes: f"{'':12}" if bytes is None else f"{bytes / GIB:12.2f}"
        row = lambda name, pair: f"{name:24}" + "".join(map(cell, pair))
        limits, pinned = (self.device_limit, self.host_limit), (self.device_bytes, self.pinned_bytes)
        rows = [f"{self.source}, for {self.devices} x {self.device_kind}", f"{'':24}{'device GiB':>12}{'host GiB':>12}"]
        rows += [row(*part) for part in self._parts()]
        rows.append(row("total", (self.device_bytes, self.host_bytes)))
        if limits != (None, None):
            spare = (limit and limit - need for limit, need in zip(limits, pinned))
            rows += [row("limit", limits), row("headroom", spare)]
        sent = (
            f"{calls['calls']} {name} ({calls['bytes'] / GIB:.2f} GiB"
            + (f", {calls['instructions']} in the program)" if "instructions" in calls else ")")
            for name, calls in self.collectives.items()
            if calls["calls"]
        )
        rows.append(f"collectives a step, with the bytes that a device sends: {', '.join(sent) or 'none'}")
        rows.append(f"model FLOPs a step: {self.flops:.3e}; tokens {self.tokens:,}")
        if self.step_seconds:
            longest_first = sorted(self.seconds, key=self.seconds.get, reverse=True)
            terms = ", ".join(f"{name} {self.seconds[name]:.1f}" for name in longest_first)
            rows.append(f"predicted: {self.speed_line()} ({terms} s)")
        return "\n".join(rows)

    def _parts(self) -> list[tuple[str, tuple[int, int]]]:
        """The parts with their bytes on the device and in host memory, in the order of PARTS."""
        both = self.device, self.host
        return [
            (name, tuple(part.get(name, 0) for part in both)) for name in PARTS if any(name in part for part in both)
        ]

    def speed_line(self) -> str:
        """Seconds, tokens a second and the limiting term, on one line."""
        speed = self.tokens / self.step_seconds
        return f"{self.step_seconds:.1f} s a step, {speed:,.0f} tok/s, limited by {self.limiting_term}"

    def line(self) -> str:
        """The plan in one line."""
        of = lambda need, limit: f"{need / GIB:.1f}" + (f" of {limit / GIB:.1f}" if limit is not None else "") + " GiB"
        device, host = of(self.device_bytes, self.device_limit), of(self.host_bytes, self.host_limit)
        return f"{self.source}: device {device}, host {host}" + (f"; {self.speed_line()}" if self.step_seconds else "")

    def picture(self, file: str) -> None:
        """A stacked bar each for device and host memory, with their limits. UserError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UserError(
                "--plan-picture draws with matplotlib, which is not installed; install the extra `plot`, "
                "or leave the flag out"
            ) from error
        figure = Figure(figsize=(7, 5))
        axes, bottoms = figure.subplots(), [0.0, 0.0]
        for part, pair in self._parts():
            if any(pair):
                heights = [bytes / GIB for bytes in pair]
                axes.bar(("one device", "its host memory"), heights, bottom=bottoms, label=part)
                bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
        for x, limit in enumerate((self.device_limit, self.host_limit)):
            if limit is not None:
                axes.hlines(limit / GIB, x - 0.45, x + 0.45, colors="black", linestyles="dashed")
        axes.set(ylabel="GiB", title=f"{self.tokens:,} tokens, {self.devices} x {self.device_kind} ({self.source})")
        axes.legend(loc="upper right", fontsize="small")
        try:
            figure.savefig(file)
        except (OSError, ValueError) as error:
            raise UserError(f"--plan-picture {file}: {error}") from error


def pinned(host_bytes: int, devices: int) -> int:
    """Bytes of host memory that jax pins, which the limit is of: all but the buffers of a save's writers."""
    return max(0, host_bytes - saving.BUFFERS // min(devices, LARGEST_HOST))


@dataclasses.dataclass(frozen=True)
class Choice:
    """A job whose profile was chosen, and its plan. next_faster: a faster job, its plan, and the bytes it lacks."""

    job: Job
    plan: Plan
    next_faster: tuple[Job, Plan, dict[str, int]] | None = None

    def explain(self) -> str:
        """One paragraph: the choice, and the bytes that the next faster choice lacks."""
        text = f"memory: {describe(self.job)}; {self.plan.speed_line()}."
        if self.next_faster is None:
            return text + " No choice that was tried would be faster."
        job, plan, missing = self.next_faster
        changes = ", ".join(job.profile.flags(than=self.job.profile))
        return text + f" The next faster choice, with {changes} ({plan.step_seconds:.1f} s), lacks {in_gib(missing)}."


def in_gib(bytes_by_place: dict[str, int], sign: str = "") -> str:
    """`1.5 GiB of device memory and 2.0 GiB of host memory`; with the sign "+" `+1.5 GiB`."""
    return " and ".join(f"{value / GIB:{sign}.1f} GiB of {place} memory" for place, value in bytes_by_place.items())
