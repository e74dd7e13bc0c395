"""The memory flags and the memory profile: places of arrays, sizes of tiles, segments, kept arrays."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from alst_jax.declare import CHOSEN, AtLeast, Length, UserError, Words, default, flag, in_words, marked, too_small
from alst_jax.segments import DEVICE, HOST, Run, Segment


@dataclasses.dataclass(frozen=True)
class Switches:
    """The switches of a memory profile. They change memory and speed; only `reduce_dtype` changes results, by rounding.

    Default, check, help text and words of each field are declared here and nowhere else. A tile of None means untiled,
    0 the default size.
    """

    loss_tile: Annotated[
        Length | None,
        AtLeast(0),
        Words("tiled loss", off=None),
        CHOSEN,
        default("about 1 GiB of float32 logits; --memory auto may take four times that"),
    ] = 0
    """Tokens per tile of logits."""
    mlp_tile: Annotated[
        Length | None,
        AtLeast(0),
        Words("tiled MLP", off=None),
        CHOSEN,
        default("the hidden size; --memory auto may take four times that"),
    ] = 0
    """Tokens per MLP tile."""
    remat: Annotated[bool, Words("remat")] = True
    """Recompute each layer in the backward pass instead of keeping its intermediates."""
    offload_activations: Annotated[bool, Words("activations in host memory"), CHOSEN] = False
    """Keep each layer's input in host memory between forward and backward (needs --remat)."""
    offload_weights: Annotated[bool, Words("weights in host memory"), CHOSEN] = False
    """Keep weights and gradients in host memory, streamed one layer at a time."""
    offload_optimizer: Annotated[bool, Words("optimizer in host memory"), CHOSEN] = False
    """Keep optimizer state in host memory, streamed one layer at a time."""
    update_in_backward: Annotated[bool, Words("update in the backward pass")] = False
    """Update each layer as soon as its gradient is complete, so that gradients are never stored. Needs weights and
    optimizer in host memory (--offload-weights --offload-optimizer), --clip-norm 0 and --grad-accum 1. If a gradient
    is not finite, later layers are updated already: the run ends, and can be resumed from its last checkpoint."""
    segment_layers: Annotated[tuple[int, ...], AtLeast(1), Words("segments of {} layers", off=(1,)), CHOSEN] = (1,)
    """Layers of each segment. The input of a segment's first layer is kept; the inputs of its other layers are
    recomputed. One number for all segments, or one for each."""
    keep_attention_on_device: Annotated[int, AtLeast(0), Words("attention of {} layers kept", off=0), CHOSEN] = 0
    """Number of last layers whose attention output is kept on the device, so that it is not recomputed."""
    keep_attention_on_host: Annotated[int, AtLeast(0), Words("of {} kept in host memory", off=0), CHOSEN] = 0
    """Number of layers before them whose attention output is kept in host memory."""
    keep_qkv_on_device: Annotated[int, AtLeast(0), Words("q, k and v of {} kept", off=0), CHOSEN] = 0
    """Number of last layers whose queries, keys and values are kept on the device, so that they are not recomputed. At
    most --keep-attention-on-device."""
    keep_mlp_on_device: Annotated[int, AtLeast(0), Words("gate and up of {} kept", off=0), CHOSEN] = 0
    """Number of last layers whose gate and up (MLP, 2 x its size for each token) are kept on the device. At most
    --keep-qkv-on-device."""
    share_gradients: Annotated[bool, Words("inputs of segments in the memory of gradients"), CHOSEN] = False
    """Keep inputs of segments in the host memory of gradients that are not written yet. Needs weights and activations
    in host memory (--offload-weights --offload-activations)."""
    prefetch_activations: Annotated[bool, Words("activations read from host memory ahead"), CHOSEN] = False
    """In the backward pass, read the next layer's input and attention output from host memory while a layer is
    computed. They take device memory beside the layer's own."""
    rebuild_inputs_alone: Annotated[bool, Words("attention of rebuilt layers computed once more")] = False
    """When a segment is recomputed, hold only the inputs of its layers, not their attention outputs, which each layer
    then computes once more: less device memory, and a third forward pass of attention. For segments of several layers.
    --memory auto never sets it."""
    head_chunks: Annotated[int, AtLeast(1), Words("{} head chunks", off=1), CHOSEN] = 1
    """Number of groups of attention heads. Attention runs for one group after the other, which needs less memory."""
    stack: Literal["segments", "plain"] = "segments"
    """segments: layers with a hand-written backward pass. plain: jax.checkpoint, for comparison; it is planned like
    segments of one layer."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over devices."""

    def check(self, clip_norm: float = 0.0, grad_accum: int = 1) -> None:
        """UserError for switches that are wrong with any model and machine."""
        for message in too_small(self):
            raise UserError(message)
        if self.update_in_backward:
            self._check_update_in_backward(clip_norm, grad_accum)
        by_hand = [name for name in BY_HAND if getattr(self, name) != getattr(Switches, name)]
        recomputing = by_hand + ["offload_activations"] * self.offload_activations
        if recomputing and not self.remat:
            several = len(recomputing) > 1
            raise UserError(
                f"{', '.join(map(flag, recomputing))} {'are parts' if several else 'is a part'} of "
                f"rematerialisation; {'they need' if several else 'it needs'} --remat, not --no-remat"
            )
        if by_hand and self.stack == "plain":
            raise UserError(
                "--stack plain saves each layer's input and nothing else: "
                f"{', '.join(map(flag, by_hand))} needs --stack segments"
            )
        self._check_levels()
        if self.share_gradients and not self.can_share:
            raise UserError(
                "--share-gradients stores layer inputs in the host memory of gradients: it needs "
                "--offload-weights and --offload-activations, and gradients that are stored (no "
                "--update-in-backward)"
            )

    def _check_levels(self) -> None:
        arrays = "q, k and v keeps its attention output", "gate and up keeps its q, k and v"
        for (name, below), kept in zip(LEVELS.items(), arrays, strict=True):
            if (count := getattr(self, name)) > (most := getattr(self, below)):
                raise UserError(
                    f"{flag(name)} {count}: more than {flag(below)} {most}; a layer that keeps {kept} too, "
                    f"so use {flag(below)} {count} or more"
                )

    @property
    def sums_in_place(self) -> bool:
        """Whether gradients are added to the sums of earlier batches layer by layer, and never stored."""
        return self.remat and self.stack == "segments" and not self.share_gradients

    @property
    def can_share(self) -> bool:
        """Whether inputs of segments may be kept in the memory of gradients."""
        stored = self.offload_weights and not self.update_in_backward
        return stored and self.offload_activations and self.remat and self.stack == "segments"

    def _check_update_in_backward(self, clip_norm: float, grad_accum: int) -> None:
        for given, wrong in (
            ("--no-remat", not self.remat),
            (f"--grad-accum {grad_accum}", grad_accum != 1),
            (f"--clip-norm {clip_norm:g}", clip_norm != 0),
        ):
            if wrong:
                raise UserError(
                    f"--update-in-backward with {given}: a layer is updated before the other gradients are "
                    "known, so they can be neither clipped by their common norm nor summed over "
                    "batches; use --clip-norm 0, --grad-accum 1 and --remat with it"
                )
        if not (self.offload_weights and self.offload_optimizer):  # stacks there would be copied once for each loop
            raise UserError(
                "--update-in-backward saves the host memory of gradients; on the device it would save "
                "no memory. Use it with --offload-weights and --offload-optimizer, or leave it out"
            )

    def on_host(self, part: str) -> bool:
        """Whether "weights", "gradients" or "optimizer" live in host memory."""
        return self.offload_optimizer if part == "optimizer" else self.offload_weights

    def flags(self, than: "Switches | None" = None) -> Iterator[str]:
        """The flags by which these switches differ from others, by default from the usual ones."""
        than = Switches() if than is None else than
        for field in dataclasses.fields(Switches):
            value = getattr(self, field.name)
            if value == getattr(than, field.name):
                continue
            if field.name in TILES and not value:
                yield flag(TILES[field.name] if value == 0 else "no_" + TILES[field.name])
            elif isinstance(value, bool):
                yield flag(field.name if value else "no_" + field.name)
            else:
                yield f"{flag(field.name)} {in_words(value)}"

    def words(self) -> list[str]:
        """The features that are on, in words."""
        return [
            words.text.format(", ".join(map(str, value)) if isinstance(value, tuple) else value)
            for name, words in marked(Switches, Words).items()
            if (value := getattr(self, name)) != words.off
        ]


BY_HAND = (
    "segment_layers",
    "keep_attention_on_device",
    "keep_attention_on_host",
    "keep_qkv_on_device",
    "keep_mlp_on_device",
    "share_gradients",
    "prefetch_activations",
    "rebuild_inputs_alone",
    "update_in_backward",
)  # parts of the hand-written backward pass
# Arrays of the last layers that may be kept too, and the field that says of how many layers at most.
LEVELS = {"keep_qkv_on_device": "keep_attention_on_device", "keep_mlp_on_device": "keep_qkv_on_device"}
TILES = {"loss_tile": "tiled_loss", "mlp_tile": "tiled_mlp"}  # the size of a tile, and the flag that switches it off


@dataclasses.dataclass(frozen=True)
class MemoryFlags(Switches):
    """The memory of each array, and the sizes of tiles."""

    tiled_loss: bool = True
    """Compute logits and loss in tiles of tokens instead of all at once."""
    tiled_mlp: bool = True
    """Compute the MLP in tiles of tokens."""

    def profile(self, attention: Any, compute_dtype: str) -> "Profile":
        """The profile of these flags, with the attention kernel and the dtype that were chosen."""
        switches = {field.name: getattr(self, field.name) for field in dataclasses.fields(Switches)}
        untiled = {size: None for size, tiled in TILES.items() if not getattr(self, tiled)}
        return Profile(**switches | untiled, attention=attention, compute_dtype=compute_dtype)


@dataclasses.dataclass(frozen=True)
class Profile(Switches):
    """The memory flags of a step, with the kernel and the dtype of computation."""

    attention: Any = "xla"  # a kernel's name, or a Kernel (ops/attention)
    compute_dtype: str = "float32"

    def attention_place(self, layer: int, num_layers: int) -> str | None:
        """Where the attention output of this layer (from 0) is kept for the backward pass; None: it is recomputed.

        The backward pass begins with the last layers: theirs are on the device, then come those in host memory.
        """
        if layer >= num_layers - self.keep_attention_on_device:
            return DEVICE
        if layer >= num_layers - self.keep_attention_on_device - self.keep_attention_on_host:
            return HOST
        return None

    def segments(self, num_layers: int) -> list[Segment]:
        """The segments of the layers. Neighbouring segments of one layer that keep the same arrays are one segment."""
        lengths, start, segments = self.segment_layers, 0, []
        if len(lengths) == 1:
            lengths = [min(lengths[0], num_layers - at) for at in range(0, num_layers, lengths[0])]
        for length in lengths:
            run = self._run(start, start + length, num_layers)
            before = segments[-1] if segments else None
            if length == 1 and before and before.all_inputs and before.runs[0].saves == run.saves:
                segments[-1] = Segment(True, (self._run(before.runs[0].start, run.stop, num_layers),))
            else:
                segments.append(Segment(length == 1, tuple(self._runs(start, start + length, num_layers))))
            start += length
        return segments

    def _runs(self, start, stop, num_layers):
        first = start
        for layer in range(start + 1, stop + 1):
            run = self._run(first, layer, num_layers)
            if layer == stop or self._run(layer, layer + 1, num_layers).saves != run.saves:
                yield run
                first = layer

    def _run(self, start, stop, num_layers):
        """The layers start, ..., stop - 1, which all save what the first one saves."""
        among_last = lambda count: start >= num_layers - count
        return Run(
            start,
            stop,
            self.attention_place(start, num_layers),
            among_last(self.keep_qkv_on_device),
            among_last(self.keep_mlp_on_device),
        )
