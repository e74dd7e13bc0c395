# pytest tests/unit/test_hf_rope.py
"""RoPE in config.json <-> RopeConfig: frequencies and tables as transformers computes them; other settings are refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from alst_jax.config import UserError
from alst_jax.models.hf_config import hf_config_dict, parse_config
from alst_jax.ops.rope import inverse_frequencies, rope_tables
from tests.unit.hf_models import CONFIG, parse

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=1024)

# What a config.json may say about RoPE, in the spellings of transformers 4 and 5.
ROPES = {
    "nothing": {},
    "legacy theta": dict(rope_theta=5e5),
    "null scaling": dict(rope_theta=5e5, rope_scaling=None),
    "default": dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    "legacy linear, key type": dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=4.0)),
    "llama3": dict(
        rope_parameters=dict(rope_type="llama3", rope_theta=5e5, original_max_position_embeddings=1024, **LLAMA3)
    ),
    "legacy llama3": dict(
        rope_theta=5e5, rope_scaling=dict(rope_type="llama3", original_max_position_embeddings=1024, **LLAMA3)
    ),
    "llama3, length from the model": dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA3)),
    "theta outside the parameters": dict(rope_theta=5e5, rope_parameters=dict(rope_type="llama3", **LLAMA3)),
    "yarn": dict(rope_parameters=YARN),
    "yarn, length from the model": dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)),
    "yarn, betas": dict(rope_parameters=YARN | dict(beta_fast=16.0, beta_slow=2.0)),
    "yarn, attention factor": dict(rope_parameters=YARN | dict(attention_factor=1.5)),
    "yarn, mscale": dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.2)),
    "yarn, no truncation": dict(rope_parameters=YARN | dict(truncate=False)),
    "yarn, null truncation": dict(rope_parameters=YARN | dict(truncate=None)),
    "both spellings": dict(
        rope_scaling=dict(rope_type="linear", factor=4.0), rope_parameters=dict(type="linear", factor=4.0)
    ),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_rope_frequencies_are_those_of_transformers(rope):
    """The settings we read, put through our frequencies, against transformers from the very same config.json."""
    ours, factor = inverse_frequencies(parse(**rope).rope, 16)
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(json.loads(json.dumps(CONFIG | rope))))
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=1e-5)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6)
    assert theirs.inv_freq.dtype == torch.float32


def test_the_rope_cases_differ():
    """Else a parser that dropped the settings would pass the test above."""
    seen = {
        name: np.concatenate([f, [a]])
        for name, (f, a) in ((name, inverse_frequencies(parse(**rope).rope, 16)) for name, rope in ROPES.items())
    }
    for name in (
        "legacy theta",
        "linear",
        "llama3",
        "llama3, length from the model",
        "yarn",
        "yarn, betas",
        "yarn, attention factor",
        "yarn, mscale",
        "yarn, no truncation",
    ):
        assert sum(np.allclose(seen[name], other, rtol=1e-4) for other in seen.values()) <= 3, name
    assert not np.allclose(seen["yarn"], seen["yarn, null truncation"], rtol=1e-4)


@pytest.mark.parametrize("kind", ["proportional", "su"])
def test_other_rope_types_are_refused_with_what_works(kind):
    with pytest.raises(
        UserError,
        match=f"RoPE type '{kind}' is not implemented; these are: default, linear, dynamic, llama3, yarn, longrope",
    ):
        parse(rope_parameters=dict(rope_type=kind, rope_theta=1e4, factor=2.0))


@pytest.mark.parametrize(
    "rope, message",
    [
        (dict(rope_type="linear"), "'linear' lacks factor"),
        (dict(rope_type="llama3", factor=8.0), "lacks low_freq_factor, high_freq_factor"),
        (dict(rope_type="linear", factor=2.0, short_factor=[1.0]), "has unknown short_factor"),
        (dict(rope_type="linear", factor="two"), "'linear'.*two"),
        (dict(rope_type="default", rope_theta="big"), "rope_theta='big' must be a number"),
        (dict(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor is not implemented"),
        ("linear", "must be a JSON object"),
    ],
)
def test_wrong_rope_settings_are_refused(rope, message):
    with pytest.raises(UserError, match=message):
        parse(rope_parameters=rope)


@pytest.mark.parametrize(
    "rope, message",
    [
        (
            dict(rope_type="llama3", type="linear", factor=2.0),
            "contradict each other: rope_type='llama3', type='linear'",
        ),
        (
            dict(rope_type="longrope", short_factor=[1.0] * 7, long_factor=[1.0] * 8),
            "short_factor has 7 numbers.*needs 8",
        ),
        (
            dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[1.0] * 7 + [0]),
            "long_factor=.* must be above 0",
        ),
        (dict(rope_type="dynamic", factor=0.5), "factor=0.5 must be at least 1"),
        (dict(rope_type="dynamic"), "lacks factor"),
        (dict(rope_type="yarn", factor=2.0, beta_fast=1, beta_slow=2), "beta_fast must not be below beta_slow"),
    ],
)
def test_rope_settings_that_contradict_each_other_are_refused(rope, message):
    with pytest.raises(UserError, match=message):
        parse(rope_parameters=rope)


LINEAR = dict(rope_type="linear", factor=2.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(rope_theta=5e5, rope_parameters=dict(rope_theta=1e4)), "rope_theta=500000.0, and 10000.0 in rope_param"),
        (dict(rope_scaling=LINEAR, rope_parameters=LINEAR | dict(factor=4.0)), "contradict each other: rope_scaling="),
        (
            dict(rope_scaling=LINEAR, rope_parameters=LINEAR | dict(rope_theta=5e5)),
            "rope_theta=10000.0, and 500000.0 in",
        ),
        (dict(rope_scaling=LINEAR, rope_parameters=dict(rope_theta=1e4)), "contradict each other: rope_scaling="),
        (dict(rope_parameters=dict(rope_theta=0.0)), "rope_theta=0.0 must be above 1"),
        (dict(rope_theta=0), "rope_theta=0 must be above 0"),
    ],
)
def test_two_places_of_rope_settings_must_agree(fields, message):
    with pytest.raises(UserError, match=message):
        parse(**fields)


def test_the_same_rope_settings_in_both_places_are_read():
    both = parse(
        rope_theta=1e4, rope_scaling=dict(type="linear", factor=2.0), rope_parameters=LINEAR | dict(rope_theta=1e4)
    )
    assert both.rope == parse(rope_parameters=LINEAR | dict(rope_theta=1e4)).rope


def test_a_note_in_yarn_changes_nothing():
    yarn = dict(rope_type="yarn", factor=4.0, rope_theta=1e4)
    assert parse(rope_parameters=yarn | dict(finetuned=True)).rope == parse(rope_parameters=yarn).rope


LENGTHS = {
    "dynamic": dict(rope_type="dynamic", rope_theta=1e4, factor=3.0),
    "longrope": dict(
        rope_type="longrope",
        rope_theta=1e4,
        original_max_position_embeddings=1024,
        short_factor=[1.0 + i / 9 for i in range(8)],
        long_factor=[2.0 + i for i in range(8)],
    ),
    "longrope, factor": dict(
        rope_type="longrope",
        original_max_position_embeddings=1024,
        factor=16.0,
        short_factor=[1.0] * 8,
        long_factor=[4.0] * 8,
    ),
    "longrope, attention factor": dict(
        rope_type="longrope",
        original_max_position_embeddings=1024,
        attention_factor=1.7,
        short_factor=[1.0] * 8,
        long_factor=[4.0] * 8,
    ),
}


@pytest.mark.parametrize("rope", LENGTHS.values(), ids=LENGTHS)
def test_rope_that_depends_on_the_length_is_that_of_transformers(rope):
    """cos and sin of a short sequence, of one past the original length, of one past the model's length."""
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(CONFIG | dict(rope_parameters=dict(rope))))
    config = parse(rope_parameters=rope)
    assert parse_config(json.loads(json.dumps(hf_config_dict(config))), "config.json") == config
    seen = []
    for length in (1000, 1025, 9000):
        at = np.array([[0, 1, 7, length - 1]], np.int32)
        ours = rope_tables(config.rope, 16, jnp.asarray(at))
        for one, other in zip(ours, theirs(torch.zeros(1), torch.tensor(at).long()), strict=True):
            np.testing.assert_allclose(one[0, :3, 0], other[0, :3, :8], atol=1e-5)
            np.testing.assert_allclose(one[0, 3, 0], other[0, 3, :8], atol=length * 2.0**-23)
        seen.append(np.asarray(ours[0][0, 1:3]))
    assert not np.allclose(seen[0], seen[2], atol=1e-3)  # the length matters
    # The length may also be that of a whole batch, of which these tokens are a part.
    np.testing.assert_array_equal(
        rope_tables(config.rope, 16, jnp.asarray(at[:, :3]), jnp.int32(9000))[0][:, 1:], seen[2][None]
    )


@pytest.mark.parametrize(
    "rope",
    [
        ROPES["legacy theta"],
        ROPES["legacy llama3"],
        ROPES["yarn, betas"],
        dict(rope_parameters=dict(rope_type="linear", rope_theta=5e5, factor=3.0)),
        dict(rope_parameters=LENGTHS["dynamic"]),
        dict(rope_parameters=LENGTHS["longrope"]),
    ],
    ids=str,
)
def test_positions_up_to_16_million_in_float64(rope):
    """Angles are right to 0.003 radians. Those of a product in float32, in the last line, are not."""
    config = parse(**rope)
    at = np.array([[0, 4095, 4096, 131071, 2**20 + 1, 2**23 + 4097, 2**24 - 1]], np.int32)
    frequencies, factor = inverse_frequencies(config.rope, 16, 2**24)
    exact = at[0, :, None].astype(np.float64) * np.asarray(frequencies, np.float64)
    for ours, of in zip(rope_tables(config.rope, 16, jnp.asarray(at)), (np.cos, np.sin), strict=True):
        assert np.abs(np.asarray(ours)[0, :, 0] / factor - of(exact)).max() < 0.003
    product = at[0, :, None].astype(np.float32) * np.asarray(frequencies, np.float32)
    assert np.abs(np.cos(product.astype(np.float64)) - np.cos(exact)).max() > 0.01


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_written_and_read_back_unchanged(rope):
    config = parse(**rope, attention_bias=True)
    fields = json.loads(json.dumps(hf_config_dict(config)))
    assert parse_config(fields, "config.json") == config
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(fields))
    np.testing.assert_allclose(inverse_frequencies(config.rope, 16)[0], theirs.inv_freq.numpy(), rtol=1e-5)
