# pytest tests/parity/test_lora.py
"""LoRA against PEFT on torch: loss, every gradient of an adapter, AdamW steps, merged logits, the files of both."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from alst_jax.config import IGNORED
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import load_params
from alst_jax.models.lora import LINEARS, adapters_of
from alst_jax.models.peft_files import load_adapter, read_lora, save_adapter
from alst_jax.models.tree import combine
from alst_jax.optim.adamw import AdamW
from alst_jax.profile import Profile
from tests.helpers import PLAIN, assert_trees_close, leaves, make_step, random_batch, to_numpy

BASE = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
            num_key_value_heads=2, head_dim=16, pad_token_id=None, bos_token_id=None, eos_token_id=None)
CASES = {
    "llama": ("Llama", dict(attention_bias=True), dict(r=3, lora_alpha=5, target_modules=list(LINEARS))),
    "qwen3, tied, some": ("Qwen3", dict(tie_word_embeddings=True, num_key_value_heads=8), dict(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"])),
    "olmo2": ("Olmo2", dict(), dict(r=2, lora_alpha=2, target_modules="all-linear")),
}
STEPS, RATE, DECAY = 20, 3e-3, 0.1


@pytest.fixture(scope="module", params=CASES)
def twins(request, tmp_path_factory):
    """A PEFT model with adapters of random numbers, and the directories of its base and of the adapters."""
    name, changes, options = CASES[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForCausalLM")(getattr(transformers, name + "Config")(**BASE | changes))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1) * 0.5
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    model.save_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    model.base_model.model.config.name_or_path = str(base)
    for parameter in model.parameters():
        if parameter.requires_grad:  # B begins with zeros, which would hide mistakes
            parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(adapter)
    return model, base, adapter


def ours(base, adapter, *mesh, profile=PLAIN, **changes):
    """(step, trained, frozen) of the directories."""
    config = model_config(base)
    config = dataclasses.replace(config, lora=read_lora(adapter))
    step = make_step(config, *mesh, profile=profile, **changes)
    _, abstract = adapters_of(step.params)
    params = combine(load_params(base, model_config(base), abstract), load_adapter(adapter, config, step.trained))
    return step, *step.split(params)


def their_loss(model, batch):
    labels = torch.tensor(batch["labels"], dtype=torch.long)
    logits = model(torch.tensor(batch["tokens"], dtype=torch.long)).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED)


def their_leaves(model, of):
    """of(parameter) of the adapters of a PEFT model by our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _, _, _, _, layer, part, linear, which, _, _ = name.split(".")
            found.setdefault(f"layers.{part}.{linear}.{which}", {})[int(layer)] = of(parameter).detach().numpy().T
    return {name: np.stack([rows[i] for i in sorted(rows)]) for name, rows in found.items()}


def test_loss_and_every_gradient(twins):
    model, *directories = twins
    batch = random_batch(rows=2)
    step, trained, frozen = ours(*directories)
    scale = jnp.float32(1 / np.count_nonzero(batch["labels"] != IGNORED))
    loss, gradients = step.loss_and_grad(trained, frozen, step.put_batch(**batch), scale)
    model.zero_grad()
    want = their_loss(model, batch)
    want.backward()
    np.testing.assert_allclose(float(loss), want.item(), rtol=1e-5)
    assert_trees_close(leaves(to_numpy(gradients)), their_leaves(model, lambda p: p.grad), 1e-4)
