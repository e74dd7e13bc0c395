# pytest tests/parity/test_families_parity.py
"""Each family against transformers, from random configs of odd shape: logits, loss, every gradient, files there and
back.

Windows are 7 tokens at length 33, so that each window has a border inside of the sequence. `test_a_window_has_a_border`
finds the border itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch  # in the test extra: parity must fail, not skip, without it
import transformers
from safetensors.numpy import load_file

from alst_jax.config import IGNORED
from alst_jax.models.block import Tokens
from alst_jax.models.config import LayerKind
from alst_jax.models.hf_config import hf_config_dict, model_config, parse_config
from alst_jax.models.hf_saving import save_params
from alst_jax.models.hf_weights import load_params
from alst_jax.models.weight_files import find_tensors
from alst_jax.ops.attention import attention
from alst_jax.ops.cross_entropy import LogitScaling
from alst_jax.ops.tiling import token_rows
from tests.helpers import assert_trees_close, leaves, make_step, relative_error, torch_gradients

BASE = dict(
    vocab_size=101,
    hidden_size=60,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    max_position_embeddings=256,
    attn_implementation="eager",
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
MHA = dict(num_attention_heads=5, num_key_value_heads=5, head_dim=12, tie_word_embeddings=True)
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = LayerKind(window=7)
LONGROPE = dict(
    head_dim=10,
    rope_parameters=dict(
        rope_type="longrope",
        rope_theta=1e3,
        partial_rotary_factor=0.8,
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[1.5, 2.5, 4.0, 8.0],
    ),
)
GRANITE = dict(embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.4, logits_scaling=7.0)
# Name of transformers' classes, changes of BASE, options that ours must have.
CASES = {
    "qwen3": ("Qwen3", {}, dict(qk_norm="head")),
    "qwen3, tied, windows": (
        "Qwen3",
        MHA | dict(attention_bias=True, use_sliding_window=True, sliding_window=7, max_window_layers=1),
        dict(attention_bias=True, layer_kinds=(LayerKind(), WINDOW, WINDOW)),
    ),
    "qwen2, windows": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=7, layer_types=[SLIDING, FULL, FULL]),
        dict(layer_kinds=(WINDOW, LayerKind(), LayerKind())),
    ),
    "mistral": ("Mistral", dict(sliding_window=None), dict(layer_kinds=())),
    "mistral, tied, window": ("Mistral", MHA | dict(sliding_window=7), dict(layer_kinds=(WINDOW,) * 3)),
    "seed_oss": ("SeedOss", dict(attention_dropout=0, residual_dropout=0), dict(qkv_bias=True, o_bias=False)),
    "seed_oss, tied, output bias": (
        "SeedOss",
        MHA
        | dict(attention_dropout=0, residual_dropout=0, attention_bias=False, attention_out_bias=True, mlp_bias=True),
        dict(qkv_bias=False, o_bias=True, mlp_bias=True),
    ),
    "smollm3": (
        "SmolLM3",
        dict(no_rope_layer_interval=2),
        dict(tie_word_embeddings=True, layer_kinds=(LayerKind(), LayerKind(rope=False), LayerKind())),
    ),
    "smollm3, untied, windows": (
        "SmolLM3",
        MHA
        | dict(
            tie_word_embeddings=False,
            no_rope_layers=[0, 1, 1],
            use_sliding_window=True,
            sliding_window=7,
            attention_bias=True,
        ),
        dict(layer_kinds=(LayerKind(False, 7), LayerKind(), LayerKind())),
    ),
    "granite": ("Granite", GRANITE, dict(attention_scale=0.3, embedding_multiplier=3.0, logits_divisor=7.0)),
    "granite, tied, biases": (
        "Granite",
        MHA | GRANITE | dict(attention_bias=True, mlp_bias=True),
        dict(residual_multiplier=0.4),
    ),
    "olmo2": ("Olmo2", {}, dict(norms="after", qk_norm="all heads")),
    "olmo2, tied, biases": ("Olmo2", MHA | dict(attention_bias=True), dict(attention_bias=True)),
    "olmo3": (
        "Olmo3",
        dict(
            sliding_window=7,
            num_hidden_layers=4,
            rope_parameters={
                FULL: dict(rope_type="yarn", rope_theta=5e4, factor=4.0, original_max_position_embeddings=64),
                SLIDING: dict(rope_type="default", rope_theta=1e3),
            },
        ),
        dict(layer_kinds=(WINDOW,) * 3 + (LayerKind(table=1),), qk_norm="all heads"),
    ),
    "olmo3, tied": (
        "Olmo3",
        MHA | dict(sliding_window=7, layer_types=[FULL, SLIDING, FULL]),
        dict(layer_kinds=(LayerKind(), WINDOW, LayerKind()), more_ropes=()),
    ),
    "phi3": (
        "Phi3",
        MHA
        | dict(sliding_window=7, rope_parameters=dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=0.5)),
        dict(layer_kinds=(WINDOW,) * 3),
    ),
    "phi3, untied, longrope": ("Phi3", LONGROPE | dict(original_max_position_embeddings=32), dict(layer_kinds=())),
    "phi3, untied, longrope of a short text": (
        "Phi3",
        LONGROPE | dict(original_max_position_embeddings=33),
        dict(tie_word_embeddings=False),
    ),
    "gemma3": (
        "Gemma3",
        dict(
            sliding_window=7,
            layer_types=[SLIDING, FULL, SLIDING],
            query_pre_attn_scalar=11,
            final_logit_softcapping=1.5,
            attn_logit_softcapping=2.0,
            rope_parameters={
                FULL: dict(rope_type="linear", rope_theta=1e5, factor=8.0),
                SLIDING: dict(rope_type="default", rope_theta=1e3),
            },
        ),
        dict(
            layer_kinds=(WINDOW, LayerKind(table=1), WINDOW),
            logits_soft_cap=1.5,
            norms="both",
            norm_offset=1.0,
            attention_scale=11**-0.5,
            tie_word_embeddings=True,
            activation="gelu_tanh",
        ),
    ),
    "gemma3, untied, biases": (
        "Gemma3",
        MHA | dict(attention_bias=True, sliding_window=7, tie_word_embeddings=False),
        dict(layer_kinds=(WINDOW,) * 3, more_ropes=(), logits_soft_cap=None),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def twins(request, tmp_path_factory):
    """A random torch model, its directory, its config here, and its weights here."""
    name, changes, options = CASES[request.param]
    torch.manual_seed(0)
    find = lambda suffix: getattr(transformers, name + suffix, None)
    config = (find("TextConfig") or find("Config"))(**BASE | changes)
    model = find("ForCausalLM")(config).eval()
    for parameter in model.parameters():  # zero biases and unit norms would hide mistakes
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1) * 0.5
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    config = model_config(directory)
    assert {option: getattr(config, option) for option in options} == options
    return model, directory, config, load_params(directory, config, make_step(config).params)


def logits(config, params, tokens):
    """By a Python loop over layers."""
    h = params["embed_tokens"]["embedding"][tokens] * config.embedding_multiplier
    extra = Tokens.of(config, jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1)))
    for i, kind in enumerate(config.layer_kinds or (LayerKind(),) * config.num_layers):
        block = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        h = block(h, extra, lambda *qkv, kind=kind: attention(*qkv, config.attention_spec(kind), kernel="xla"), kind)
    head = params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["embedding"]
    scale = LogitScaling(config.logits_divisor, config.logits_soft_cap)
    return scale(token_rows(params["norm"](h) @ head.T)).reshape(*tokens.shape, -1)


def unfused(gradients, config):
    """Those of Phi-3's fused projections under the names of their parts."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    borders = {
        "self_attn.qkv_proj": (("q", "k", "v"), [queries, queries + keys]),
        "mlp.gate_up_proj": (("gate", "up"), [config.intermediate_size]),
    }
    for name, (parts, at) in borders.items():
        if (whole := gradients.pop(f"layers.{name}.kernel", None)) is not None:
            module = name.split(".")[0]
            gradients |= {
                f"layers.{module}.{part}_proj.kernel": x
                for part, x in zip(parts, np.split(whole, at, axis=-1), strict=True)
            }
    return gradients


def test_logits(twins):
    model, _, config, params = twins
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 33), dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens).long(), use_cache=False).logits
    ours = jax.jit(lambda params, tokens: logits(config, params, tokens))(params, tokens)
    assert relative_error(ours, expected) < 1e-4


def test_loss_and_every_gradient(twins):
    model, _, config, params = twins
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 33), dtype=np.int32)
    labels = np.where(np.random.default_rng(2).random(tokens.shape) < 0.3, IGNORED, tokens).astype(np.int32)
    model.zero_grad()
    out = model(torch.tensor(tokens).long(), labels=torch.tensor(labels).long(), use_cache=False)
    out.loss.backward()
    shifted = np.concatenate([labels[:, 1:], np.full((2, 1), IGNORED, np.int32)], axis=1)  # as transformers does inside
    step = make_step(config)
    positions = np.tile(np.arange(33, dtype=np.int32), (2, 1))
    loss, gradients = step.loss_and_grad(
        *step.split(params), step.put_batch(tokens, shifted, positions), jnp.float32(1 / (shifted != IGNORED).sum())
    )
    assert abs(float(loss) - out.loss.item()) < 1e-4 * abs(out.loss.item())
    expected = unfused(torch_gradients(model), config)
    assert expected.keys() == leaves(gradients).keys()
    assert_trees_close(gradients, expected, 1e-4)


def test_files_come_back_bit_for_bit(twins, tmp_path):
    model, directory, config, params = twins
    assert config.num_params == model.num_parameters()
    save_params(jax.tree_util.tree_leaves_with_path(params), config, tmp_path)
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() == find_tensors(tmp_path).keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_config_there_and_back(twins):
    """And transformers reads the fields that we write as the model that it saved."""
    model, _, config, _ = twins
    fields = hf_config_dict(config)
    assert parse_config(fields, "config.json") == config
    theirs = type(model.config).from_dict(fields | {"pad_token_id": None})  # else above this vocabulary
    new = type(model)(theirs)
    new.load_state_dict(model.state_dict())
    new.set_attn_implementation("eager")
    tokens = torch.arange(33)[None]
    with torch.no_grad():
        assert relative_error(new.eval()(tokens).logits, model(tokens).logits) < 1e-6
