"""The shape of a model."""

import dataclasses
from typing import Literal

from alst_jax.config import UserError
from alst_jax.models.lora import Lora
from alst_jax.ops.attention import AttentionSpec
from alst_jax.ops.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How one layer differs from others of its model, beside its weights.

    rope: whether queries and keys are turned. table: by which of the model's `ropes`. window: see AttentionSpec.
    """

    rope: bool = True
    window: int | None = None
    table: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama, unless an option says otherwise. The options are read in models/block.py and stack/ends.py.

    D hidden, F ffn, V vocabulary, L layers, N query heads, K kv heads, H head dim.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048
    rope: RopeConfig = RopeConfig()
    family: str = "llama"  # model_type in Hugging Face's config.json
    qkv_bias: bool = False  # on the query, key and value projections; attention_bias puts one on the output's too
    o_bias: bool = False  # on the output projection
    layer_kinds: tuple[LayerKind, ...] = ()  # one a layer; none: all alike
    more_ropes: tuple[RopeConfig, ...] = ()  # of layers whose kind has a `table` above 0
    qk_norm: Literal["none", "head", "all heads"] = "none"  # extent of the RMS norm of queries and keys
    norms: Literal["before", "after", "both"] = "before"  # of attention and of the MLP
    norm_offset: float = 0.0  # norms multiply by scale + norm_offset
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_soft_cap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of the outputs of attention and the MLP
    logits_divisor: float = 1.0
    logits_soft_cap: float | None = None
    attention_layers: int | None = None  # compute attention in the first layers only, to measure memory; None: in all
    lora: Lora | None = None  # adapters beside the weights

    def __post_init__(self):
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} in the model's config must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_key_value_heads={self.num_kv_heads} must divide num_attention_heads={self.num_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise UserError(f"{len(self.layer_kinds)} layer kinds for {self.num_layers} layers: one each")
        if max(kind.table for kind in self.kinds) >= len(self.ropes):
            raise UserError(f"layer kinds name more rotary embeddings than the {len(self.ropes)} of the model")

    @property
    def dropout(self) -> float:
        """The part of the adapters' inputs that training sets to zero."""
        return 0.0 if self.lora is None else self.lora.dropout

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """All rotary embeddings; a layer's kind says which it uses."""
        return self.rope, *self.more_ropes

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The different kinds of layers; their number, not the depth, sets the size of the compiled program."""
        return tuple(dict.fromkeys(self.layer_kinds)) or (LayerKind(),)

    @property
    def kind_numbers(self) -> tuple[int, ...]:
        """For each layer, the index of its kind in `kinds`."""
        return tuple(self.kinds.index(kind) for kind in self.layer_kinds) or (0,) * self.num_layers

    def attention_spec(self, kind: LayerKind) -> AttentionSpec:
        """The attention of a layer of this kind."""
        scale = None if self.attention_scale == self.head_dim**-0.5 else self.attention_scale  # more kernels take None
        return AttentionSpec(scale, kind.window, self.attention_soft_cap)

    @property
    def num_params(self) -> int:
        """Trainable parameters; a tied output embedding counts once."""
        d, h = self.hidden_size, self.head_dim
        attention = 2 * d * self.num_heads * h + 2 * d * self.num_kv_heads * h
        if self.attention_bias or self.qkv_bias:
            attention += self.num_heads * h + 2 * self.num_kv_heads * h
        attention += d if self.attention_bias or self.o_bias else 0
        norms = (4 if self.norms == "both" else 2) * d
        norms += {"none": 0, "head": 2 * h, "all heads": (self.num_heads + self.num_kv_heads) * h}[self.qk_norm]
        mlp = 3 * d * self.intermediate_size + (2 * self.intermediate_size + d if self.mlp_bias else 0)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + norms) + embeddings + d

    def causal_pairs(self, seq_len: int) -> float:
        """Pairs of a query and a key that attention reads, over all layers."""
        return sum(self.layer_pairs(seq_len))

    def layer_pairs(self, seq_len: int) -> list[float]:
        """Pairs of a query and a key that attention reads in each layer: S^2 / 2 without a window."""
        full = seq_len**2 / 2
        pairs = lambda window: full if window is None or window >= seq_len else window * (seq_len - window / 2)
        kinds = self.layer_kinds or (LayerKind(),) * self.num_layers
        return [
            pairs(kind.window) if layer < (self.attention_layers or self.num_layers) else 0.0
            for layer, kind in enumerate(kinds)
        ]

    def flops_per_sequence(self, seq_len: int) -> float:
        """Model FLOPs of one forward and backward over one sequence, the measure behind MFU.

        6 x matmul parameters x S, plus causal attention: 4 x N x H for each pair of a query and a key forward (S^2 / 2
        pairs a layer, fewer with a window) and twice that backward. Recompute is not counted. The embedding's
        row look-up is no matmul.
        """
        d, h = self.hidden_size, self.head_dim
        layer = 2 * d * self.num_heads * h + 2 * d * self.num_kv_heads * h + 3 * d * self.intermediate_size
        matmul = self.num_layers * layer + self.vocab_size * d
        attention = 4.0 * self.causal_pairs(seq_len) * self.num_heads * h
        return 6.0 * matmul * seq_len + 3.0 * attention


# The model that `train.py` trains when it is given none.
TINY_LLAMA = ModelConfig(
    vocab_size=261,
    hidden_size=128,
    intermediate_size=352,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
)
