"""The shape of a model."""

import dataclasses

from alst_jax.config import UserError
from alst_jax.ops.attention import AttentionSpec
from alst_jax.ops.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How one layer differs from others of its model, beside its weights. window: see AttentionSpec."""

    rope: bool = True
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama. D hidden, F ffn, V vocabulary, L layers, N query heads, K kv heads, H head dim."""

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
    layer_kinds: tuple[LayerKind, ...] = ()  # one a layer; none: all alike

    def __post_init__(self):
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} in the model's config must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_key_value_heads={self.num_kv_heads} must divide num_attention_heads={self.num_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise UserError(f"{len(self.layer_kinds)} layer kinds for {self.num_layers} layers: one each")

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
        return AttentionSpec(window=kind.window)

    @property
    def num_params(self) -> int:
        """Trainable parameters; a tied output embedding counts once."""
        d, h = self.hidden_size, self.head_dim
        attention = 2 * d * self.num_heads * h + 2 * d * self.num_kv_heads * h
        if self.attention_bias or self.qkv_bias:
            attention += self.num_heads * h + 2 * self.num_kv_heads * h + (d if self.attention_bias else 0)
        mlp = 3 * d * self.intermediate_size + (2 * self.intermediate_size + d if self.mlp_bias else 0)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * d) + embeddings + d

    def flops_per_sequence(self, seq_len: int) -> float:
        """Model FLOPs of one forward and backward over one sequence, the measure behind MFU.

        6 x matmul parameters x S, plus causal attention: 2 x S^2 x N x H a layer forward (half of the S x S scores) and
        twice that backward. What is recomputed is not counted. The embedding's row look-up is no matmul.
        """
        d, h = self.hidden_size, self.head_dim
        matmul = self.num_layers * (2 * d * self.num_heads * h + 2 * d * self.num_kv_heads * h + 3 * d * self.intermediate_size)
        matmul += self.vocab_size * d
        attention = self.num_layers * 2.0 * seq_len**2 * self.num_heads * h
        return 6.0 * matmul * seq_len + 3.0 * attention


# The model that `train.py` trains when it is given none.
TINY_LLAMA = ModelConfig(
    vocab_size=261, hidden_size=128, intermediate_size=352, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
    rms_norm_eps=1e-5, max_position_embeddings=32768)
