"""Writes the table of docs/models.md from the families. A test fails if it is not current.

python docs/write_models.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from alst_jax.models.config import ModelConfig  # noqa: E402
from alst_jax.models.families import FAMILIES  # noqa: E402
from alst_jax.models.hf_config import parse_config  # noqa: E402
from alst_jax.ops.attention import KERNELS, refusal  # noqa: E402

PAGE = pathlib.Path(__file__).parent / "models.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
SHAPE = dict(
    vocab_size=1000,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
)
# Fields of published models, where transformers' defaults have no such feature.
SHOWN = {
    "granite": dict(embedding_multiplier=12.0, attention_multiplier=0.01, residual_multiplier=0.2, logits_scaling=8.0),
    "gemma3_text": dict(sliding_window=512),
}


def model(family: str) -> ModelConfig:
    """A small model of a family with transformers' defaults."""
    raw = dict(model_type=family, architectures=[FAMILIES[family].architecture])
    return parse_config(SHAPE | raw | SHOWN.get(family, {}), "config.json")


def row(family: str) -> list[str]:
    config, options = model(family), FAMILIES[family].implemented
    windows = [kind.window for kind in config.layer_kinds]
    sliding = (
        f"{sum(w is not None for w in windows)} of 12 layers, {max(w or 0 for w in windows):,}"
        if any(windows)
        else ("if switched on" if "sliding_window" in options else "-")
    )
    ropes = [kind.rope for kind in config.layer_kinds]
    rope = (
        f"{len(config.ropes)}, by type of layer"
        if len(config.ropes) > 1
        else "all layers, of a part of each head if set"
        if FAMILIES[family].partial_rope
        else "by type of layer"
        if FAMILIES[family].ropes
        else f"not in {ropes.count(False)} of 12 layers"
        if False in ropes
        else "all layers"
    )
    bias = [name for name in ("attention_bias", "attention_out_bias", "mlp_bias") if name in options]
    scalars = {
        "embeddings": config.embedding_multiplier != 1,
        "scores": config.attention_scale is not None,
        "residual": config.residual_multiplier != 1,
        "logits": config.logits_divisor != 1,
        "soft cap of logits": "final_logit_softcapping" in options,
    }
    kernels = [
        name
        for name, kernel in KERNELS.items()
        if name != "flash-deterministic"
        and not any(refusal(kernel, config.attention_spec(kind)) for kind in config.kinds)
    ]
    qkv = "q, k, v always" if config.qkv_bias and not bias else ", ".join(bias) or "-"
    return [
        family,
        qkv,
        config.qk_norm.replace("none", "-"),
        config.norms + (" (1 + w)" if config.norm_offset else ""),
        sliding,
        rope,
        ", ".join(name for name, there in scalars.items() if there) or "-",
        config.activation,
        ", ".join(kernels),
    ]


def table() -> str:
    head = [
        "model_type",
        "biases",
        "norm of q and k",
        "norms of attention and MLP",
        "sliding window",
        "rope",
        "scalars",
        "activation",
        "--attention",
    ]
    rows = [head, ["---"] * len(head), *map(row, FAMILIES)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def page(text: str) -> str:
    """The page with the table of now."""
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
