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
from alst_jax.models.hf_saving import save_params
from alst_jax.models.hf_weights import load_params
from alst_jax.models.lora import LINEARS, adapters_of
from alst_jax.models.merging import merged
from alst_jax.models.peft_files import load_adapter, read_lora, save_adapter
from alst_jax.optim.adamw import AdamW
from alst_jax.storage import run_directory
from tests.helpers import PLAIN, assert_trees_close, leaves, make_step, random_batch, relative_error, to_numpy

BASE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
CASES = {
    "llama": ("Llama", dict(attention_bias=True), dict(r=3, lora_alpha=5, target_modules=list(LINEARS))),
    "qwen3, tied, some": (
        "Qwen3",
        dict(tie_word_embeddings=True, num_key_value_heads=8),
        dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    ),
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


def load(base, adapter, *mesh, profile=PLAIN, freeze=None, dtype="float32", **lora):
    """(step, trained, frozen) of the two directories. lora: changes of the adapters' settings."""
    config = dataclasses.replace(model_config(base), lora=dataclasses.replace(read_lora(adapter).lora, **lora))
    optimizer = AdamW(weight_decay=DECAY, clip_norm=0.0, eps=1e-6)
    step = make_step(config, *mesh, profile=profile, optimizer=optimizer, freeze=freeze, dtype=dtype)
    weights = load_params(base, model_config(base), adapters_of(step.params)[1])
    trained = load_adapter(adapter, config, step.trained)
    return step, trained, step.split(weights)[1]


@pytest.fixture(scope="module")
def ours(twins):
    return load(*twins[1:])


def their_logits(model, tokens):
    return model(torch.tensor(tokens, dtype=torch.long)).logits


def their_loss(model, batch):
    labels = torch.tensor(batch["labels"], dtype=torch.long)
    logits = their_logits(model, batch["tokens"])
    logits = logits.reshape(-1, logits.shape[-1]).float()
    return torch.nn.functional.cross_entropy(logits, labels.reshape(-1), ignore_index=IGNORED)


def their_leaves(model, of):
    """of(parameter) of the adapters of a PEFT model by our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            _, _, _, _, layer, part, linear, which, _, _ = name.split(".")
            found.setdefault(f"layers.{part}.{linear}.{which}", {})[int(layer)] = of(parameter).detach().numpy().T
    return {name: np.stack([rows[i] for i in sorted(rows)]) for name, rows in found.items()}


def gradients_of(step, trained, frozen, batch):
    scale = jnp.float32(1 / np.count_nonzero(batch["labels"] != IGNORED))
    return step.loss_and_grad(trained, frozen, step.put_batch(**batch), scale)


def test_loss_and_every_gradient(twins, ours):
    model, batch = twins[0], random_batch(rows=2)
    loss, gradients = gradients_of(*ours, batch)
    model.zero_grad()
    want = their_loss(model, batch)
    want.backward()
    np.testing.assert_allclose(float(loss), want.item(), rtol=1e-5)
    assert_trees_close(leaves(to_numpy(gradients)), their_leaves(model, lambda p: p.grad), 1e-4)


def test_files_come_back_byte_for_byte(twins, ours, tmp_path):
    """A PEFT file, loaded and saved, is the same file; PEFT loads the directory and computes the same logits."""
    model, base, adapter = twins
    save_adapter(tmp_path, ours[1], ours[0].model, str(base))
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (adapter / name).read_bytes()
    mine, theirs = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, adapter))
    compared = ("r", "lora_alpha", "use_rslora", "peft_type", "task_type", "bias", "modules_to_save")
    assert {name: mine[name] for name in compared} == {name: theirs[name] for name in compared}
    assert set(mine["target_modules"]) == set(theirs["target_modules"])
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = random_batch(rows=1)["tokens"]
    assert torch.equal(their_logits(again, tokens), their_logits(model.eval(), tokens))


def test_merged_weights_compute_the_same_logits(twins, ours, tmp_path):
    model, base, _ = twins
    step, trained, frozen = ours
    run_directory.copy_model_files(base, tmp_path)
    tree = merged(step.join(trained, frozen), step.model.lora)
    save_params(jax.tree_util.tree_leaves_with_path(tree), step.model, tmp_path)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = random_batch(rows=2)["tokens"]
    got, want = (their_logits(each, tokens).detach().numpy() for each in (alone, model.eval()))
    assert relative_error(got, want) < 1e-5
    without = their_logits(transformers.AutoModelForCausalLM.from_pretrained(base).eval(), tokens)
    assert relative_error(without.detach().numpy(), want) > 1e-2


def test_training_is_that_of_torch(twins, ours):
    """20 steps of AdamW: every loss and the adapters after them; the base model stays as it was."""
    model, base, adapter = twins
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True
    )
    adapters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=RATE, weight_decay=DECAY, eps=1e-6)
    step, trained, frozen = ours
    trained, state = jax.tree.map(jnp.copy, trained), step.init_optimizer(trained)
    for seed in range(STEPS):
        batch = random_batch(rows=2, seed=seed)
        loss, gradients = gradients_of(step, trained, frozen, batch)
        trained, state = step.update(trained, gradients, state, step.gradient_norm(gradients), jnp.float32(RATE))
        optimizer.zero_grad()
        want = their_loss(theirs, batch)
        want.backward()
        optimizer.step()
        np.testing.assert_allclose(float(loss), want.item(), rtol=2e-5)
    assert_trees_close(leaves(to_numpy(trained)), their_leaves(theirs, lambda p: p), 1e-4)
