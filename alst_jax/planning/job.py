"""A job: the optimizer step that a plan is made for, with the sizes and counts that follow from it.

B sequences a device, T tokens a device (B x S / seq), D hidden, F ffn, V vocabulary, L layers, N query heads, K kv
heads, H head dim.
"""

import dataclasses
import functools
import shlex
from typing import NamedTuple

from alst_jax.models.config import ModelConfig
from alst_jax.models.sizes import ParameterSizes, needed_flops, parameter_sizes, trained_sizes
from alst_jax.models.tiles import Tiles, tile_sizes
from alst_jax.ops.tiling import even_tile
from alst_jax.parallel.costs import Shapes, Work
from alst_jax.parallel.ulysses import Ulysses
from alst_jax.profile import DEVICE, HOST, Profile
from alst_jax.segments import Run, Segment, place_of, segment_inputs, shared_inputs
from alst_jax.stack.shared import holds

_even_tile = functools.cache(even_tile)


class Term(NamedTuple):
    """A line of a ledger: bytes or seconds, and their origin: a file, a program or a part of the machine."""

    name: str
    value: int | float
    where: str


def total(terms: list[Term]) -> int | float:
    """The sum of a ledger."""
    return sum(term.value for term in terms)


class Sizes(NamedTuple):
    """Bytes, on one device, of the arrays that plans count."""

    hidden: int  # [B, T, D]
    heads: int  # [B, T, N, H]
    kv: int  # [B, T, K, H]
    gated: int  # gate and up, [B, T, 2 F]
    statistics: int  # float32 [B, T, N], of a kernel that returns them
    layer: int  # one layer's weights, gathered
    table: int  # the head's table, gathered
    rope: int  # both tables of each rotary embedding, float32


class Passes(NamedTuple):
    """How often one forward and backward pass does something, summed over the layers."""

    attention_forward: int
    projections: int  # of q, k and v, forward
    after_attention: int  # output projection and MLP, forward
    loads: int  # a layer's weights brought to the device or gathered
    gate_and_up_known: int = 0  # of `after_attention`, those that read gate and up instead of computing them


@dataclasses.dataclass(frozen=True)
class Job:
    """One optimizer step: `grad_accum` batches of `rows` sequences of `length` tokens over dp x sp devices.

    freeze: a regular expression; parameters whose dotted name (`layers.mlp.up_proj.kernel`) it matches are not trained.
    documents: packed documents of a data-parallel replica at most; 0: not packed. attention_share: the pairs of a query
    and a key in the documents and in the padding, as a part of those in whole sequences. padding, padding_share: the
    padding's part of the tokens, and of those pairs.
    """

    model: ModelConfig
    profile: Profile
    rows: int
    length: int
    dp: int = 1
    sp: int = 1
    grad_accum: int = 1
    states: str = "float32"
    master: str = "float32"
    count_workspace: bool = True  # of the attention kernel
    freeze: str | None = None
    documents: int = 0
    attention_share: float = 1.0
    padding: float = 0.0
    padding_share: float = 0.0

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on all devices; of packs without their padding."""
        return round(self.grad_accum * self.rows * self.length * (1 - self.padding))

    @property
    def devices(self) -> int:
        return self.dp * self.sp

    @property
    def tokens(self) -> int:
        """Tokens of one device."""
        return self.rows * self.length // self.devices

    @property
    def flops(self) -> float:
        """Model FLOPs of the step; of packs those of the tokens of documents and of attention inside of documents (see
        `needed_flops`)."""
        model = self.model
        attention = 12.0 * model.causal_pairs(self.length) * model.num_heads * model.head_dim
        others = needed_flops(model, self.freeze, self.length) - attention
        inside = self.attention_share - self.padding_share
        return self.grad_accum * self.rows * (others * (1 - self.padding) + attention * inside)

    @property
    def width(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.profile.compute_dtype == "bfloat16" else 4

    @functools.cached_property
    def parameters(self) -> ParameterSizes:
        return parameter_sizes(self.model)

    @functools.cached_property
    def trained(self) -> ParameterSizes:
        """Sizes of the parameters that have gradients and optimizer states."""
        return trained_sizes(self.model, self.freeze)

    @functools.cached_property
    def sizes(self) -> Sizes:
        model, parameters = self.model, self.parameters
        per_token = lambda columns: self.tokens * columns * self.width
        return Sizes(
            hidden=per_token(model.hidden_size),
            heads=per_token(model.num_heads * model.head_dim),
            kv=per_token(model.num_kv_heads * model.head_dim),
            gated=per_token(2 * model.intermediate_size),
            statistics=self.tokens * model.num_heads * 4 if self.profile.attention != "xla" else 0,
            layer=parameters.layer * self.width + parameters.adapters // model.num_layers * (4 - self.width),
            table=parameters.head * self.width,
            rope=self.tokens * model.head_dim * 4 * len(model.ropes),
        )

    @functools.cached_property
    def tiles(self) -> Tiles:
        """Tokens of a tile of the loss and of the token-wise parts of a layer; untiled: the tokens of the device."""
        tiles, tokens = tile_sizes(self.profile, self.model), self.tokens
        return Tiles(
            tokens if tiles.loss is None else min(tiles.loss, tokens),
            tokens if tiles.mlp is None else min(_even_tile(tokens, tiles.mlp), tokens),
        )

    @functools.cached_property
    def attention(self) -> Shapes:
        """One layer's attention, as its sequence parallelism counts it."""
        size, heads = self.sizes, (self.model.num_heads, self.model.num_kv_heads)
        return Shapes(size.heads, size.kv, *heads, self.sp, self.profile.head_chunks, 4 // self.width)

    @functools.cached_property
    def attention_work(self) -> Work:
        return Ulysses.work(self.attention)

    @functools.cached_property
    def segments(self) -> list[Segment]:
        return self.profile.segments(self.model.num_layers)

    @functools.cached_property
    def shared_inputs(self) -> int:
        """Inputs of segments that are kept in the memory of gradients (stack/shared.py)."""
        if not self.profile.share_gradients:
            return 0
        n, hidden = self.devices, self.model.hidden_size
        shards = [rows * columns // n for rows, columns in self.trained.matrices if rows % n == 0 or columns % n == 0]
        room = sum(shard // hidden for shard in shards if holds((1, shard, 1), hidden))
        return len(shared_inputs(self.segments, self.tokens, room))

    @property
    def sums_in_place(self) -> bool:
        """Whether gradients of several batches are summed without storing one batch's gradients beside the sums."""
        return self.grad_accum > 1 and self.profile.sums_in_place

    @functools.cached_property
    def rebuilt(self) -> list[int]:
        """Layers that are computed again before the backward pass of their segment: all but the segment's last."""
        return [n for segment in self.segments if self.profile.remat for n in segment.rebuilt]

    @functools.cached_property
    def recomputed_attention(self) -> list[int]:
        """Layers whose attention the backward pass computes again: in a rebuilt segment or in the layer's own turn, or,
        where segments hold their inputs alone, in both, and then twice here."""
        runs = [run for segment in self.segments for run in segment.runs if self.profile.remat and not run.place]
        found = [layer for run in runs for layer in range(run.start, run.stop)]
        return sorted(found + [n for n in self.rebuilt if self.profile.rebuild_inputs_alone and n in found])

    @functools.cached_property
    def passes(self) -> Passes:
        layers, profile = self.model.num_layers, self.profile
        if not profile.remat:
            return Passes(layers, layers, layers * (1 if profile.mlp_tile is None else 2), layers)
        again, qkv, mlp = len(self.recomputed_attention), profile.keep_qkv_on_device, profile.keep_mlp_on_device
        known = mlp + sum(layer >= layers - mlp for layer in self.rebuilt)
        twice = 2 * layers + len(self.rebuilt)
        return Passes(layers + again, 3 * layers + again - qkv, twice, twice, known)

    @functools.cached_property
    def kept(self) -> dict[str, int]:
        """Bytes that the forward pass saves for the backward pass, by place."""
        profile = self.profile
        if not profile.remat:
            return {DEVICE: self.model.num_layers * self._unremat_layer(), HOST: 0}
        kept = {place: sum(self.saved(segment)[place] for segment in self.segments) for place in (DEVICE, HOST)}
        rows = segment_inputs(self.segments, profile.offload_activations, self.shared_inputs)
        kept[HOST if profile.offload_activations else DEVICE] += self.sizes.hidden * rows
        return kept

    def saved(self, segment: Segment) -> dict[str, int]:
        """Bytes that the forward pass saves of a segment by place: all inputs, if it keeps them, and its runs' arrays.
        Its first input alone is a row of an array of all segments."""
        saved, inputs = {DEVICE: 0, HOST: 0}, HOST if self.profile.offload_activations else DEVICE
        if segment.all_inputs:
            saved[place_of(inputs, segment.layers)] += self.sizes.hidden * segment.layers
        for run in segment.runs:
            if run.place:
                saved[run.memory] += self._run_bytes(run)
        return saved

    @property
    def reads_ahead(self) -> bool:
        """Whether a loop of the backward pass reads rows from host memory one layer ahead."""
        return any(self.read_ahead(segment)[0] for segment in self.segments)

    def read_ahead(self, segment: Segment) -> tuple[int, int]:
        """Bytes that loops of the backward pass read from host memory one layer ahead: of one layer; of all layers but
        the first of each loop, which waits for its own."""
        if not self.profile.prefetch_activations:
            return 0, 0
        size, inputs = self.sizes, segment.all_inputs and self.profile.offload_activations
        row = lambda run: inputs * size.hidden + (run.memory == HOST) * (size.heads + size.statistics)
        stop = segment.stop if segment.all_inputs else segment.stop - 1  # a rebuilt segment's last layer is in no loop
        loops = [(row(run), layers) for run in segment.runs if (layers := min(run.stop, stop) - run.start) > 1]
        return max((row for row, _ in loops), default=0), sum(row * (layers - 1) for row, layers in loops)

    def _run_bytes(self, run: Run) -> int:
        """The attention outputs that a run of layers saves, a single layer's also transposed for its swap; on the
        device with them q, k, v, gate and up."""
        copy = self.attention_work.lone_output_copy * (run.layers == 1)
        return run.layers * (self.sizes.heads + self.sizes.statistics + self.level_bytes(run.qkv, run.mlp)) + copy

    def level_bytes(self, qkv: bool, mlp: bool) -> int:
        """One layer's q, k and v, and gate and up, where they are kept."""
        return (self.sizes.heads + 2 * self.sizes.kv) * qkv + self.sizes.gated * mlp

    def _unremat_layer(self) -> int:
        """Bytes that differentiation saves of a layer without remat; a tiled MLP and the norms are recomputed."""
        size, model = self.sizes, self.model
        untiled = 4 * size.hidden // model.hidden_size * model.intermediate_size * (self.profile.mlp_tile is None)
        return 2 * size.hidden + 2 * size.heads + 2 * size.kv + size.statistics + untiled

    def changed(self, **changes) -> "Job":
        """The job with other fields of its profile."""
        return dataclasses.replace(self, profile=dataclasses.replace(self.profile, **changes))


def describe(job: Job) -> str:
    """The choices of a job as flags."""
    model, words = job.model, list(job.profile.flags())
    for word, applies in (
        ("--clip-norm 0", job.profile.update_in_backward),
        (f"--optimizer-states {job.states}", job.states != "float32"),
        (f"--master-weights {job.master}", job.master != "float32"),
        (f"--freeze {shlex.quote(job.freeze or '')}", job.freeze is not None),
        (f"--lora-rank {model.lora and model.lora.rank}", model.lora is not None),
        (f"--lora-dropout {model.dropout:g}", model.dropout),
        (f"--debug-attention-layers {model.attention_layers}", model.attention_layers is not None),
    ):
        words += [word] if applies else []
    return " ".join(words) or "nothing offloaded, every layer's input kept"


def describe_debug(model: ModelConfig) -> str:
    """The warning of a model whose later layers have no attention."""
    return (
        f"DEBUG   attention runs in {model.attention_layers} of {model.num_layers} layers "
        "(--debug-attention-layers): planned bytes are those of a full run (docs/log.md compares them with "
        "measured ones), seconds are not; losses and weights are meaningless, and nothing is saved or exported"
    )
