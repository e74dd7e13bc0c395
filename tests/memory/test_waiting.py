# pytest tests/memory/test_waiting.py
"""Float32 gradients that wait for the next loop over layers."""

import pytest

from alst_jax.models.config import ModelConfig
from alst_jax.planning.footprint import in_backward, layers_that_wait, state_bytes, working_set
from alst_jax.planning.job import Job
from alst_jax.profile import Profile

NEMO = ModelConfig(
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=14336,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
)
EIGHT_PAIRS = *[2] * 8, *[3] * 7, 2, 1


def job(*segments: int, **changes) -> Job:
    profile = Profile(
        attention="cudnn",
        compute_dtype="bfloat16",
        offload_activations=True,
        offload_optimizer=True,
        head_chunks=4,
        loss_tile=8192,
        mlp_tile=20480,
        segment_layers=segments,
        **dict(keep_attention_on_device=4, keep_attention_on_host=24) | changes,
    )
    return Job(NEMO, profile, 1, 262144, states="int8", master="none", count_workspace=False)


@pytest.mark.parametrize(
    "segments,host,expected",
    [
        # Two rebuilt layers have no loop. The last two keep their inputs and have one.
        ((2,) * 19 + (1, 1), 24, [*range(36, -1, -2), 0]),
        # 3 layers have a loop of two, unless one of the two keeps its attention output in another memory, as layer 11.
        ((2, 2, 3, 3, 1, 3, 22, 3, 1), 24, [2, 0, 0, 4, 3, 0, 0, 1, 0]),
        ((2, 2, 3, 3, 1, 3, 22, 3, 1), 25, [2, 0, 0, 1, 0, 0, 0, 1, 0]),
    ],
)
def test_layers_that_wait(segments, host, expected):
    assert list(reversed(layers_that_wait(job(*segments, keep_attention_on_host=host).segments).values())) == expected


def test_bytes_that_wait():
    """At the first of eight segments of two layers: float32 gradients of 14 layers, 272,629,760 and two norms of 5,120
    each. With gradients in host memory: none."""
    changes = dict(keep_attention_on_device=2, keep_qkv_on_device=2)
    made, of_wait = job(*EIGHT_PAIRS, **changes), "float32 gradients of later layers"
    waiting = {term.name: term.value for term in in_backward(made)}
    assert waiting[of_wait] == 14 * 4 * (272_629_760 + 2 * 5120)
    on_host = {term.name: term.value for term in in_backward(made.changed(offload_weights=True))}
    assert on_host.get(of_wait, 0) == 0


@pytest.mark.parametrize(
    "segments,changes,gibibytes",
    [
        ((2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 3, 2, 1), {}, 25.24),
        (EIGHT_PAIRS, dict(keep_attention_on_device=2, keep_qkv_on_device=2), 31.9),
    ],
    ids=["mostly loops", "eight pairs"],
)
def test_an_estimate_beside_the_compiler(segments, changes, gibibytes):
    """The temporary bytes that XLA needed for an H100 that was not there (jax 0.12.0.1): docs/log.md."""
    made = job(*segments, **changes)
    states = sum(state_bytes(made)[:2]) / 2**30
    assert states + working_set(made) / 2**30 == pytest.approx(states + gibibytes, rel=0.02)
