# pytest tests/mesh/test_preflight.py     (-m slow: all planted faults and ten sound set-ups)
"""--check-numerics finds eight planted faults and passes ten sound set-ups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax import in_backward
from alst_jax.config import IGNORED
from alst_jax.models import block
from alst_jax.models.config import LayerKind
from alst_jax.ops.attention import Kernel, xla
from alst_jax.ops.cross_entropy import cross_entropy
from alst_jax.ops.rope import RopeConfig
from alst_jax.optim.adamw import AdamW
from alst_jax.parallel import ulysses
from alst_jax.parallel.mesh import SEQ
from alst_jax.preflight import check, rope64
from alst_jax.preflight.attention import check_attention
from alst_jax.preflight.collectives import check_collectives
from alst_jax.preflight.ends import check_batch, check_data, check_ends, check_rope
from alst_jax.preflight.subject import Subject
from alst_jax.preflight.tokenwise import check_tokenwise
from alst_jax.preflight.update import check_in_backward
from alst_jax.profile import Profile
from alst_jax.stack import ends, layer
from alst_jax.step import TrainStep
from tests.helpers import make_step, tiny

TILES = Profile(loss_tile=16, mlp_tile=16)
SERVES = xla.KERNEL.serves


def subject(model=None, dp=1, sp=1, profile=TILES, documents=0, rows=2, **options):
    step = make_step(model or tiny(num_layers=2), dp=dp, sp=sp, profile=profile, **options)
    return Subject(step, rows, 64, documents)


def bfloat16(profile=TILES):
    return dict(profile=dataclasses.replace(profile, compute_dtype="bfloat16"), dtype=jnp.bfloat16)


def failed(rows):
    return [row.name for row in rows if not row.passed]


# ------------------------------------------------------------------------------------------------------- planted faults

LIMIT = 56  # tokens, past which the kernel's index wraps


def wraps(q, k, v, o, lse, do, spec, documents=None):
    dq, dk, dv = xla.backward(q, k, v, o, lse, do, spec, documents)
    return jnp.where((jnp.arange(q.shape[1]) < LIMIT)[None, :, None, None], dq, jnp.roll(dq, LIMIT, axis=1)), dk, dv


def test_a_kernel_whose_index_wraps(monkeypatch):
    kernel = Kernel("wraps", xla.forward, wraps, SERVES)
    assert failed(check_attention(subject(profile=dataclasses.replace(TILES, attention=kernel)))) == ["attention: dq"]


@pytest.mark.slow
def test_a_border_of_documents_that_is_ignored():
    kernel = Kernel(
        "joins",
        lambda q, k, v, spec, documents: xla.forward(q, k, v, spec, None),
        lambda q, k, v, o, lse, do, spec, documents: xla.backward(q, k, v, o, lse, do, spec, None),
        SERVES,
    )
    rows = check_attention(subject(profile=dataclasses.replace(TILES, attention=kernel), documents=8))
    assert failed(rows) == ["attention: output", "attention: dq", "attention: dk", "attention: dv"]


@pytest.mark.slow
def test_a_mean_of_the_means_of_tiles(monkeypatch):
    def mean_of_means(h, table, labels, tile, scaling):
        tiles = [(h[at : at + tile], labels[at : at + tile]) for at in range(0, len(h), tile)]
        count = lambda labels: jnp.maximum(jnp.sum(labels != IGNORED), 1)
        means = [cross_entropy(part, table, labels, scaling) / count(labels) for part, labels in tiles]
        return sum(means) / len(means) * count(labels)

    monkeypatch.setattr(ends, "tiled_cross_entropy", mean_of_means)
    assert {"loss: gradient of the hidden state", "head: gradient of the table"} <= set(failed(check_ends(subject())))


@pytest.mark.slow
def test_sums_in_bfloat16(monkeypatch):
    narrow = lambda s, d: (s.astype(jnp.bfloat16) + d.astype(jnp.bfloat16)).astype(s.dtype)
    monkeypatch.setattr(layer, "add_parts", lambda sums, parts: jax.tree.map(narrow, sums, parts))
    assert failed(check_tokenwise(subject(**bfloat16()))) == ["sums over tiles and devices"]


def test_a_label_that_is_not_shifted_at_the_border_of_a_shard(monkeypatch):
    real = TrainStep.put_batch

    def put_batch(self, tokens, labels, positions, documents=None):
        labels, last = labels.copy(), np.arange(1, 3) * (tokens.shape[1] // 2) - 1
        labels[:, last] = tokens[:, last]
        return real(self, tokens, labels, positions, documents)

    sound = subject(sp=2)
    assert not failed(check_batch(sound))
    monkeypatch.setattr(TrainStep, "put_batch", put_batch)
    assert failed(check_batch(sound)) == ["batch on the devices, elements that differ"]
    given = {name: array[None] for name, array in sound.batch.items()}
    assert not failed(check_data(given, 64))
    given["labels"] = np.where(np.arange(64) == 31, given["tokens"], given["labels"])
    assert failed(check_data(given, 64)) == ["labels of the first batch that are not the next token"]


@pytest.mark.slow
def test_a_gradient_sp_times_too_large(monkeypatch):
    real = layer.scatter
    monkeypatch.setattr(layer, "scatter", lambda g, *rest: real(g, *rest) * jax.lax.axis_size(SEQ))
    assert failed(check_collectives(subject(sp=2))) == ["reduce-scatter of gradients"]


def test_rope_in_bfloat16(monkeypatch):
    real = block.rope_tables
    narrow = lambda *args: tuple(x.astype(jnp.bfloat16).astype(jnp.float32) for x in real(*args))
    sound = subject()
    assert not failed(check_rope(sound))
    monkeypatch.setattr(block, "rope_tables", narrow)
    assert failed(check_rope(sound)) == ["rope: cos and sin to position 63"]


@pytest.mark.slow
def test_kv_heads_that_are_repeated_in_the_wrong_order(monkeypatch):
    def tiled(q, k, v, axis):
        repeats = max(1, jax.lax.axis_size(axis) // k.shape[2])
        k, v = (jnp.tile(x, (1, 1, repeats, 1)) for x in (k, v))
        return tuple(ulysses.to_heads(x, axis) for x in (q, k, v))

    monkeypatch.setattr(ulysses, "qkv_to_heads", tiled)
    assert failed(check_attention(subject(sp=4))) == [
        "attention: output",
        "attention: dq",
        "attention: dk",
        "attention: dv",
    ]


@pytest.mark.slow
def test_an_update_in_the_backward_pass_against_the_gradient(monkeypatch):
    """Beside the eight: with --update-in-backward the gradient's own program does not run."""
    early = dataclasses.replace(TILES, update_in_backward=True, offload_weights=True, offload_optimizer=True)
    sound = subject(profile=early, optimizer=AdamW(clip_norm=0.0))
    assert not failed(check_in_backward(sound)) and not check_in_backward(subject())
    real = in_backward.LayerUpdates.write
    monkeypatch.setattr(
        in_backward.LayerUpdates,
        "write",
        lambda self, store, i, shards, gradients: real(self, store, i, shards, jax.tree.map(jnp.negative, gradients)),
    )
    planted = subject(profile=early, optimizer=AdamW(clip_norm=0.0))
    assert failed(check_in_backward(planted)) == [
        "update in the backward pass: part of the elements that move otherwise"
    ]


# ------------------------------------------------------------------------------------------------------- sound set-ups

GEMMA = tiny(
    attention_bias=False,
    mlp_bias=False,
    qk_norm="head",
    norms="both",
    norm_offset=1.0,
    activation="gelu_tanh",
    embedding_multiplier=8.0,
    attention_scale=0.2,
    logits_soft_cap=5.0,
    tie_word_embeddings=True,
    layer_kinds=(LayerKind(window=9), LayerKind(window=9), LayerKind(table=1)),
    more_ropes=(RopeConfig(theta=1e6),),
)
OLMO = tiny(
    attention_bias=False,
    mlp_bias=False,
    qk_norm="all heads",
    norms="after",
    rope=RopeConfig("yarn", factor=4.0, original_max_position_embeddings=32),
)
GRANITE = tiny(
    residual_multiplier=0.22,
    logits_divisor=8.0,
    attention_scale=0.05,
    tie_word_embeddings=True,
    rope=RopeConfig(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
)
SMOLLM = tiny(layer_kinds=(LayerKind(), LayerKind(rope=False), LayerKind()), num_kv_heads=4)
OFFLOADED = Profile(loss_tile=24, mlp_tile=20, offload_activations=True, offload_weights=True, offload_optimizer=True)
SOUND = {
    "llama": dict(),
    "llama, 1 x 4, documents": dict(sp=4, documents=10),
    "llama, bfloat16, 2 x 2": dict(dp=2, sp=2, **bfloat16()),
    "gemma, 2 x 2": dict(model=GEMMA, dp=2, sp=2),
    "olmo, chunks, 1 x 2": dict(model=OLMO, sp=2, profile=dataclasses.replace(TILES, head_chunks=2)),
    "granite, bfloat16, narrow states": dict(
        model=GRANITE, optimizer=AdamW(states="int8", master="low-bits"), **bfloat16()
    ),
    "smollm, segments, kept attention": dict(
        model=SMOLLM, profile=dataclasses.replace(TILES, segment_layers=(2,), keep_attention_on_device=1)
    ),
    "llama, all in host memory, bfloat16, no master": dict(
        dp=2, optimizer=AdamW(states="bfloat16", master="none"), **bfloat16(OFFLOADED)
    ),
    "llama, untiled, frozen, plain stack": dict(
        profile=Profile(loss_tile=None, mlp_tile=None, stack="plain"), freeze="embed_tokens|lm_head", sp=2
    ),
    "llama, dynamic rope, gradients reduced in bfloat16": dict(
        model=tiny(rope=RopeConfig("dynamic", factor=2.0, max_position_embeddings=32)),
        dp=2,
        profile=dataclasses.replace(TILES, reduce_dtype="bfloat16"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_set_up_passes(name):
    rows = list(check.run_checks(subject(**SOUND[name]), 4, None, 64))
    assert not failed(rows) and len(rows) >= 17


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig("linear", factor=4.0),
        OLMO.rope,
        GRANITE.rope,
        RopeConfig("dynamic", factor=2.0, max_position_embeddings=32),
        RopeConfig(
            "longrope", factor=2.0, original_max_position_embeddings=32, short_factor=(1.0,) * 8, long_factor=(2.0,) * 8
        ),
    ],
    ids=lambda rope: rope.rope_type,
)
def test_frequencies_of_the_check_are_those_of_transformers(rope):
    """A second independent witness: transformers computes them in float32."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = {name: value for name, value in dataclasses.asdict(rope).items() if value is not None}
    fields["rope_theta"] = rope.theta
    for name in ("theta", "max_position_embeddings"):
        fields.pop(name, None)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        rope_parameters=fields,
        max_position_embeddings=rope.max_position_embeddings or 64,
    )
    config.rope_parameters["original_max_position_embeddings"] = rope.original_max_position_embeddings
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope.rope_type](config, "cpu", seq_len=64)
    np.testing.assert_allclose(rope64.frequencies(rope, 16, 64), frequencies.numpy(), rtol=2e-6)
    assert rope64.factor(rope) == pytest.approx(factor)


def test_a_part_of_each_head_is_turned():
    """Partial rotary embedding (Phi): frequencies and rotation of the check against the program's own."""
    from alst_jax.ops.rope import inverse_frequencies
    from alst_jax.preflight import reference

    rope = RopeConfig(partial_rotary_factor=0.75)
    frequencies, _ = inverse_frequencies(rope, 16, jnp.int32(64))
    np.testing.assert_allclose(rope64.frequencies(rope, 16, 64), np.asarray(frequencies), rtol=2e-6)
    x = jnp.arange(32, dtype=jnp.float32).reshape(2, 1, 16)
    cos, sin = jnp.zeros((2, 6)), jnp.ones((2, 6))  # a quarter turn
    turned = np.asarray(reference.turn(x, cos, sin))
    np.testing.assert_array_equal(turned, np.concatenate([-x[..., 6:12], x[..., :6], x[..., 12:]], axis=-1))
