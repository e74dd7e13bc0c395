# pytest tests/parity/test_hf_parity.py
"""Against transformers' torch Llama from random configs: ops at 1e-5, models and every gradient at 1e-4, float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch  # in the test extra: parity must fail, not skip, without it
import transformers

from alst_jax.config import IGNORED
from alst_jax.models.block import Tokens
from alst_jax.models.hf_config import model_config, parse_config
from alst_jax.models.hf_weights import load_params
from alst_jax.ops.attention import attention
from alst_jax.ops.rope import rope_tables
from tests.helpers import PLAIN, assert_trees_close, make_step, relative_error

OP, MODEL = 1e-5, 1e-4
BASE = dict(
    vocab_size=99,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    attn_implementation="eager",
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
CONFIGS = {
    "gqa": {},
    "mha": dict(num_key_value_heads=4),
    "mqa": dict(num_key_value_heads=1, rms_norm_eps=1e-3),
    "head_dim": dict(head_dim=24),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0)),
    "llama3": dict(rope_parameters=LLAMA3),
    "yarn": dict(rope_parameters=YARN),
    "yarn_mscale": dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.9, beta_fast=16, beta_slow=2)),
    "yarn_attention_factor": dict(rope_parameters=YARN | dict(attention_factor=1.3, truncate=False)),
}


@pytest.fixture(params=CONFIGS, scope="module")
def twins(request, tmp_path_factory):
    """(torch model, our config, our weights read from the directory it was saved in)."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE | CONFIGS[request.param])).eval()
    for parameter in model.parameters():  # zero biases and unit norms would hide mistakes
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1) * 0.5
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    config = model_config(directory)
    params = load_params(directory, config, make_step(config).params)
    return model, config, params


def layer(params, i):
    return jax.tree.map(lambda x: x[i], params["layers"])


def hidden(seed=0, length=24, batch=2, dim=64):
    return np.random.default_rng(seed).standard_normal((batch, length, dim), dtype=np.float32)


def positions(batch=2, length=24):
    return np.tile(np.arange(length, dtype=np.int32), (batch, 1))


def torch_rope(model, x, at):
    return model.model.rotary_emb(torch.tensor(x), torch.tensor(at).long())


def causal_mask(length):
    return torch.full((length, length), float("-inf")).triu(1)[None, None]


def test_norm(twins):
    model, config, params = twins
    x = hidden()
    theirs = model.model.norm(torch.tensor(x)).detach().numpy()
    assert relative_error(params["norm"](jnp.asarray(x)), theirs) < OP


def test_rope_tables_at_length(twins):
    model, config, _ = twins
    at = np.array([[0, 1, 63, 64, 255, 4097, 131071]], np.int32)
    cos, sin = rope_tables(config.rope, config.head_dim, jnp.asarray(at))
    half = config.head_dim // 2
    # Both sides multiply float32 positions by float32 frequencies that may differ in their last bit: at position p the
    # angle, and so the cosine, may differ by p x 2^-24 (0.008 at 131,071), no more.
    bound = 1e-6 + at[0].astype(np.float64) * 2.0**-24 * 2
    for ours, theirs in zip((cos, sin), torch_rope(model, hidden(), at)):
        difference = np.abs(np.asarray(ours)[0, :, 0] - theirs[0, :, :half].numpy()).max(axis=-1)
        assert (difference <= bound).all(), difference


attend = functools.partial(attention, kernel="xla")


def test_attention_module(twins):
    model, config, params = twins
    x, at = hidden(), positions()
    block, theirs = layer(params, 1), model.model.layers[1]

    @jax.jit
    def of(block, x, at):
        o = attend(*block.before(x, Tokens.of(config, at)))
        return block.self_attn.o_proj(o.reshape(*o.shape[:2], -1))

    ours = of(block, x, at)
    normed = theirs.input_layernorm(torch.tensor(x))
    theirs, _ = theirs.self_attn(normed, torch_rope(model, x, at), causal_mask(24))
    assert relative_error(ours, theirs.detach()) < OP


def test_mlp_module(twins):
    model, config, params = twins
    x = hidden()
    ours = jax.jit(lambda mlp, x: mlp(x))(layer(params, 0).mlp, x)
    assert relative_error(ours, model.model.layers[0].mlp(torch.tensor(x)).detach()) < OP


def test_block(twins):
    model, config, params = twins
    x, at = hidden(), positions()
    ours = jax.jit(lambda block, x, at: block(x, Tokens.of(config, at), attend))(layer(params, 1), x, at)
    theirs = model.model.layers[1](
        torch.tensor(x), attention_mask=causal_mask(24), position_embeddings=torch_rope(model, x, at)
    )
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert relative_error(ours, theirs.detach()) < OP


def logits(config, params, tokens):
    """All logits, from the parts the step is made of."""
    h = params["embed_tokens"]["embedding"][tokens]
    for i in range(config.num_layers):
        h = layer(params, i)(h, Tokens.of(config, jnp.asarray(positions(*tokens.shape))), attend)
    return params["norm"](h) @ params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["embedding"].T


def test_logits_loss_and_every_gradient(twins, tmp_path):
    model, config, params = twins
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 32), dtype=np.int32)
    labels = np.where(np.random.default_rng(2).random(tokens.shape) < 0.3, IGNORED, tokens).astype(np.int32)
    model.zero_grad()
    out = model(torch.tensor(tokens).long(), labels=torch.tensor(labels).long())
    out.loss.backward()
    assert relative_error(logits(config, params, tokens), out.logits.detach()) < MODEL

    shifted = np.concatenate([labels[:, 1:], np.full((2, 1), IGNORED, np.int32)], axis=1)  # as transformers does inside
    step = make_step(config)
    batch = step.put_batch(tokens, shifted, positions(2, 32))
    count = int((shifted != IGNORED).sum())
    loss, gradients = step.loss_and_grad(*step.split(params), batch, jnp.float32(1 / count))
    assert abs(float(loss) - out.loss.item()) < MODEL * abs(out.loss.item())
    assert_trees_close(gradients, torch_gradients(model, config), MODEL)


def torch_gradients(model, config):
    """Their gradients in our tree, by a mapping written out here, independent of the converters' key table."""
    grad = lambda module: {
        ("kernel" if name == "weight" else "bias"): p.grad.numpy().T for name, p in module.named_parameters()
    }
    scale = lambda module: {"scale": module.weight.grad.numpy()}
    layers = [
        {
            "input_layernorm": scale(block.input_layernorm),
            "post_attention_layernorm": scale(block.post_attention_layernorm),
            "self_attn": {
                name: grad(getattr(block.self_attn, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            },
            "mlp": {name: grad(getattr(block.mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")},
        }
        for block in model.model.layers
    ]
    tree = {
        "embed_tokens": {"embedding": model.model.embed_tokens.weight.grad.numpy()},
        "layers": jax.tree.map(lambda *xs: np.stack(xs), *layers),
        "norm": scale(model.model.norm),
    }
    if not config.tie_word_embeddings:
        tree["lm_head"] = {"embedding": model.lm_head.weight.grad.numpy()}
    return tree


def test_gradients_with_every_feature_on_equal_torch(twins):
    """The plain profile above is one way to get there; the long-sequence one must arrive at the same place."""
    model, config, params = twins
    if config.num_heads % 4:
        pytest.fail("choose head counts that four devices divide")
    features = PLAIN.__class__(loss_tile=5, mlp_tile=3, remat=True, offload_activations=True, offload_weights=True)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 32), dtype=np.int32)
    model.zero_grad()
    out = model(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long())
    out.loss.backward()
    shifted = np.concatenate([tokens[:, 1:], np.full((1, 1), IGNORED, np.int32)], axis=1)
    step = make_step(config, sp=4, profile=features)
    placed = jax.device_put(params, step.param_shardings)
    loss, gradients = step.loss_and_grad(
        *step.split(placed), step.put_batch(tokens, shifted, positions(1, 32)), jnp.float32(1 / 31)
    )
    assert abs(float(loss) - out.loss.item()) < MODEL * abs(out.loss.item())
    assert_trees_close(gradients, torch_gradients(model, config), MODEL)


def test_legacy_rope_scaling_reads_as_rope_parameters():
    new = dict(BASE, model_type="llama", rope_parameters=LLAMA3)
    new.pop("attn_implementation")
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= dict(rope_theta=5e5, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})
    assert parse_config(old, "old") == parse_config(new, "new")
