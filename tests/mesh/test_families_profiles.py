# pytest tests/mesh/test_families_profiles.py
"""Each family with every feature of a memory profile on meshes equals itself without any: loss and gradients.

The reference has one document a row. The features meet the same rows, or the documents packed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.models.block import init_params
from alst_jax.models.families import FAMILIES
from alst_jax.models.hf_config import parse_config
from tests.helpers import PLAIN, assert_trees_close, initial, loss_and_grad, make_step, packed, random_batch, tiny

SHAPE = dict(
    vocab_size=96,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS = dict(layer_types=[SLIDING, FULL, SLIDING], sliding_window=20)  # shards of 16 or 32 tokens: over their borders
TWO_ROPES = WINDOWS | dict(
    rope_parameters={
        FULL: dict(rope_type="linear", factor=4.0, rope_theta=1e4),
        SLIDING: dict(rope_type="default", rope_theta=1e3),
    }
)
FIELDS = {
    "llama": dict(rope_scaling=dict(rope_type="dynamic", factor=2.0), max_position_embeddings=32),
    "qwen2": WINDOWS | dict(use_sliding_window=True),
    "qwen3": {},
    "mistral": dict(sliding_window=20),
    "seed_oss": dict(attention_out_bias=True),
    "smollm3": dict(no_rope_layer_interval=2),
    "granite": dict(embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.4, logits_scaling=7.0),
    "olmo2": {},
    "olmo3": TWO_ROPES,
    "gemma3_text": TWO_ROPES | dict(query_pre_attn_scalar=11, final_logit_softcapping=1.5),
    "phi3": dict(
        partial_rotary_factor=0.5,
        original_max_position_embeddings=32,
        rope_scaling=dict(type="longrope", short_factor=[1.0, 1.0], long_factor=[1.5, 4.0]),
    ),
}
EVERYTHING = dict(
    loss_tile=7,
    mlp_tile=5,
    remat=True,
    offload_activations=True,
    offload_weights=True,
    offload_optimizer=True,
    keep_attention_on_host=1,
    keep_attention_on_device=1,
    keep_qkv_on_device=1,
    keep_mlp_on_device=1,
)
# Lengths of the documents of each row: a whole row, documents of one token, over borders of shards, padding behind. One
# document a row these are 8 rows.
ROWS, LENGTH = [[64], [20, 1, 30], [33, 31], [40, 16]], 64
PROFILES = {
    "dp 2, sp 2": ((2, 2), dict(segment_layers=(2, 1), head_chunks=4, **EVERYTHING)),
    "sp 4": ((1, 4), dict(segment_layers=(3,), head_chunks=2, **EVERYTHING)),
}


def model_of(family):
    raw = SHAPE | FIELDS[family] | dict(model_type=family, architectures=[FAMILIES[family].architecture])
    return parse_config(raw, "config.json")


@pytest.fixture(scope="module")
def plain():
    """family -> its loss and gradients without features on one document a row, computed once."""
    done = {}

    def of(family):
        if family not in done:
            step = make_step(model_of(family), profile=PLAIN)
            done[family] = loss_and_grad(step, initial(step), packed(ROWS, LENGTH, 1)[1])
        return done[family]

    return of


def test_all_families_are_here():
    assert FIELDS.keys() == FAMILIES.keys()


# Every family on one of the two meshes, each feature on both.
@pytest.mark.parametrize("documents", ["packed", "alone"])
@pytest.mark.parametrize("family,profile", [(family, list(PROFILES)[i % 2]) for i, family in enumerate(FIELDS)])
def test_every_feature_changes_nothing(plain, family, profile, documents):
    mesh, changes = PROFILES[profile]
    batch = packed(ROWS, LENGTH, mesh[0])[documents == "alone"]
    step = make_step(model_of(family), *mesh, profile=dataclasses.replace(PLAIN, **changes))
    loss, gradients = loss_and_grad(step, initial(step), batch)
    expected = plain(family)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    assert_trees_close(gradients, expected[1], 1e-4)


@pytest.mark.parametrize("changes", [dict(remat=False), dict(stack="plain", remat=True, mlp_tile=5)], ids=str)
def test_norms_over_all_heads_in_groups_of_heads_without_the_own_backward_pass(plain, changes):
    """JAX differentiates the mean squares of all heads through each group of heads."""
    model = model_of("olmo2")
    step = make_step(model, 1, 2, profile=dataclasses.replace(PLAIN, head_chunks=4, **changes))
    loss, gradients = loss_and_grad(step, initial(step), packed(ROWS, LENGTH, 1)[0])
    np.testing.assert_allclose(loss, plain("olmo2")[0], rtol=1e-5)
    assert_trees_close(gradients, plain("olmo2")[1], 1e-4)


# One option each, changed in a model that has none: each changes the loss, so that none is dropped on the way.
OPTIONS = [
    dict(qk_norm="head"),
    dict(qk_norm="all heads"),
    dict(norms="after"),
    dict(norms="both"),
    dict(activation="gelu_tanh"),
    dict(embedding_multiplier=3.0),
    dict(residual_multiplier=0.4),
    dict(logits_divisor=0.1),
    dict(logits_soft_cap=0.1),
    dict(attention_scale=5.0),
    dict(attention_soft_cap=0.01, attention_scale=5.0),
]


# By default one: test_families_parity has the others in its default cases.
@pytest.mark.parametrize("options", [OPTIONS[-1:], pytest.param(OPTIONS, marks=pytest.mark.slow)], ids=["one", "all"])
def test_each_option_changes_the_loss(options):
    def loss(option):
        step = make_step(tiny(initializer_range=0.3, num_layers=1, **option))
        params = step.split(init_params(step.model, jnp.float32, jax.random.key(0)))
        return float(step.loss(*params, step.put_batch(**random_batch()), jnp.float32(0.01)))

    losses = [loss(option) for option in [{}, *options]]
    assert len({round(loss, 4) for loss in losses}) == len(losses), losses
