"""A Hugging Face directory of a Llama-8B shape with random weights and a byte tokenizer, to run train.py on at real
width.

    python -m benchmarks.make_model DIR --layers 4
"""

import json
import pathlib

import tyro

from alst_jax.hardware import environment
from benchmarks.shapes import llama_8b


def main(directory: tyro.conf.Positional[pathlib.Path], layers: int = 4) -> None:
    environment.prepare(None)
    import jax
    import jax.numpy as jnp

    from alst_jax.data.tokenizer import byte_tokenizer
    from alst_jax.models.block import init_params
    from alst_jax.models.hf_config import hf_config_dict
    from alst_jax.models.hf_saving import save_params

    config = llama_8b(layers)
    params = jax.jit(lambda key: init_params(config, jnp.bfloat16, key))(jax.random.key(0))
    byte_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(hf_config_dict(config), indent=2))
    tensors, size = save_params(jax.tree_util.tree_leaves_with_path(params), config, directory)
    print(f"{directory}: {tensors} tensors, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    tyro.cli(main)
