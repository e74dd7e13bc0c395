# pytest tests/mesh/test_paper_validation.py
"""ALST's own validation, small: 8-way data parallel without features against 8-way sequence parallel with all of them,
accumulating over the same 8 samples: the loss curves coincide."""

import numpy as np

from alst_jax.profile import Profile
from alst_jax.stack.batch import count_labels
from alst_jax.trainer import TrainState, optimizer_step
from tests.helpers import PLAIN, initial, make_step, random_batch, tiny

STEPS = 30
MODEL = tiny(num_layers=2, attention_bias=False, mlp_bias=False)


def curve(step, arrange):
    params = initial(step)
    state, losses = TrainState.begin(step, params), []
    for seed in range(STEPS):
        # A small vocabulary's worth of structure, so that there is something to learn.
        batch = random_batch(MODEL, rows=8, length=64, seed=seed % 3)
        batch["labels"][seed % 8] = -100  # a sample without labels: means of means would differ
        batch["labels"][(seed + 1) % 8, :40] = -100
        state, values = optimizer_step(step, state, {k: arrange(v) for k, v in batch.items()}, 3e-3)
        assert values["labels"] == count_labels(batch["labels"])
        losses.append(values["loss"])
    return losses


def test_sequence_parallel_with_all_features_equals_data_parallel_without():
    plain = curve(make_step(MODEL, dp=8, profile=PLAIN), lambda x: x[None])  # [1, 8, S]
    features = Profile(loss_tile=5, mlp_tile=3, offload_activations=True, offload_weights=True, offload_optimizer=True)
    ours = curve(make_step(MODEL, sp=8, profile=features), lambda x: x[:, None])  # [8, 1, S]
    assert plain[-1] < plain[0] - 0.5  # it learns: equal curves of a model that stands still would show little
    np.testing.assert_allclose(ours, plain, atol=1e-4, rtol=0)
