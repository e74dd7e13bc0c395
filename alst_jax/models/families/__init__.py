"""The supported model families by their `model_type` in config.json. A new family is one file and one line here."""

from alst_jax.models.families import llama, qwen2, qwen3
from alst_jax.models.families.family import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY)}
