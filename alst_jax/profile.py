"""A memory profile: where things live and how much is worked on at a time. Data, not code; every switch is
independent."""

import dataclasses
from typing import Any, Literal

DEVICE, HOST = "device", "pinned_host"  # jax's names of memory kinds

@dataclasses.dataclass(frozen=True)
class Profile:
    """Each switch changes memory and speed, never the result. None for a tile means untiled; 0 the default size."""

    loss_tile: int | None = 0
    mlp_tile: int | None = 0
    remat: bool = True
    offload_activations: bool = False
    offload_weights: bool = False
    offload_optimizer: bool = False
    segment_layers: tuple[int, ...] = (1,)  # layers between two kept inputs: of each segment, or one for all alike
    keep_attention_on_device: int = 0  # last layers whose attention output and log-sum-exp are kept
    keep_attention_on_host: int = 0  # layers before those that keep them in host memory
    update_in_backward: bool = False  # each layer as soon as its gradient is there; gradients are never stored
    head_chunks: int = 1  # groups of heads that are worked on one after the other
    attention: Any = "xla"  # a kernel's name, or a Kernel (ops/attention)
    stack: Literal["segments", "plain"] = "segments"  # plain: the reference twin, stack/plain.py
    compute_dtype: str = "float32"
    reduce_dtype: str = "float32"

    def attention_place(self, layer: int, num_layers: int) -> str | None:
        """Where the attention output of this layer (of 0, 1, ...) is kept for the backward pass; None: it is made
        again.

        The last layers are the first to be needed again, so the device is theirs; the first are not kept.
        """
        if layer >= num_layers - self.keep_attention_on_device:
            return DEVICE
        if layer >= num_layers - self.keep_attention_on_device - self.keep_attention_on_host:
            return HOST
        return None

    def segments(self, num_layers: int) -> list["Segment"]:
        """The layers, cut where their inputs are kept. Neighbours of one layer each that are alike make one."""
        lengths, start, segments = self.segment_layers, 0, []
        if len(lengths) == 1:
            lengths = [min(lengths[0], num_layers - at) for at in range(0, num_layers, lengths[0])]
        for length in lengths:
            run = Run(start, start + length, self.attention_place(start, num_layers))
            before = segments[-1] if segments else None
            if length == 1 and before and before.all_inputs and before.runs[0].place == run.place:
                segments[-1] = Segment(True, (Run(before.runs[0].start, run.stop, run.place),))
            else:
                segments.append(Segment(length == 1, tuple(self._runs(start, start + length, num_layers))))
            start += length
        return segments

    def _runs(self, start, stop, num_layers):
        first = start
        for layer in range(start + 1, stop + 1):
            place = self.attention_place(first, num_layers)
            if layer == stop or self.attention_place(layer, num_layers) != place:
                yield Run(first, layer, place)
                first = layer


@dataclasses.dataclass(frozen=True)
class Run:
    """Layers start, ..., stop - 1, whose attention outputs are all kept in one place."""

    start: int
    stop: int
    place: str | None


@dataclasses.dataclass(frozen=True)
class Segment:
    """Neighbouring layers of which either all inputs are kept or the first one's, from which the others are rebuilt."""

    all_inputs: bool
    runs: tuple[Run, ...]


def segment_inputs(segments: list[Segment], on_host: bool) -> int:
    """Rows of the array in which the inputs of segments are kept; that of the first is looked up again instead."""
    count = sum(not segment.all_inputs for segment in segments[1:])
    # A single one would not be moved to the host, for copies there and back with no loop between cancel out.
    return 2 if count == 1 and on_host else count
