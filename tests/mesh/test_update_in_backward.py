# pytest tests/mesh/test_update_in_backward.py
"""A step whose gradients are never stored equals a plain step that stores them, and stops at what is not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax import trainer
from alst_jax.config import TrainConfig, UserError
from alst_jax.data.batches import TrainingBatches
from alst_jax.data.documents import Sequence
from alst_jax.metrics import MetricsLog
from alst_jax.optim.adamw import AdamW
from alst_jax.processes.stop import StopSignal
from alst_jax.run import make_profile
from tests.helpers import PLAIN, QUIET_ADAMW, assert_trees_close, initial, leaf, make_step, random_batch, tiny, to_numpy
from tests.mesh.test_profiles import HOST, TILES, name

MODEL = tiny(num_layers=4, attention_bias=False, mlp_bias=False)
REMAT = dataclasses.replace(PLAIN, remat=True, offload_weights=True, offload_optimizer=True)
IN_SEGMENTS = dict(segment_layers=(2,), **TILES, **HOST)
UNCLIPPED = dataclasses.replace(QUIET_ADAMW, clip_norm=0.0)


@functools.cache
def step_of(mesh, tied, **changes):
    return made(mesh, tied, dataclasses.replace(REMAT, **changes))


@functools.cache
def plain(tied):
    """One device, every feature off: little to compile."""
    return made((1, 1), tied, PLAIN)


def made(mesh, tied, profile):
    model = dataclasses.replace(MODEL, tie_word_embeddings=tied)
    return make_step(model, *mesh, profile=profile, optimizer=UNCLIPPED)


def run(step, in_backward, steps=3):
    """(losses, norms, weights, optimizer state) of some steps on one batch."""
    params = initial(step)
    state, batch = step.init_optimizer(params), step.put_batch(**random_batch(step.model))
    scale, rate, losses, norms = jnp.float32(1 / 200), jnp.float32(1e-2), [], []
    for _ in range(steps):
        if in_backward:
            loss, norm, finite, layers, params, state = step.update_in_backward(
                *step.split(params), state, batch, scale, rate
            )
            assert finite and layers == step.model.num_layers
        else:
            loss, gradients = step.loss_and_grad(*step.split(params), batch, scale)
            norm = step.gradient_norm(gradients)
            params, state = step.update(params, gradients, state, norm, rate)
        losses.append(float(loss))
        norms.append(float(norm))
    return losses, norms, to_numpy(params), to_numpy(state)


@pytest.mark.parametrize(
    "mesh,changes",
    [
        ((1, 1), {}),
        ((1, 1), dict(segment_layers=(2,), head_chunks=2)),
        ((2, 2), IN_SEGMENTS),
        (
            (1, 4),
            dict(
                segment_layers=(3, 1),
                keep_attention_on_host=2,
                keep_attention_on_device=1,
                keep_qkv_on_device=1,
                keep_mlp_on_device=1,
                **TILES,
                **HOST,
            ),
        ),
        ((1, 1), dict(segment_layers=(2, 1, 1), keep_attention_on_device=1, head_chunks=4)),
    ],
    ids=name,
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_equals_the_update_behind_it(mesh, changes, tied):
    step = step_of(mesh, tied, **changes)
    losses, norms, weights, state = run(step, in_backward=True)
    same_losses, same_norms, same_weights, same_state = run(plain(tied), in_backward=False)
    np.testing.assert_allclose(losses, same_losses, rtol=1e-5)
    np.testing.assert_allclose(norms, same_norms, rtol=1e-5)
    assert_trees_close(weights, same_weights, 1e-5)
    assert_trees_close(state, same_state, 1e-4)


@pytest.mark.parametrize("states", ["int8", "bfloat16"])
def test_draws_the_same_random_bits(states):
    """Streamed layer by layer, narrow states are rounded alike; with other bits about half of the codes would
    differ."""
    profile = dataclasses.replace(REMAT, segment_layers=(2,), **HOST)
    step = make_step(
        tiny(num_layers=4, intermediate_size=128), profile=profile, optimizer=AdamW(clip_norm=0.0, states=states)
    )
    ours, same = (run(step, in_backward, steps=1)[3] for in_backward in (True, False))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(same), strict=True):
        if one.dtype != np.float32:
            assert np.mean(one != other) < 1e-3


def test_the_flag_reaches_the_profile():
    config = TrainConfig(update_in_backward=True, clip_norm=0.0, offload_weights=True, offload_optimizer=True)
    assert make_profile(config, jnp.dtype(jnp.float32), MODEL).update_in_backward
    assert not make_profile(TrainConfig(), jnp.dtype(jnp.float32), MODEL).update_in_backward


@pytest.fixture(scope="module")
def in_segments():
    """The step that `test_equals_the_update_behind_it` compiles by default."""
    return step_of((2, 2), False, **IN_SEGMENTS)


def poisoned(step, scale, spoil=lambda params: params):
    """(finite, layers updated, indices of the layers that changed, whether anything else did) of one step."""
    params = jax.device_put(spoil(to_numpy(initial(step))), step.param_shardings)
    before, state = to_numpy(params), step.init_optimizer(params)
    _, _, finite, layers, params, state = step.update_in_backward(
        *step.split(params), state, step.put_batch(**random_batch(MODEL)), jnp.float32(scale), jnp.float32(1e-2)
    )
    after = to_numpy(params)
    kernel = lambda tree: leaf(tree, "layers.mlp.up_proj.kernel")
    changed = [i for i in range(4) if not np.array_equal(kernel(before)[i], kernel(after)[i], equal_nan=True)]
    rest = [
        name
        for name in ("embed_tokens", "norm", "lm_head")
        if any(
            not np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.tree.leaves, (before[name], after[name])))
        )
    ]
    return bool(finite), int(layers), changed, rest, int(state["count"])


def test_nothing_is_updated_where_the_loss_is_not_finite(in_segments):
    spoil = lambda params: params | {"norm": jax.tree.map(lambda x: x * np.nan, params["norm"])}
    assert poisoned(in_segments, 1.0, spoil) == (False, 0, [], [], 0)
    assert poisoned(in_segments, 1 / 200) == (True, 4, [0, 1, 2, 3], ["embed_tokens", "norm", "lm_head"], 1)


def test_update_stops_at_the_layer_where_the_norm_overflows(in_segments):
    step = plain(tied=False)
    _, gradients = step.loss_and_grad(*step.split(initial(step)), step.put_batch(**random_batch(MODEL)), jnp.float32(1))
    gradients = to_numpy(gradients)
    squares = lambda tree: sum(float(np.sum(np.square(x.astype(np.float64)))) for x in jax.tree.leaves(tree))
    head = squares((gradients["norm"], gradients["lm_head"]))
    upper = head + squares(jax.tree.map(lambda g: g[2:], gradients["layers"]))
    lower = upper + squares(jax.tree.map(lambda g: g[1:2], gradients["layers"]))
    scale = float(np.sqrt(3.4e38 / ((upper + lower) / 2)))  # the sum of squares passes float32's range in layer 1
    assert poisoned(in_segments, scale) == (False, 2, [2, 3], [], 0)


def train_until_it_is_not_finite(step, monkeypatch, tmp_path, updated):
    """(error, steps that were saved) of a run whose second step meets what is not finite after so many updated
    layers."""
    params = initial(step)
    state, real, calls, saved = trainer.TrainState.begin(step, params), step.update_in_backward, [], []

    def second_is_not(*args):
        result = real(*args)
        calls.append(result)
        return result if len(calls) == 1 else (result[0], jnp.inf, jnp.bool(False), jnp.int32(updated), *result[4:])

    monkeypatch.setattr(step, "update_in_backward", second_is_not)
    monkeypatch.setattr(step, "profile", dataclasses.replace(step.profile, update_in_backward=True))  # for the trainer
    tokens = np.arange(64, dtype=np.int32)
    data = TrainingBatches([Sequence(tokens, tokens)] * 16, 64, 4, 1, 0, 0)  # shapes as in `poisoned`: compiled once
    log = MetricsLog(tmp_path, 0)
    with pytest.raises(UserError) as error, StopSignal() as stop:
        trainer.train(
            TrainConfig(seq_len=64, learning_rate=1e-3),
            step,
            state,
            4,
            trainer.Data(data),
            log,
            lambda state: saved.append(state.step),
            stop,
        )
    log.close()
    return str(error.value), saved


def test_a_step_that_was_not_applied_leaves_the_state_before_it(in_segments, monkeypatch, tmp_path):
    error, saved = train_until_it_is_not_finite(in_segments, monkeypatch, tmp_path, updated=0)
    assert "first met in the loss, the head or the last layer" in error and "step 1, is saved" in error
    assert saved == [1]


@pytest.mark.parametrize("updated,where", [(3, "layer 0 of 4"), (4, "the embedding")])
def test_a_step_that_was_applied_in_part_is_not_saved(updated, where, in_segments, monkeypatch, tmp_path):
    error, saved = train_until_it_is_not_finite(in_segments, monkeypatch, tmp_path, updated)
    assert f"first met in {where}, going back" in error and "nothing is saved; go on from the beginning" in error
    assert saved == []
