"""The supported model families by their `model_type` in config.json. A new family is one file and one line here."""

from alst_jax.models.families import (
    gemma3,
    granite,
    llama,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
)
from alst_jax.models.families.family import Family

MODULES = (llama, qwen2, qwen3, mistral, seed_oss, smollm3, granite, olmo2, olmo3, gemma3, phi3)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in MODULES}
