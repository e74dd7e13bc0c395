"""Traces of a few steps (--profile-steps), and the time that each named scope of xla/scopes.py takes in them."""

import collections
import contextlib
import dataclasses
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator

import jax
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from alst_jax.config import parse_steps
from alst_jax.processes.link import link
from alst_jax.xla.scopes import SCOPES, TO_DEVICE, TO_HOST

ROWS = 16  # printed
OTHER, IDLE = "no scope", "idle"
COPIES = {"MemcpyH2D": TO_DEVICE, "MemcpyD2H": TO_HOST}  # what a GPU's trace calls them
MEANING = SCOPES | {IDLE: "no operation ran"}
CONTAINERS = {"while", "conditional", "call"}  # operations whose time is spent in the operations inside
_LAST_SCOPE = re.compile(rf".*(?:^|[/(])({'|'.join(map(re.escape, SCOPES))})(?=[/)]|$)")


@dataclasses.dataclass
class StepProfile:
    """The trace of steps first, ..., last of a run, in a directory that TensorBoard and Perfetto read. None: no
    trace."""

    steps: tuple[int, int] | None
    directory: pathlib.Path
    traced: int = 0
    tracing: bool = False

    @staticmethod
    def of(flag: str | None, out: str | pathlib.Path | None) -> "StepProfile":
        """flag: --profile-steps. out: the run directory. Of several processes, the first traces."""
        flag = flag if link().first else None
        return StepProfile(flag and parse_steps(flag), pathlib.Path(out or ".") / "profile")

    @contextlib.contextmanager
    def step(self, number: int, say: Callable[[str], None] = print) -> Iterator[None]:
        """Around step `number`. After the last traced step the table is printed."""
        if self.steps is None or not self.steps[0] <= number <= self.steps[1]:
            yield
            return
        if not self.tracing:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python functions would be most of the file
            jax.profiler.start_trace(str(self.directory), profiler_options=options)
            self.tracing = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        self.traced += 1
        if number == self.steps[1]:
            self.close(say)

    def done(self, flag: str | None, say: Callable[[str], None] = print) -> None:
        """Warn, after the last step of a run, if it made none of those steps. flag: --profile-steps."""
        if self.steps is not None and not self.traced:
            say(f"warning: --profile-steps {flag}: the run made no such step")

    def close(self, say: Callable[[str], None] = print) -> None:
        """End the trace if it is not ended, and print its table."""
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False
            try:
                text = table(read(newest(self.directory)), self.traced)
            except (OSError, ValueError) as error:  # a run does not end because of its trace
                text = f"warning: no table of the profiled steps: {error}"
            say(f"{text}\nthe trace is in {self.directory}")


def newest(directory: pathlib.Path) -> pathlib.Path:
    """The newest trace below a directory."""
    found = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{directory} holds no trace")
    return found[-1]


def read(trace: pathlib.Path) -> dict[str, float]:
    """Seconds of all operations of a trace by scope, a mean over devices; and, as `idle`, of the time between the first
    and the last operation in which a device ran none."""
    raw = trace.read_bytes()
    operations, seconds, spans = _operations(raw), collections.Counter(), collections.defaultdict(list)
    with warnings.catch_warnings():  # as an error, this one of jaxlib's types ends the process on Python 3.12
        warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
        events = list(_events(jax.profiler.ProfileData.from_serialized_xspace(raw)))
    for device, label, operation, (start, duration) in events:
        opcode, path = operations.get(operation, ("", ""))
        if opcode not in CONTAINERS:
            spans[device].append((start, start + duration))
            scope = scope_of(path)
            seconds[COPIES.get(label, scope) if scope == OTHER else scope] += duration
    if spans:  # a trace without operations has no row
        seconds[IDLE] = sum(map(idle, spans.values()))
    return {scope: total / len(spans) for scope, total in seconds.most_common()}


def idle(spans: list[tuple[float, float]]) -> float:
    """The length of the gaps between spans (start, end), which may overlap."""
    spans, gaps = sorted(spans), 0.0
    end = spans[0][1] if spans else 0.0
    for start, stop in spans:
        gaps, end = gaps + max(0.0, start - end), max(end, stop)
    return gaps


def scope_of(path: str) -> str:
    """The innermost scope in the path of an operation: `jit(f)/jvp(layer/mlp)/while/body/dot_general` ->
    `layer/mlp`."""
    found = _LAST_SCOPE.match(path)
    return found[1] if found else OTHER


def table(seconds: dict[str, float], steps: int) -> str:
    """Rows of name, milliseconds of a step and share, longest first. Operations of one device may overlap in time."""
    total = sum(seconds.values()) or 1.0
    rows = [f"{'scope':18}{'ms a step':>12}{'share':>8}   of the operations of one device, in {steps} steps"]
    for scope, value in list(seconds.items())[:ROWS]:
        row = f"{scope:18}{value / max(1, steps) * 1e3:12.2f}{value / total:8.1%}   {MEANING.get(scope, '')}"
        rows.append(row.rstrip())
    return "\n".join(rows)


def _events(profile: jax.profiler.ProfileData) -> Iterator[tuple[str, str, tuple[str, str], tuple[float, float]]]:
    """(device, label, (program, operation), (start, duration) in seconds) of each operation that ran."""
    for plane in profile.planes:
        on_gpu = plane.name.startswith("/device:GPU")
        if not on_gpu and plane.name != "/host:CPU":
            continue
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                # The threads of a CPU run other work too; each device's operations name it.
                device = plane.name if on_gpu else stats.get("device_ordinal")
                if on_gpu or (device is not None and "hlo_op" in stats):
                    names = str(stats.get("hlo_module", "")), str(stats.get("hlo_op", ""))
                    yield str(device), event.name, names, (event.start_ns / 1e9, event.duration_ns / 1e9)


# ----------------------------------------------------------------------- the compiled programs that a trace has with it


def _operations(raw: bytes) -> dict[tuple[str, str], tuple[str, str]]:
    """(program, operation) -> (opcode, path of named scopes), from the programs in the trace.

    A trace is an XSpace (xplane.proto of the TSL profiler) and holds each program as an HloProto (hlo.proto of XLA).
    Their fields are read by number, without the messages' classes.
    """
    found = {}
    for plane in _fields(raw, 1):
        if b"/host:metadata" not in _fields(plane, 2):
            continue
        for entry in _fields(plane, 4):  # of the map event_metadata
            for stat in (stat for event in _fields(entry, 2) for stat in _fields(event, 5)):
                for module in (module for program in _fields(stat, 6) for module in _fields(program, 1)):
                    name = _fields(module, 1)[0].decode()
                    for instruction in (i for computation in _fields(module, 3) for i in _fields(computation, 2)):
                        opcode, path = (_fields(instruction, 2) or [b""])[0], b""
                        for metadata in _fields(instruction, 7):
                            path = (_fields(metadata, 2) or [b""])[0]
                        found[name, _fields(instruction, 1)[0].decode()] = opcode.decode(), path.decode()
    return found


def _fields(message: bytes, number: int) -> list[bytes]:
    """The values of a field of a serialized protobuf message."""
    return [field.data for field in UnknownFieldSet(Empty.FromString(message)) if field.field_number == number]
