"""Model shapes that benchmarks share. Weights are random: speed and memory do not depend on their values."""

import dataclasses

from alst_jax.config import ModelConfig, RopeConfig

LLAMA_8B = ModelConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=131072,
    rope=RopeConfig(rope_type="llama3", theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192))


def llama_8b(layers: int) -> ModelConfig:
    """The shape of Llama-3.1-8B with fewer layers."""
    return dataclasses.replace(LLAMA_8B, num_layers=layers)
