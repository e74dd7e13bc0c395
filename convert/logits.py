"""--verify: the logits of a checkpoint against transformers' on the Hugging Face directory, in float32."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from alst_jax.config import UserError
from alst_jax.models.block import Tokens, abstract_params
from alst_jax.models.config import LayerKind, ModelConfig
from alst_jax.models.other_weights import auto_class
from alst_jax.models.tree import names
from alst_jax.ops.attention import attention
from alst_jax.ops.cross_entropy import LogitScaling
from alst_jax.ops.tiling import token_rows
from alst_jax.storage.checkpoint import Checkpoints
from alst_jax.storage.stored import Stored

LENGTH = 32  # tokens
TOLERANCE = 1e-3  # of the norm of the logits; the order of float32 sums gives about 1e-5
ROWS = 2**14  # of the head, at a time


def check_possible() -> None:
    """UserError where torch is not installed. Called before a long conversion."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("--verify compares with transformers, which needs torch; install torch, or leave --verify out")


def verify(run_dir: pathlib.Path, step: int, config: ModelConfig, hf_dir: pathlib.Path) -> float:
    """The relative difference of the logits of both directories. UserError if it is above TOLERANCE.

    The checkpoint is read a layer at a time. transformers holds the whole model in float32: 4 bytes a parameter.
    """
    import torch
    import transformers

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, LENGTH), dtype=np.int32)
    checkpoints = Checkpoints(run_dir)
    ours = logits_of(config, dict(checkpoints.open_params(step)), tokens)
    checkpoints.close()
    model = (
        getattr(transformers, auto_class(hf_dir))
        .from_pretrained(hf_dir, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
        .eval()
    )
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long(), use_cache=False).logits.numpy()
    difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if not difference <= TOLERANCE:
        raise UserError(
            f"--verify: the logits of {LENGTH} tokens differ from those of transformers by "
            f"{difference:.2g} of their norm, more than {TOLERANCE:.0e}; nothing of the conversion is kept"
        )
    print(
        f"verified: the logits of {LENGTH} tokens differ from those of transformers by {difference:.1e} of their norm"
    )
    return difference


def logits_of(config: ModelConfig, stored: dict[tuple[str, ...], Stored], tokens: np.ndarray) -> np.ndarray:
    """The logits [1, T, V] in float32, with one layer in memory at a time."""
    abstract = abstract_params(config, np.float32)
    read = lambda name, index: jnp.asarray(stored[name][index], jnp.float32)
    part = lambda key, index: jax.tree_util.tree_map_with_path(
        lambda path, _: read((key, *names(path)), index), abstract[key]
    )
    table = ("embed_tokens", "embedding")
    h = jnp.stack([read(table, int(token)) for token in tokens[0]])[None] * config.embedding_multiplier
    extra = Tokens.of(config, jnp.arange(LENGTH)[None])
    for layer, kind in enumerate(config.layer_kinds or (LayerKind(),) * config.num_layers):
        attend = lambda *qkv, kind=kind: attention(*qkv, config.attention_spec(kind), kernel="xla")
        h = part("layers", layer)(h, extra, attend, kind)
    h = part("norm", ...)(h)
    head = table if config.tie_word_embeddings else ("lm_head", "embedding")
    scale = LogitScaling(config.logits_divisor, config.logits_soft_cap)
    rows = (slice(start, min(start + ROWS, config.vocab_size)) for start in range(0, config.vocab_size, ROWS))
    return np.concatenate([scale(token_rows(h @ read(head, each).T)) for each in rows], axis=-1).reshape(1, LENGTH, -1)
