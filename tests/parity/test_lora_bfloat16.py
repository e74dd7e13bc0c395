# pytest tests/parity/test_lora_bfloat16.py
"""LoRA in bfloat16 against PEFT on torch: base model bfloat16, adapters float32; and dropout with our masks in PEFT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from alst_jax.models.lora import LINEARS, Lora
from alst_jax.ops.dropout import fold_in, kept, token_keys
from alst_jax.optim.adamw import AdamW
from alst_jax.optim.formats import join_float32
from tests.helpers import PLAIN, leaves, make_step, random_batch, relative_error, tiny, to_numpy
from tests.parity import test_lora
from tests.parity.test_lora import gradients_of, load, their_leaves, their_loss

twins = test_lora.twins  # a fixture
BFLOAT16 = dataclasses.replace(PLAIN, compute_dtype="bfloat16")
TOLERANCE = 0.04  # of a gradient in the bfloat16 of both sides, whose numbers have 8 bits; float32 has 1e-4
FREEZE = "proj|embed_tokens|lm_head|layernorm"  # the last norm is trained in full


@pytest.mark.parametrize("twins", ["llama"], indirect=True)
def test_bfloat16_is_that_of_peft(twins):
    """Loss and every adapter's gradient; and no further from float32 than PEFT's own."""
    _, base, adapter = twins
    batch = random_batch(rows=2)

    def theirs(*casts):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        for cast in casts:
            model = model.to(cast)
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        loss = their_loss(model, batch)
        loss.backward()
        return loss.item(), their_leaves(model, lambda p: p.grad)

    narrow, exact = theirs(), theirs(torch.float32)  # the same bfloat16 weights, computed with in float32
    step, trained, frozen = load(base, adapter, profile=BFLOAT16, dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(frozen)} == {"bfloat16"}
    loss, gradients = gradients_of(step, trained, frozen, batch)
    gradients = leaves(to_numpy(gradients))
    np.testing.assert_allclose(float(loss), narrow[0], rtol=5e-3)
    errors = {
        name: [
            relative_error(a, b)
            for a, b in ((gradient, narrow[1][name]), (gradient, exact[1][name]), (narrow[1][name], exact[1][name]))
        ]
        for name, gradient in gradients.items()
    }
    assert errors.keys() == narrow[1].keys()
    assert max(e[0] for e in errors.values()) < TOLERANCE, errors
    assert np.mean([e[1] for e in errors.values()]) < 1.5 * np.mean([e[2] for e in errors.values()]), errors


@pytest.mark.parametrize("twins", ["llama"], indirect=True)
def test_dropout_is_that_of_peft(twins):
    """PEFT with our masks in the place of torch's: the same loss and gradients."""
    _, base, adapter = twins
    rate, seed, at = 0.3, 5, 7
    step, trained, frozen = load(base, adapter, dropout=rate, seed=seed)
    batch = random_batch(rows=2)
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True
    )
    keys = token_keys(seed, jnp.uint32(at), jnp.arange(batch["tokens"].size, dtype=jnp.uint32))

    class Masked(torch.nn.Module):
        def __init__(self, layer, number):
            super().__init__()
            self.keys = fold_in(fold_in(keys, layer), number)

        def forward(self, x):
            mask = np.array(kept(self.keys, x.shape[-1], rate)).reshape(x.shape)
            return x * torch.tensor(mask) / (1 - round(rate * 2**16) / 2**16)

    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            parts = name.split(".")
            module.lora_dropout["default"] = Masked(int(parts[-3]), LINEARS.index(parts[-1]))
    want = their_loss(model, batch)
    want.backward()
    loss, gradients = gradients_of(step, trained, frozen, batch | {"draws": np.array([at, 0], np.uint32)})
    np.testing.assert_allclose(float(loss), want.item(), rtol=1e-5)
    found, wanted = leaves(to_numpy(gradients)), their_leaves(model, lambda p: p.grad)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, wanted[name]) < 1e-4, name


@pytest.mark.parametrize("master", ["float32", "low-bits"])
def test_a_norm_in_bfloat16_beside_adapters_has_a_master(master):
    """Updates of 1e-4, each below half a step of bfloat16 numbers at 1, are not lost; adapters need no master."""
    optimizer = AdamW(master=master, clip_norm=0.0, weight_decay=0.0)
    step = make_step(
        tiny(lora=Lora(2, 2.0), num_layers=1),
        profile=BFLOAT16,
        optimizer=optimizer,
        dtype=jnp.bfloat16,
        freeze=FREEZE + "|_norm",
    )
    trained, _ = step.split(step.init_params(jax.random.key(0), jnp.bfloat16))
    before, state = to_numpy(trained), step.init_optimizer(trained)
    assert leaves(state["master"]).keys() == leaves(before).keys(), "as planned: one tree, adapters included"
    full = {name: str(x.dtype) for name, x in leaves(before).items() if "lora" not in name}
    assert full == {"norm.scale": "bfloat16"}
    for _ in range(8):  # a constant gradient: AdamW goes down by the learning rate
        gradients = jax.device_put(
            jax.tree.map(lambda p: np.ones(p.shape, p.dtype), step.trained),
            jax.tree.map(lambda p: p.sharding, step.trained),
        )
        trained, state = step.update(trained, gradients, state, jnp.float32(1), jnp.float32(1e-4))
    norm = leaves(to_numpy(trained))["norm.scale"]
    kept_bits = leaves(to_numpy(state["master"]))["norm.scale"]
    wide = kept_bits if master == "float32" else np.asarray(join_float32(jnp.asarray(norm), jnp.asarray(kept_bits)))
    np.testing.assert_allclose(wide, 1 - 8e-4, atol=1e-6)
    a, b = (leaves(tree)["layers.mlp.up_proj.lora_A"] for tree in (to_numpy(trained), before))
    np.testing.assert_allclose(a, b - 8e-4, atol=1e-6)
