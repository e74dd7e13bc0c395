"""Segments: neighbouring layers of which one input is kept. Runs: layers of a segment that save the same."""

import dataclasses

DEVICE, HOST = "device", "pinned_host"  # jax's names of memory kinds


@dataclasses.dataclass(frozen=True)
class Run:
    """Layers start, ..., stop - 1, which save the same. place: of their attention outputs. qkv, mlp: whether q, k and
    v, and gate and up, are kept on the device."""

    start: int
    stop: int
    place: str | None
    qkv: bool = False
    mlp: bool = False

    @property
    def saves(self) -> tuple[str | None, bool, bool]:
        return self.place, self.qkv, self.mlp

    @property
    def layers(self) -> int:
        return self.stop - self.start

    @property
    def memory(self) -> str | None:
        """The memory in which the program keeps the outputs (`place_of`)."""
        return self.place and place_of(self.place, self.layers)


def place_of(place: str, layers: int) -> str:
    """Where a loop over some layers saves arrays. One trip makes no loop: the compiler removes copies to the host and
    back that have no loop between them."""
    return DEVICE if layers == 1 else place


@dataclasses.dataclass(frozen=True)
class Segment:
    """Neighbouring layers. All inputs are kept, or the first layer's input, from which the others are recomputed."""

    all_inputs: bool
    runs: tuple[Run, ...]

    @property
    def start(self) -> int:
        return self.runs[0].start

    @property
    def stop(self) -> int:
        return self.runs[-1].stop

    @property
    def layers(self) -> int:
        return self.stop - self.start

    @property
    def rebuilt(self) -> range:
        """Layers that are computed again before the segment's backward pass: all but the last, if inputs are not
        kept."""
        return range(self.start, self.start if self.all_inputs else self.stop - 1)

    @property
    def loops(self) -> bool:
        """Whether the backward pass loops over layers. A rebuilt segment's last layer is outside of a loop."""
        stop = self.rebuilt.stop if self.rebuilt else self.stop
        return any(min(run.stop, stop) - run.start > 1 for run in self.runs)


def segment_inputs(segments: list[Segment], on_host: bool, shared: int = 0) -> int:
    """Rows of the array in which the inputs of segments are kept. The first segment's input is embedded again instead.
    shared: the number of inputs that are kept in the memory of gradients."""
    count = sum(not segment.all_inputs for segment in segments[1:]) - shared
    # A single row would not be moved to the host: the copies to the host and back cancel without a loop between.
    return 2 if count == 1 and on_host else count


def shared_inputs(segments: list[Segment], tokens: int, per_layer: int) -> dict[int, int]:
    """The first layer in whose gradients' memory each segment's input of `tokens` tokens is kept, by the number of the
    segment. per_layer: tokens for which one layer's gradients have room.

    The backward pass reads a segment's input before it writes the gradients of the segment's last layer. So the input
    may lie in the rows of this layer and of all layers before it. The last segments, whose inputs are read first, come
    first.
    """
    if per_layer == 0 or tokens <= per_layer:  # one trip makes no loop: the copies to the host would cancel out
        return {}
    layers, free, found = -(-tokens // per_layer), segments[-1].runs[-1].stop, {}
    for number in range(len(segments) - 1, 0, -1):
        first = min(free, segments[number].runs[-1].stop) - layers
        if not segments[number].all_inputs and first >= 0:
            found[number] = free = first
    return found
