"""A job: the optimizer step that a plan is made for, with the sizes and counts that follow from it.

B sequences a device, T tokens a device (B x S / seq), D hidden, F ffn, V vocabulary, L layers, N query heads, K kv
heads, H head dim.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.tree import dotted, is_stacked, names
from alst_jax.ops.attention import find_kernel
from alst_jax.parallel.costs import Shapes, Work
from alst_jax.parallel.ulysses import Ulysses
from alst_jax.profile import DEVICE, HOST, Profile, Segment, segment_inputs, shared_inputs
from alst_jax.stack.shared import holds


class Term(NamedTuple):
    """A line of a ledger: bytes or seconds, and the file, the program or the part of the machine that they come
    from."""

    name: str
    value: int | float
    where: str


def total(terms: list[Term]) -> int | float:
    """The sum of a ledger."""
    return sum(term.value for term in terms)


@dataclasses.dataclass(frozen=True)
class ParameterSizes:
    """Elements and numbers of parameters, of a whole model or of its trained parameters."""

    total: int
    layer: int  # elements of one layer
    layer_leaves: int  # parameters of one layer
    other_leaves: int  # parameters that are not stacked: the tables, the last norm
    tables: int  # elements of the embedding and the head; a tied table counts once
    head: int  # elements of the head's table
    largest_stack: int  # elements of the largest parameter of the layers, all layers together
    largest: int  # elements of the largest parameter


@functools.cache
def parameter_sizes(model: ModelConfig, freeze: str | None = None) -> ParameterSizes:
    """Sizes from the abstract parameters. freeze: leave out parameters whose dotted name this pattern matches."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model, jnp.float32))
    trained = [(names(path), is_stacked(path), leaf) for path, leaf in leaves
               if freeze is None or not re.search(freeze, dotted(path))]
    stacks = [leaf.size for _, stacked, leaf in trained if stacked]
    others = [(name, leaf) for name, stacked, leaf in trained if not stacked]
    head = "embed_tokens" if model.tie_word_embeddings else "lm_head"
    return ParameterSizes(
        total=sum(leaf.size for _, _, leaf in trained), layer=sum(stacks) // model.num_layers, layer_leaves=len(stacks),
        other_leaves=len(others), tables=sum(leaf.size for _, leaf in others if leaf.ndim > 1),
        head=sum(leaf.size for name, leaf in others if name[0] == head), largest_stack=max(stacks, default=0),
        largest=max((leaf.size for _, _, leaf in trained), default=0))


@functools.cache
def tokens_in_gradients(model: ModelConfig, freeze: str | None, devices: int) -> int:
    """Tokens whose hidden states have room in the gradients of one layer, in one device's shards (stack/shared.py)."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model, jnp.float32))
    stacks = [leaf.shape for path, leaf in leaves
              if is_stacked(path) and (freeze is None or not re.search(freeze, dotted(path)))]
    shards = [(layers, math.prod(rest) // devices, 1) for layers, *rest in stacks
              if len(rest) == 2 and any(dim % devices == 0 for dim in rest)]
    return sum(shard[1] // model.hidden_size for shard in shards if holds(shard, model.hidden_size))


@dataclasses.dataclass(frozen=True)
class Job:
    """One optimizer step: `grad_accum` batches of `rows` sequences of `length` tokens over dp x sp devices.

    freeze: a regular expression; parameters whose dotted name (`layers.mlp.up_proj.kernel`) it matches are not trained.
    documents: packed documents of a data-parallel replica at most; 0: not packed. attention_share: the pairs of a query
    and a key in the documents, as a part of those in whole sequences.
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

    @property
    def devices(self) -> int:
        return self.dp * self.sp

    @property
    def tokens(self) -> int:
        """Tokens of one device."""
        return self.rows * self.length // self.devices

    @property
    def flops(self) -> float:
        """Model FLOPs of the step, of packed documents those inside of them (see `ModelConfig.flops_per_sequence`)."""
        model = self.model
        outside = (1 - self.attention_share) * 12.0 * model.causal_pairs(self.length) * model.num_heads * model.head_dim
        return self.grad_accum * self.rows * (model.flops_per_sequence(self.length) - outside)

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
        return self.parameters if self.freeze is None else parameter_sizes(self.model, self.freeze)

    @functools.cached_property
    def sizes(self) -> "Sizes":
        return Sizes.of(self)

    @functools.cached_property
    def attention(self) -> Shapes:
        """One layer's attention, as its sequence parallelism counts it."""
        model = self.model
        return Shapes(self.sizes.heads, self.sizes.kv, model.num_heads, model.num_kv_heads, self.sp,
                      self.profile.head_chunks, 4 // self.width)

    @functools.cached_property
    def attention_work(self) -> Work:
        return Ulysses.work(self.attention)

    @functools.cached_property
    def segments(self) -> list[Segment]:
        return self.profile.segments(self.model.num_layers)

    @functools.cached_property
    def shared_inputs(self) -> int:
        """Inputs of segments that are kept in the memory of gradients."""
        if not self.profile.share_gradients:
            return 0
        room = tokens_in_gradients(self.model, self.freeze, self.devices)
        return len(shared_inputs(self.segments, self.tokens, room))

    @functools.cached_property
    def recomputed_attention(self) -> list[int]:
        """Layers whose attention the backward pass computes again, in a rebuilt segment or in the layer's own turn."""
        runs = [run for segment in self.segments for run in segment.runs if self.profile.remat and not run.place]
        return [layer for run in runs for layer in range(run.start, run.stop)]

    @functools.cached_property
    def kept(self) -> dict[str, int]:
        return kept_bytes(self)

    @functools.cached_property
    def passes(self) -> "Passes":
        return Passes.of(self)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes, on one device, of the arrays that plans count."""

    hidden: int  # [B, T, D]
    heads: int  # [B, T, N, H]
    kv: int  # [B, T, K, H]
    statistics: int  # float32 [B, T, N], of a kernel that returns them
    layer: int  # one layer's weights, gathered
    table: int  # the head's table, gathered
    rope: int  # both tables of each rotary embedding, float32

    @staticmethod
    def of(job: Job) -> "Sizes":
        model, tokens = job.model, job.tokens
        per_token = lambda columns: tokens * columns * job.width
        return Sizes(
            hidden=per_token(model.hidden_size), heads=per_token(model.num_heads * model.head_dim),
            kv=per_token(model.num_kv_heads * model.head_dim),
            statistics=tokens * model.num_heads * 4 if job.profile.attention != "xla" else 0,
            layer=job.parameters.layer * job.width, table=job.parameters.head * job.width,
            rope=tokens * model.head_dim * 4 * len(model.ropes))


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often one forward and backward pass does something, summed over the layers."""

    attention_forward: int
    projections: int  # of q, k and v, forward
    after_attention: int  # output projection and MLP, forward
    loads: int  # a layer's weights brought to the device or gathered

    @staticmethod
    def of(job: Job) -> "Passes":
        layers, profile = job.model.num_layers, job.profile
        if not profile.remat:
            again = layers if profile.mlp_tile is not None else 0
            return Passes(layers, layers, layers + again, layers)
        rebuilt = sum(segment.runs[-1].stop - segment.runs[0].start - 1
                      for segment in job.segments if not segment.all_inputs)
        again = len(job.recomputed_attention)
        return Passes(layers + again, 3 * layers + again, 2 * layers + rebuilt, 2 * layers + rebuilt)


# ------------------------------------------------------------------------------------------------------ saved residuals


def kept_bytes(job: Job) -> dict[str, int]:
    """Bytes that the forward pass saves for the backward pass, by place."""
    size, profile = job.sizes, job.profile
    kept = {DEVICE: 0, HOST: 0}
    if not profile.remat:
        kept[DEVICE] = job.model.num_layers * unremat_layer(job)
        return kept
    inputs = HOST if profile.offload_activations else DEVICE
    kept[inputs] += size.hidden * segment_inputs(job.segments, profile.offload_activations, job.shared_inputs)
    for segment in job.segments:
        layers = segment.runs[-1].stop - segment.runs[0].start
        if segment.all_inputs:
            kept[place_of(inputs, layers)] += size.hidden * layers
        for run in segment.runs:
            if run.place:
                count = run.stop - run.start
                kept[place_of(run.place, count)] += outputs_bytes(job, count)
    return kept


def outputs_bytes(job: Job, layers: int) -> int:
    """The attention outputs that a run of layers saves; a single layer's also transposed for its swap over devices."""
    return layers * (job.sizes.heads + job.sizes.statistics) + (layers == 1) * job.attention_work.lone_output_copy


def place_of(place: str, layers: int) -> str:
    """Where a loop over some layers saves arrays. One trip makes no loop: the compiler removes copies to the host and
    back that have no loop between them."""
    return DEVICE if layers == 1 else place


def unremat_layer(job: Job) -> int:
    """Bytes that differentiation saves of a layer without remat; a tiled MLP and the norms are recomputed."""
    size = job.sizes
    kept = 2 * size.hidden + 2 * size.heads + 2 * size.kv + size.statistics
    if job.profile.mlp_tile is None:
        kept += 4 * size.hidden // job.model.hidden_size * job.model.intermediate_size
    return kept


def padded_length(seq_len: int, sp: int, profile: Profile) -> int:
    """seq_len, rounded up to what the mesh and the attention kernel divide; the rest is padding without labels."""
    multiple = math.lcm(sp, find_kernel(profile.attention).multiple)
    return -(-seq_len // multiple) * multiple
