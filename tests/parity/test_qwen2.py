# pytest tests/parity/test_qwen2.py
"""Qwen2 against transformers: logits, loss, every gradient and updated weights, and the round trip of its files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch  # in the test extra: parity must fail, not skip, without it
import transformers
from safetensors.numpy import load_file

from alst_jax.models.block import Tokens
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_saving import save_params
from alst_jax.models.hf_weights import load_params
from alst_jax.models.weight_files import find_tensors
from alst_jax.ops.attention import attention
from alst_jax.profile import Profile
from tests.helpers import PLAIN, QUIET_ADAMW, assert_trees_close, leaves, make_step, relative_error, torch_gradients

CONFIGS = {
    "odd": dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=60, intermediate_size=52, head_dim=10),
    "tied": dict(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, use_sliding_window=False),
}
BASE = dict(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    max_position_embeddings=256,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    attn_implementation="eager",
)


@pytest.fixture(scope="module", params=CONFIGS)
def twins(request, tmp_path_factory):
    """A random torch Qwen2, its directory, its config here, and its weights here."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**BASE | CONFIGS[request.param])).eval()
    for parameter in model.parameters():  # zero biases and unit norms would hide mistakes
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1) * 0.5
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    config = model_config(directory)
    return model, directory, config, load_params(directory, config, make_step(config).params)


def torch_loss(model, tokens):
    model.zero_grad()
    out = model(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long())
    out.loss.backward()
    return out


def test_logits(twins):
    model, _, config, params = twins
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 33), dtype=np.int32)
    h, extra = params["embed_tokens"]["embedding"][tokens], Tokens.of(config, jnp.tile(jnp.arange(33), (2, 1)))
    for i in range(config.num_layers):
        block = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        h = block(h, extra, functools.partial(attention, kernel="xla"))
    head = params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["embedding"]
    assert relative_error(params["norm"](h) @ head.T, torch_loss(model, tokens).logits.detach()) < 1e-4
    names = leaves(params)
    assert "layers.self_attn.q_proj.bias" in names and "layers.self_attn.o_proj.bias" not in names


@pytest.mark.parametrize(
    "sp,profile",
    [
        (1, PLAIN),
        (
            2,
            Profile(
                loss_tile=5,
                mlp_tile=3,
                head_chunks=1,
                offload_activations=True,
                segment_layers=(2, 1),
                keep_attention_on_device=1,
                offload_weights=True,
            ),
        ),
    ],
    ids=["plain", "every feature"],
)
def test_loss_and_every_gradient(twins, sp, profile):
    model, _, config, params = twins
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (1, 32), dtype=np.int32)
    shifted = np.concatenate([tokens[:, 1:], np.full((1, 1), -100, np.int32)], axis=1)
    step = make_step(config, sp=sp, profile=profile)
    placed = step.split(jax.device_put(params, step.param_shardings))
    loss, gradients = step.loss_and_grad(
        *placed, step.put_batch(tokens, shifted, np.arange(32, dtype=np.int32)[None]), jnp.float32(1 / 31)
    )
    theirs = torch_loss(model, tokens).loss.item()
    assert abs(float(loss) - theirs) < 1e-4 * abs(theirs)
    expected = torch_gradients(model)
    assert expected.keys() == leaves(gradients).keys()
    assert_trees_close(gradients, expected, 1e-4)


def test_files_come_back_bit_for_bit(twins, tmp_path):
    _, directory, config, params = twins
    save_params(jax.tree_util.tree_leaves_with_path(params), config, tmp_path)
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() == find_tensors(tmp_path).keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_training_one_step_equals_torch_with_frozen_parameters(twins):
    """`--freeze` is `requires_grad=False`: the same AdamW step of the parameters that are left, the others
    unchanged."""
    model, _, config, params = twins
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (1, 32), dtype=np.int32)
    pattern = "embed_tokens|mlp"
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(part in name for part in pattern.split("|"))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0)
    torch_loss(model, tokens)
    optimizer.step()

    adamw = dataclasses.replace(QUIET_ADAMW, clip_norm=0.0, weight_decay=0.0)
    step = make_step(config, freeze=pattern, optimizer=adamw, profile=Profile(loss_tile=5, mlp_tile=7))
    trained, frozen = step.split(params)
    trained = jax.tree.map(jnp.copy, trained)
    shifted = np.concatenate([tokens[:, 1:], np.full((1, 1), -100, np.int32)], axis=1)
    batch = step.put_batch(tokens, shifted, np.arange(32, dtype=np.int32)[None])
    state = step.init_optimizer(trained)
    _, gradients = step.loss_and_grad(trained, frozen, batch, jnp.float32(1 / 31))
    trained, _ = step.update(trained, gradients, state, step.gradient_norm(gradients), jnp.float32(1e-2))
    for parameter in model.parameters():
        parameter.grad = parameter.data
    weights = leaves(step.join(trained, frozen))
    for name, value in torch_gradients(model).items():
        assert relative_error(weights[name], value) < 1e-4, name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == any(part in name for part in pattern.split("|"))
        parameter.data, parameter.requires_grad, parameter.grad = start[name], True, None
