"""The flags of a run and their checks. Imports no jax, so that `--help` is instant."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Annotated, Literal

import tyro

from alst_jax.data_flags import DataFlags
from alst_jax.watch_flags import WatchFlags


class UserError(Exception):
    """A user's mistake. The text has the given value, the rule, the fix and the flag; the command line exits with 2."""


IGNORED = -100  # the label of tokens without loss, as in Hugging Face

# ----------------------------------------------------------------------------------------------------------------- run


def parse_length(text: str) -> int:
    """`32768`, `32k` (x1000), `32Ki` (x1024), `1.5M`, `1Mi` -> tokens."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(k|K|M|Ki|Mi)?\s*", str(text))
    if match is None:
        raise ValueError(f"length {text!r}: write tokens as 32768, 32k (x1000), 32Ki (x1024), 1M or 1Mi")
    scale = {None: 1, "k": 10**3, "K": 10**3, "Ki": 2**10, "M": 10**6, "Mi": 2**20}[match[2]]
    value = float(match[1]) * scale
    if value < 1 or value != math.floor(value):
        raise ValueError(f"length {text!r} is {value:g} tokens: a length is a whole number of at least 1")
    return int(value)


_Length = Annotated[int, tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="TOKENS", instance_from_str=lambda args: parse_length(args[0]),
    is_instance=lambda x: isinstance(x, int), str_from_instance=lambda x: [str(x)])]


@dataclasses.dataclass
class TrainConfig(WatchFlags, DataFlags):
    """Train a Llama on long sequences.

    Without --model and --data a tiny Llama learns the Python language reference on four simulated devices.
    """

    model: str | None = None
    """Hugging Face directory or hub name, or a checkpoint made by convert.from_hf or an earlier run."""
    random_weights: bool = False
    """Draw the weights of --model at random on the devices, to measure a size without its weights: config.json is enough.
    Without a tokenizer beside it, a token is a byte. Exported only where --export is typed."""
    resize_vocabulary: bool = False
    """Give the model rows for tokens of its tokenizer beyond its vocabulary: each the mean of the old rows, in embedding
    and head. The exported config.json has the new size."""
    out: str | None = None
    """Output directory: checkpoints, metrics.jsonl, TensorBoard, and at the end hf/, a Hugging Face directory."""
    seq_len: _Length | None = None
    """Tokens per sequence: 32768, 32k (x1000) or 32Ki (x1024)."""

    dp: int | None = None
    """Data-parallel replicas. Default: all devices divided by --sp."""
    sp: int | None = None
    """Sequence-parallel (Ulysses) degree; divides the query heads. Default 1."""
    simulate_devices: int | None = None
    """Make this many CPU devices instead of using GPUs."""

    steps: int | None = None
    """Optimizer steps to train for in all, a resumed run's earlier steps included."""
    batch_size: int = 1
    """Sequences each data-parallel replica holds at a time."""
    grad_accum: int = 1
    """Batches whose gradients are summed for one optimizer step."""
    seed: int = 0
    """Order of the data and random initial weights."""

    learning_rate: float | None = None
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. Default: 5% of --steps."""
    final_learning_rate_ratio: float = 0.1
    """Learning rate at the last step, as a part of the peak (cosine and linear)."""
    weight_decay: float = 0.01
    """AdamW weight decay; norms and biases are spared."""
    beta1: float = 0.9
    """AdamW first-moment decay."""
    beta2: float = 0.999
    """AdamW second-moment decay."""
    eps: float = 1e-8
    """AdamW epsilon."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""
    freeze: str | None = None
    """Parameters whose dotted name matches this regular expression are not trained, for example
    `embed_tokens|lm_head`."""

    optimizer_states: Literal["float32", "bfloat16", "int8"] = "float32"
    """How AdamW's moments are stored; bfloat16 and int8 are rounded stochastically."""
    master_weights: Literal["float32", "low-bits", "none"] = "float32"
    """For bfloat16 weights: a float32 copy; the 16 missing bits (the same in 2 bytes less, but ties of weights round
    up); or stochastic rounding."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and compute; bfloat16 keeps what makes it float32 in the optimizer, see --master-weights.
    auto: bfloat16 on GPU, float32 on CPU."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over devices."""
    attention: Literal["auto", "flash", "cudnn", "xla"] = "auto"
    """Attention kernel: flash (flash-attn-4: Hopper, extra `flash`), cudnn (GPU), xla (tiled, any device). auto: the first
    of these that runs."""
    deterministic: bool = False
    """Sum gradients in a fixed order, so that two runs on the same GPUs give the same bits. Slower; not with cudnn."""
    tiled_loss: bool = True
    """Compute logits and loss in tiles of tokens instead of all at once."""
    loss_tile: _Length | None = None
    """Tokens per tile of logits. Default: about 1 GiB of float32 logits; --memory auto may take four times that."""
    tiled_mlp: bool = True
    """Compute the MLP in tiles of tokens."""
    mlp_tile: _Length | None = None
    """Tokens per MLP tile. Default: the hidden size; --memory auto may take four times that."""
    remat: bool = True
    """Recompute each layer in the backward pass instead of keeping its intermediates."""
    stack: Literal["segments", "plain"] = "segments"
    """segments: layers with a hand-written backward pass. plain: by jax.checkpoint alone, to compare with; its plans are
    those of segments of one layer."""
    offload_activations: bool = False
    """Keep each layer's input in host memory between forward and backward (needs --remat)."""
    offload_weights: bool = False
    """Keep weights and gradients in host memory, streamed one layer at a time."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory, streamed one layer at a time."""
    update_in_backward: bool = False
    """Update each layer as soon as its gradient is there: gradients are never stored. For weights and optimizer in host
    memory (--offload-weights --offload-optimizer), with --clip-norm 0 and --grad-accum 1. A gradient that is no finite
    number is met after later layers were updated: the run ends at its last checkpoint."""

    segment_layers: tuple[int, ...] = (1,)
    """Layers between two kept layer inputs; the inputs between them are computed again. One number, or one a
    segment."""
    keep_attention_on_device: int = 0
    """Layers, the last ones, whose attention output is kept, so that attention is not run again for them."""
    keep_attention_on_host: int = 0
    """Layers, those before them, whose attention output is kept in host memory."""
    head_chunks: int = 1
    """Groups of attention heads worked on one after the other, so that less memory is needed at a time."""
    save_every: int | None = None
    """Checkpoint every so many steps, besides the last one."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    memory: Literal["auto", "manual"] = "auto"
    """auto: on a GPU the fastest of the memory profiles that fit is chosen; flags that are typed are kept.
    manual: the flags alone."""
    allow_narrow_optimizer: bool = False
    """Let --memory auto also choose --optimizer-states and --master-weights, which change the result by rounding."""
    plan_only: bool = False
    """Print what a step needs, by part, and stop: allocates nothing, needs no --data and no --out."""
    plan_for: str | None = None
    """With --plan-only: plan for this machine instead of the one at hand: H100-80, 8xH100 or 4x8xH100 (4 hosts
    of 8)."""
    host_memory: float | None = None
    """GiB of host memory to use at most; with --plan-for, what each host has (default: what is usual for it)."""
    find_max_seq_len: bool = False
    """Find the longest sequence that fits, and stop; with --plan-for on another machine."""
    plan_picture: str | None = None
    """With --plan-only: draw the plan into this file (PNG, SVG, PDF); needs the extra `plot`."""
    json: bool = False
    """With --plan-only or --find-max-seq-len: one JSON object instead of a table."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint."""
    export: bool = True
    """Write OUT/hf at the end, which transformers loads."""
    typed: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Which of MEMORY_FIELDS were typed: `--memory auto` leaves them as they are."""

    @property
    def devices(self) -> int | None:
        """The number of devices of --dp and --sp; None for all."""
        return None if self.dp is None else self.dp * (self.sp or 1)

    @property
    def planning(self) -> bool:
        """Whether there is a plan to print and nothing to run."""
        return self.plan_only or self.find_max_seq_len


# The flags of a memory profile, which --memory auto chooses, each with two values that show whether it was typed.
MEMORY_FIELDS = {
    "tiled_loss": (True, False), "loss_tile": (None, 1), "tiled_mlp": (True, False), "mlp_tile": (None, 1),
    "remat": (True, False), "offload_activations": (True, False), "offload_weights": (True, False),
    "offload_optimizer": (True, False), "segment_layers": ((1,), (2,)), "keep_attention_on_device": (0, 1),
    "keep_attention_on_host": (0, 1), "head_chunks": (1, 2), "optimizer_states": ("float32", "int8"),
    "master_weights": ("float32", "none"),
}


def typed_fields(parse: Callable[[TrainConfig], TrainConfig], default: TrainConfig) -> tuple[str, ...]:
    """The MEMORY_FIELDS that the command line sets: their values do not depend on the defaults.

    parse(default) -> flags.
    """
    one, other = (parse(dataclasses.replace(default, **{name: values[i] for name, values in MEMORY_FIELDS.items()}))
                  for i in (0, 1))
    return tuple(name for name in MEMORY_FIELDS if getattr(one, name) == getattr(other, name))


def flag(field: str) -> str:
    """`seq_len` -> `--seq-len`."""
    return "--" + field.replace("_", "-")
