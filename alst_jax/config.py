"""The flags of a run and their checks. Imports no jax, so that `--help` is instant."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Literal

import tyro

from alst_jax.data_flags import DataFlags
from alst_jax.declare import CHOSEN, AtLeast, Length, UserError, command_line, default, marked
from alst_jax.extend_flags import ExtendFlags
from alst_jax.lora_flags import LoraFlags
from alst_jax.process_flags import ProcessFlags
from alst_jax.profile import MemoryFlags
from alst_jax.watch_flags import WatchFlags

IGNORED = -100  # the label of tokens without loss, as in Hugging Face
DEFAULT_LEARNING_RATE = 1e-5  # of a run with --model; the demo has its own

# --------------------------------------------------------------------------------------------------------------- groups


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """The model, the length of a sequence, and the directory of the run."""

    model: Annotated[str | None, default("a tiny Llama with random weights")] = None
    """Hugging Face directory or hub name, or a checkpoint made by convert.from_hf or an earlier run."""
    random_weights: bool = False
    """Draw the weights of --model at random, to measure speed and memory: --model needs only a config.json. Without a
    tokenizer beside it, each byte is a token. The model is exported only if --export is typed."""
    resize_vocabulary: bool = False
    """Add rows to embedding and head for tokens of the tokenizer beyond the model's vocabulary. Each new row is the
    mean of the old rows. The exported config.json has the new size."""
    out: Annotated[str | None, default("none; without --model runs/DATE-TIME")] = None
    """Output directory: checkpoints, metrics.jsonl, TensorBoard, and at the end hf/, a Hugging Face directory."""
    seq_len: Annotated[Length | None, default("none; without --model 2048")] = None
    """Tokens per sequence: 32768, 32k (x1000) or 32Ki (x1024)."""
    lengths: Annotated[tuple[Length, ...], default("--seq-len alone")] = ()
    """Lengths of sequences, as in 32k 128k; the longest is --seq-len. Each batch is padded to the smallest length that
    holds its sequences. One program is compiled for each length."""


@dataclasses.dataclass(frozen=True)
class DeviceFlags:
    """How many devices, and how they share a step."""

    dp: Annotated[int | None, AtLeast(1), default("all devices divided by --sp")] = None
    """Data-parallel replicas."""
    sp: Annotated[int | None, AtLeast(1), default("1; without --model 4")] = None
    """Sequence-parallel (Ulysses) degree; divides the query heads."""
    simulate_devices: Annotated[int | None, AtLeast(1), default("the GPUs; without --model dp x sp")] = None
    """Make this many CPU devices instead of using GPUs."""


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    """Steps, learning rate, AdamW."""

    steps: Annotated[int | None, AtLeast(1), default("once through the data; without --model 80")] = None
    """Number of optimizer steps in all, with the earlier steps of a resumed run."""
    batch_size: Annotated[int, AtLeast(1)] = 1
    """Sequences each data-parallel replica holds at a time."""
    grad_accum: Annotated[int, AtLeast(1)] = 1
    """Batches whose gradients are summed for one optimizer step."""
    samples_per_step: Annotated[int | None, AtLeast(1), default("dp x --batch-size x --grad-accum")] = None
    """Sequences of one optimizer step on all devices, instead of --grad-accum, which becomes N / (dp x --batch-size).
    ALST's loader takes dp x sp x accumulation."""
    seed: Annotated[int, AtLeast(0)] = 0
    """Order of the data and random initial weights."""

    learning_rate: Annotated[float | None, default(f"{DEFAULT_LEARNING_RATE:g}; without --model 0.003")] = None
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up."""
    warmup_steps: Annotated[int | None, AtLeast(0), default("5% of --steps")] = None
    """Steps of linear warm-up."""
    final_learning_rate_ratio: float = 0.1
    """Learning rate at the last step / peak learning rate (cosine and linear)."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.01
    """AdamW weight decay; not applied to norms and biases."""
    beta1: float = 0.9
    """AdamW first-moment decay."""
    beta2: float = 0.999
    """AdamW second-moment decay."""
    eps: float = 1e-8
    """AdamW epsilon."""
    clip_norm: Annotated[float, AtLeast(0)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""
    freeze: Annotated[str | None, default("all are trained")] = None
    """Parameters whose dotted name matches this regular expression are not trained, for example
    `embed_tokens|lm_head`."""


@dataclasses.dataclass(frozen=True)
class NumberFlags:
    """Number formats, and the attention kernel."""

    optimizer_states: Annotated[Literal["float32", "bfloat16", "int8"], CHOSEN] = "float32"
    """How AdamW's moments are stored; bfloat16 and int8 are rounded stochastically."""
    master_weights: Annotated[Literal["float32", "low-bits", "none"], CHOSEN] = "float32"
    """The optimizer's copy of bfloat16 weights. float32: in float32. low-bits: only the 16 bits that bfloat16 lacks, 2
    bytes less and as exact, but a weight halfway between two bfloat16 numbers is rounded up. none: no copy; updates are
    rounded stochastically."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and computation. For bfloat16 weights the optimizer keeps a copy, see --master-weights.
    auto: bfloat16 on GPU, float32 on CPU."""
    attention: Literal["auto", "flash", "cudnn", "xla"] = "auto"
    """Attention kernel: flash (flash-attn-4: Hopper, extra `flash`), cudnn (GPU), xla (tiled, any device). auto: on a
    GPU flash where it runs, else cudnn; xla on a CPU."""
    deterministic: bool = False
    """Sum gradients in a fixed order, so that two runs on the same GPUs give the same bits. Slower; not with cudnn."""


@dataclasses.dataclass(frozen=True)
class SavingFlags:
    """Checkpoints, a resumed run, the exported model."""

    save_every: Annotated[int | None, AtLeast(1), default("the last step alone")] = None
    """Steps between two checkpoints. The last step is always saved."""
    keep_checkpoints: Annotated[int, AtLeast(1)] = 2
    """Number of checkpoints to keep; older ones are deleted."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint."""
    export: Annotated[bool, default("True; with --random-weights False")] = True
    """Write OUT/hf at the end, which transformers loads."""


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """Memory and time of a step, before it runs."""

    memory: Literal["auto", "manual"] = "auto"
    """auto: on a GPU, choose the fastest memory profile that fits; typed flags are kept.
    manual: use only typed flags."""
    allow_narrow_optimizer: bool = False
    """Let --memory auto also choose --optimizer-states and --master-weights, which change the result by rounding."""
    plan_only: bool = False
    """Print the bytes of a step by part, and stop: allocates nothing, needs no --data and no --out."""
    plan_for: Annotated[str | None, default("the machine at hand")] = None
    """With --plan-only: plan for this machine instead of the one at hand: H100-80, 8xH100 or 4x8xH100 (4 hosts
    of 8)."""
    host_memory: Annotated[float | None, default("the host's; with --plan-for, the usual size")] = None
    """GiB of host memory to use at most; with --plan-for, of each host."""
    find_max_seq_len: bool = False
    """Find the longest sequence that fits, and stop; with --plan-for on another machine."""
    plan_picture: Annotated[str | None, default("no picture")] = None
    """With --plan-only: draw the plan into this file (PNG, SVG, PDF); needs the extra `plot`."""
    json: bool = False
    """With --plan-only or --find-max-seq-len: one JSON object instead of a table."""
    explain_run: Annotated[str | None, default("none")] = None
    """Print the record beside the newest checkpoint of this run (or beside this checkpoint), and stop: flags,
    versions, git revision, devices, plan, kernels."""
    explain: bool = False
    """With --plan-only: list the terms that sum to the plan's bytes and seconds."""


@dataclasses.dataclass(frozen=True)
class InspectionFlags:
    """Where the time and the memory of a run go."""

    debug_attention_layers: Annotated[int | None, AtLeast(1), default("all")] = None
    """Compute attention in the first N layers only, to measure the memory of a long run in minutes. Losses and
    weights are meaningless; nothing is saved or exported."""
    profile_steps: Annotated[str | None, default("none")] = None
    """Trace these steps (3:5, or 3 alone, counted from 1) into OUT/profile, and print where their time went."""


# ----------------------------------------------------------------------------------------------------------------- run


@dataclasses.dataclass(frozen=True)
class TrainConfig(
    InspectionFlags,
    PlanFlags,
    WatchFlags,
    SavingFlags,
    NumberFlags,
    MemoryFlags,
    LoraFlags,
    TrainingFlags,
    ProcessFlags,
    DeviceFlags,
    ExtendFlags,
    DataFlags,
    ModelFlags,
):
    """Train a Llama on long sequences.

    Without --model and --data a tiny Llama learns the Python language reference on four simulated devices.
    """

    typed: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """The typed flags that --memory auto would choose otherwise."""

    def __post_init__(self):
        if self.lengths and self.seq_len is None:
            object.__setattr__(self, "seq_len", max(self.lengths))  # of a frozen dataclass

    @property
    def devices(self) -> int | None:
        """The number of devices of --dp and --sp; None for all."""
        return None if self.dp is None else self.dp * (self.sp or 1)

    @property
    def planning(self) -> bool:
        """Whether the command prints a plan and runs nothing."""
        return self.plan_only or self.find_max_seq_len


GROUPS: dict[str, type] = {
    base.__name__.removesuffix("Flags").lower(): base for base in reversed(TrainConfig.__bases__)
}
"""The groups of `--help`, in their order."""


def parse_flags(arguments: list[str]) -> tuple[TrainConfig, set[str]]:
    """(the flags, the fields that were typed). The parser runs once; `--help` prints the groups and exits."""
    grouped = dataclasses.make_dataclass(
        "Flags",
        [
            (name, tyro.conf.OmitArgPrefixes[group], dataclasses.field(default_factory=group))
            for name, group in GROUPS.items()
        ],
    )
    parsed = command_line(grouped, args=arguments, description=TrainConfig.__doc__)
    values = {name: value for group in GROUPS for name, value in vars(getattr(parsed, group)).items()}
    fields = {field.name: field.name for field in dataclasses.fields(TrainConfig)}
    fields |= {f"no_{name}": name for name in fields}
    given = {token[2:].partition("=")[0].replace("-", "_") for token in arguments if token.startswith("--")}
    return TrainConfig(**values), {fields[name] for name in given if name in fields}


def chosen_fields() -> tuple[str, ...]:
    """The flags that `--memory auto` may choose."""
    return tuple(marked(TrainConfig, CHOSEN))


def parse_steps(text: str) -> tuple[int, int]:
    """`3:5` -> (3, 5): the first and the last step, counted from 1; `3` is `3:3`."""
    match = re.fullmatch(r"\s*(\d+)(?::(\d+))?\s*", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--profile-steps {text}: write the first and the last step, counted from 1, as 3:5")
    return first, last
