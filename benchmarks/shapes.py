"""Model shapes that benchmarks share. Weights are random: speed and memory do not depend on their values."""

import dataclasses

from alst_jax.models.config import ModelConfig
from alst_jax.ops.rope import RopeConfig

_LLAMA_3 = RopeConfig(
    rope_type="llama3",
    theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
LLAMA_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    rope=_LLAMA_3,
)
LLAMA_1B = dataclasses.replace(  # Llama-3.2-1B
    LLAMA_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    head_dim=64,
    tie_word_embeddings=True,
    rope=dataclasses.replace(_LLAMA_3, factor=32.0),
)
LLAMA_70B = dataclasses.replace(  # Llama-3.1-70B
    LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64
)
QWEN3_32B = ModelConfig(  # as a Llama: without the norms of queries and keys, which are small
    vocab_size=151936,
    hidden_size=5120,
    intermediate_size=25600,
    num_layers=64,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    rope=RopeConfig(theta=1000000.0),
)


def llama_8b(layers: int) -> ModelConfig:
    """The shape of Llama-3.1-8B with fewer layers."""
    return dataclasses.replace(LLAMA_8B, num_layers=layers)
