"""The flags of a run and their checks. Imports no jax, so that `--help` is instant."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import tyro

from alst_jax.flags import RecordFlags


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
class TrainConfig(RecordFlags):
    """Train a Llama on long sequences.

    Without --model and --data a tiny Llama learns the Python language reference on four simulated devices.
    """

    model: str | None = None
    """Hugging Face directory or hub name, or a checkpoint made by convert.from_hf or an earlier run."""
    data: tuple[str, ...] = ()
    """JSONL, JSON or Parquet files, text files, or directories of them."""
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
    """Parameters whose dotted name matches this regular expression are not trained: `embed_tokens|lm_head`."""

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
    attention: Literal["auto", "flash", "cudnn", "tokamax", "xla"] = "auto"
    """Attention kernel: flash (flash-attn-4) or tokamax (its forward with cudnn's backward), both for Hopper and with the
    extra of that name; cudnn (GPU); xla (tiled, any device). auto: cudnn on GPU, else xla."""
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
    """Layers between two kept layer inputs; those between are computed again. One number, or one a segment."""
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
    """With --plan-only: plan for this machine instead of the one at hand: H100-80, 8xH100 or 4x8xH100 (4 hosts of 8)."""
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
    eval_data: str | None = None
    """Held-out file or directory to evaluate on."""
    eval_every: int | None = None
    """Evaluate every so many steps, besides the end."""
    export: bool = True
    """Write OUT/hf at the end, which transformers loads."""
    text_field: str = "text"
    """Field of a JSON or Parquet record that holds a document."""
    messages_field: str = "messages"
    """Field of a JSON or Parquet record that holds a chat."""
    pack: bool = False
    """Several documents in one sequence: not supported yet, refused."""
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


def check_run(config: TrainConfig) -> None:
    """UserError for flags that are wrong with any model, data and machine."""
    _check_numbers(config)
    _check_update_in_backward(config)
    for wrong, message in _mistakes(config):
        if wrong:
            raise UserError(message)


AT_LEAST = dict(
    keep_attention_on_device=0, keep_attention_on_host=0, head_chunks=1, dp=1, sp=1, simulate_devices=1, steps=1,
    batch_size=1, grad_accum=1, warmup_steps=0, save_every=1, keep_checkpoints=1, eval_every=1, weight_decay=0,
    clip_norm=0, seed=0, show_samples=1)


def _check_numbers(config: TrainConfig) -> None:
    for field, least in AT_LEAST.items():
        value = getattr(config, field)
        if value is not None and not value >= least:
            raise UserError(f"{flag(field)} {value}: must be at least {least}")
    if not config.segment_layers or min(config.segment_layers) < 1:
        raise UserError(f"--segment-layers {' '.join(map(str, config.segment_layers))}: must be at least 1 each")
    if config.seed >= 2**32:
        raise UserError(f"--seed {config.seed}: must be below 2^32")
    for field in ("learning_rate", "eps"):
        value = getattr(config, field)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag(field)} {value}: must be a positive number")
    for field, value in dataclasses.asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag(field)} {value}: must be a finite number")
    for field in ("beta1", "beta2"):
        if not 0 <= getattr(config, field) < 1:
            raise UserError(f"{flag(field)} {getattr(config, field)}: must be at least 0 and below 1")


def _check_update_in_backward(config: TrainConfig) -> None:
    if not config.update_in_backward:
        return
    for given, wrong in (
            ("--no-remat", not config.remat), (f"--grad-accum {config.grad_accum}", config.grad_accum != 1),
            (f"--clip-norm {config.clip_norm:g}", config.clip_norm != 0)):
        if wrong:
            raise UserError(f"--update-in-backward with {given}: a layer is updated before the other gradients are "
                            "known, so that they can be neither clipped by their common norm nor summed over batches; "
                            "use --clip-norm 0, --grad-accum 1 and --remat with it")
    if not (config.offload_weights and config.offload_optimizer):
        raise UserError("--update-in-backward saves the host memory of gradients; on the device it would save none. "
                        "Use it with --offload-weights and --offload-optimizer, or leave it out")


def _mistakes(config: TrainConfig) -> Iterator[tuple[Any, str]]:
    """(whether the flags are wrong, message) for each rule."""
    yield (not 0 <= config.final_learning_rate_ratio <= 1,
           f"--final-learning-rate-ratio {config.final_learning_rate_ratio}: must be between 0 and 1")
    yield (config.steps is not None and config.warmup_steps is not None and config.warmup_steps > config.steps,
           f"--warmup-steps {config.warmup_steps} is more than --steps {config.steps}")
    yield (config.offload_activations and not config.remat,
           "--offload-activations offloads what rematerialisation keeps; it needs --remat, not --no-remat")
    yield (config.pack, "--pack: packing several documents into one sequence is not supported yet; leave it out, and "
                        "each document gets sequences of its own")
    yield (config.eval_every is not None and config.eval_data is None,
           "--eval-every needs --eval-data, the file to evaluate on")
    yield (config.template_date is not None and not re.fullmatch(r"\d{4}-\d\d-\d\d", config.template_date),
           f"--template-date {config.template_date}: write a date as 2026-11-27")
    yield config.resume and config.out is None, "--resume needs --out, the directory of the run to continue"
    yield (config.plan_for is not None and not config.plan_for.strip(),
           "--plan-for '': name a machine, as in H100-80 or 8xH100")
    for field in ("json", "plan_for", "plan_picture"):
        yield (getattr(config, field) and not config.planning,
               f"{flag(field)} is for --plan-only and --find-max-seq-len; a run has the machine it is on")
    yield (config.host_memory is not None and not config.host_memory > 0,
           f"--host-memory {config.host_memory}: must be a positive number of GiB")
    yield (config.plan_for and config.simulate_devices,
           "--plan-for names the machine and --simulate-devices another; leave one of them out")
    yield (config.find_max_seq_len and config.seq_len is not None,
           f"--find-max-seq-len looks for what --seq-len {config.seq_len} says; leave one of them out")
    yield (config.allow_narrow_optimizer and config.memory == "manual",
           "--allow-narrow-optimizer is for --memory auto; with manual, say --optimizer-states and --master-weights")
    yield (config.planning and config.resume,
           "--plan-only or --find-max-seq-len with --resume: plan the run with its own flags and --model on its "
           "directory")
    yield (config.model is not None and not config.data and not config.planning,
           "--model without --data: name the files to train on (--data FILE_OR_DIR...)")
    for tile, tiled in (("loss_tile", "tiled_loss"), ("mlp_tile", "tiled_mlp")):
        yield (getattr(config, tile) is not None and not getattr(config, tiled),
               f"{flag(tile)} has no meaning with {flag('no_' + tiled)}; leave one of them out")


def flag(field: str) -> str:
    """`seq_len` -> `--seq-len`."""
    return "--" + field.replace("_", "-")
