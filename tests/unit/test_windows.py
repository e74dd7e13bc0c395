# pytest tests/unit/test_windows.py
"""Windows of attention: their border is transformers'. Windows and documents: the kernel in XLA reads no keys
outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from alst_jax.hardware.machines import parse_cluster
from alst_jax.models.config import LayerKind
from alst_jax.models.hf_config import parse_config
from alst_jax.ops.attention import AttentionSpec, attention, attention_backward, attention_forward, xla
from alst_jax.planning.job import Job
from alst_jax.planning.seconds import seconds
from alst_jax.profile import Profile
from tests.helpers import relative_error, tiny

DOCUMENTS = [0, 7, 7, 60, 101, 202]


def arrays(length, batch=2, heads=4, kv_heads=2):
    make = lambda seed, n: jax.random.normal(jax.random.key(seed), (batch, length, n, 8))
    return make(0, heads), make(1, kv_heads), make(2, kv_heads), make(3, heads)


def both_ways(q, k, v, do, spec, documents):
    results = attention_forward(q, k, v, spec, documents, kernel="xla")
    return *results, *attention_backward(q, k, v, results, do, spec, documents, kernel="xla")


def masked(q, k, v, do, spec, documents):
    """The same with all scores at once and a mask."""

    def forward(q, k, v):
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("bsnh,btnh->bnst", q, k) * spec.scale_of(q.shape[3])
        scores = scores if spec.soft_cap is None else spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        tokens = np.arange(q.shape[0] * q.shape[1]).reshape(q.shape[:2])
        number = np.searchsorted(documents, tokens, side="right") if documents else np.zeros_like(tokens)
        s, t = np.arange(q.shape[1])[:, None], np.arange(q.shape[1])[None]
        mask = (number[:, :, None] == number[:, None, :]) & (t <= s if spec.causal else True)
        mask &= True if spec.window is None else np.abs(s - t) < spec.window
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
        return jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(scores), v), jax.nn.logsumexp(scores, axis=-1)

    (o, lse), pullback = jax.vjp(forward, q, k, v)
    return o, lse, *pullback((do, jnp.zeros_like(lse)))


@pytest.mark.parametrize("tile", [16, 37, 202])
@pytest.mark.parametrize(
    "spec,documents",
    [
        (AttentionSpec(window=2), None),
        (AttentionSpec(), DOCUMENTS),
        (AttentionSpec(window=5), DOCUMENTS),
        (AttentionSpec(window=7, soft_cap=1.5, scale=0.7), None),
        (AttentionSpec(window=5, causal=False), DOCUMENTS),
        (AttentionSpec(soft_cap=1.5), [0] + list(range(1, 100)) + [101, 202, 202]),
        (AttentionSpec(causal=False), DOCUMENTS),
    ],
    ids=str,
)
def test_tiles_that_read_a_part_of_the_keys_equal_a_mask(monkeypatch, spec, documents, tile):
    """Output, log-sum-exp and gradients. 2 x 101 tokens: the last tile of 16 or 37 is shorter."""
    arrays_ = arrays(101)
    monkeypatch.setattr(xla, "MAX_TILE", tile)
    offsets = None if documents is None else jnp.int32(documents)
    ours = jax.jit(lambda *x: both_ways(*x, spec, offsets))(*arrays_)
    theirs = jax.jit(lambda *x: masked(*x, spec, documents))(*arrays_)
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) < 1e-5


def tiles_of_keys(monkeypatch, length, spec, documents=None):
    """How many tiles of keys a forward and backward pass read."""
    read = []
    scores = xla.Tiles.scores

    def counted(self, *args):
        jax.debug.callback(lambda: read.append(1))
        return scores(self, *args)

    monkeypatch.setattr(xla.Tiles, "scores", counted)
    monkeypatch.setattr(xla, "MAX_TILE", 16)
    jax.block_until_ready(both_ways(*arrays(length, 1), spec, documents))
    jax.effects_barrier()
    monkeypatch.setattr(xla.Tiles, "scores", scores)
    return len(read)


def test_work_grows_with_length_times_window(monkeypatch):
    base = tiles_of_keys(monkeypatch, 512, AttentionSpec(window=32))
    assert base == 2 * (3 * 32 - 3)  # a tile and the two before it
    assert tiles_of_keys(monkeypatch, 1024, AttentionSpec(window=32)) == 2 * (3 * 64 - 3)
    assert tiles_of_keys(monkeypatch, 512, AttentionSpec(window=64)) == 2 * (5 * 32 - 10)


def test_work_follows_the_documents(monkeypatch):
    """The causal half of each document's square, in tiles of 16."""
    count = lambda lengths: tiles_of_keys(monkeypatch, 512, AttentionSpec(), jnp.int32([0, *np.cumsum(lengths), 512]))
    half = lambda n: n * (n + 1) // 2
    assert count([512]) == 2 * half(32)
    assert count([128] * 4) == 2 * 4 * half(8)
    assert count([256] + [16] * 16) == 2 * (half(16) + 16)


TYPES = dict(layer_types=["sliding_attention"])
SWITCH = dict(use_sliding_window=True, max_window_layers=0)
BORDERS = {
    "Mistral": {},
    "Qwen2": SWITCH,
    "Qwen3": SWITCH,
    "Olmo3": TYPES,
    "Gemma3Text": TYPES,
    "SmolLM3": TYPES | dict(use_sliding_window=True, no_rope_layers=[1]),
}


@pytest.mark.parametrize("name", BORDERS)
def test_the_border_is_transformers(name):
    """A token sees itself and the `sliding_window - 1` before it. In one layer, the gradient of the last token's hidden
    state with respect to each embedding says which tokens it sees."""
    fields = (
        dict(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=5,
            pad_token_id=None,
        )
        | BORDERS[name]
    )
    config = getattr(transformers, name + "Config")(**fields)
    model = getattr(transformers, name + "Model")(config)
    model.set_attn_implementation("eager")
    x = torch.randn(1, 12, 16, requires_grad=True)
    model(inputs_embeds=x, use_cache=False).last_hidden_state[0, -1].pow(3).sum().backward()
    seen = {int(i) for i in torch.nonzero(x.grad[0].abs().sum(-1))}
    assert seen == {7, 8, 9, 10, 11}
    model = parse_config(
        config.to_dict() | {"architectures": [name.removesuffix("Text") + "ForCausalLM"]}, "config.json"
    )
    (kind,) = model.kinds
    o = lambda v: attention(*arrays(12, 1, 2, 1)[:2], v, model.attention_spec(kind), kernel="xla")[0, -1].sum()
    assert set(np.flatnonzero(np.abs(jax.grad(o)(jnp.ones((1, 12, 1, 8)))[0]).sum((1, 2)))) == seen


def test_operations_of_a_step_know_windows():
    """4 x N x H operations for each pair of a query and a key that it reads; three times that with the backward
    pass."""
    full, windowed = tiny(num_layers=2), tiny(num_layers=2, layer_kinds=(LayerKind(), LayerKind(window=16)))
    pairs = sum(
        min(i + 0.5, 16) for i in range(1024)
    )  # half of a token's pair with itself, as in the causal half of S^2
    saved = 1024**2 / 2 - pairs
    assert full.flops_per_sequence(1024) - windowed.flops_per_sequence(1024) == pytest.approx(
        3 * 4 * 8 * 16 * saved, rel=1e-3
    )
    assert windowed.flops_per_sequence(16) == full.flops_per_sequence(16)


def test_plans_know_windows():
    """A layer of 4,096 tokens' window among 131,072 reads a sixteenth of the pairs: 2 x 4,096 / 131,072, less a
    corner."""
    kinds = (LayerKind(), LayerKind(window=4096))
    terms = [
        seconds(
            Job(tiny(num_layers=2, layer_kinds=k), Profile(attention="flash", compute_dtype="bfloat16"), 1, 131072),
            parse_cluster("H100-80", 125),
        )
        for k in ((), kinds)
    ]
    for name in ("attention forward", "attention backward"):
        assert terms[1][name] / terms[0][name] == pytest.approx((1 + 1 / 16) / 2, rel=2e-3)
    assert terms[1]["matmuls"] == terms[0]["matmuls"]
