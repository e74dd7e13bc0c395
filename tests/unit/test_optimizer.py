# pytest tests/unit/test_optimizer.py
"""AdamW against optax's and torch's; the float32 master copy; streaming; the schedule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from alst_jax.config import TrainConfig
from alst_jax.models.tree import dotted, names
from alst_jax.ops.tiling import stream
from alst_jax.optim.adamw import AdamW, decays
from alst_jax.optim.schedule import learning_rate_schedule
from alst_jax.profile import Profile
from alst_jax.trainer import TrainState, optimizer_step, where_not_finite
from alst_jax.xla import host
from tests.helpers import (
    PLAIN,
    TINY,
    assert_trees_close,
    initial,
    leaf,
    make_step,
    random_batch,
    relative_error,
    tiny,
    to_numpy,
)

MODEL = tiny(num_layers=2)
SETTINGS = dict(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, clip_norm=1.0)


def gradients_like(params, seed, size=1.0):
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.standard_normal(x.shape) * size, x.dtype) for x in leaves])


@functools.cache
def step_of(profile, sp, dtype, **settings):
    return make_step(MODEL, sp=sp, profile=profile, optimizer=AdamW(**SETTINGS | settings), dtype=dtype)


def run(profile, dtype=jnp.float32, steps=5, sp=1, size=1.0, **settings):
    step = step_of(profile, sp, dtype, **settings)
    params = initial(step)
    start, state = to_numpy(params), step.init_optimizer(params)
    for seed in range(steps):
        gradients = jax.device_put(gradients_like(start, seed, size), step.param_shardings)
        norm = step.gradient_norm(gradients)
        params, state = step.update(params, gradients, state, norm, jnp.float32(1e-2 * (seed + 1)))
    return start, params, state


def reference(start, steps=5, size=1.0):
    """optax's own AdamW, clipping and decay mask, on the whole tree."""
    mask = jax.tree_util.tree_map_with_path(lambda path, _: decays(path), start)
    schedule = lambda count: 1e-2 * (count + 1)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.8, 0.95, 1e-6),
        optax.add_decayed_weights(0.1, mask),
        optax.scale_by_learning_rate(schedule),
    )
    params, state = start, tx.init(start)

    @jax.jit
    def update(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(steps):
        params, state = update(gradients_like(start, seed, size), state, params)
    return params


@pytest.mark.parametrize("size", [1.0, 1e-4])  # clipped, and not
@pytest.mark.parametrize(
    "profile,sp",
    [
        (PLAIN, 1),
        (PLAIN, 4),
        (Profile(offload_weights=True), 1),
        (Profile(offload_optimizer=True), 4),
        (Profile(offload_weights=True, offload_optimizer=True), 4),
    ],
)
def test_equals_optax_wherever_it_lives(profile, sp, size):
    start, params, _ = run(profile, sp=sp, size=size)
    assert_trees_close(params, reference(start, size=size), 1e-6)


def test_equals_torch():
    start, params, _ = run(PLAIN, clip_norm=0.0)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(start)]
    tensors = [torch.nn.Parameter(torch.tensor(np.array(x))) for x in jax.tree.leaves(start)]
    groups = [{"params": [t], "weight_decay": 0.1 if decays(p) else 0.0} for p, t in zip(paths, tensors)]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    for seed in range(5):
        for group in theirs.param_groups:
            group["lr"] = 1e-2 * (seed + 1)
        for tensor, gradient in zip(tensors, jax.tree.leaves(gradients_like(start, seed))):
            tensor.grad = torch.tensor(np.asarray(gradient))
        theirs.step()
    for ours, tensor in zip(jax.tree.leaves(params), tensors):
        assert relative_error(ours, tensor.detach().numpy()) < 1e-5


def test_norms_and_biases_are_spared_from_decay():
    step = make_step(tiny(attention_bias=True, mlp_bias=True))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(step.params)]
    assert {names(path)[-1] for path in paths if not decays(path)} == {"scale", "bias"}
    assert {names(path)[-1] for path in paths if decays(path)} == {"kernel", "embedding"}


def test_bfloat16_weights_follow_a_float32_master():
    """The master copy takes the float32 trajectory; the weights are its rounding. Without one, small steps vanish."""
    tiny_rate = dict(weight_decay=0.0)
    start, params, state = run(Profile(compute_dtype="bfloat16"), dtype=jnp.bfloat16, **tiny_rate)
    widened = jax.tree.map(lambda x: np.asarray(x, np.float32), start)
    gradients = [jax.tree.map(lambda g: np.asarray(g, np.float32), gradients_like(start, s)) for s in range(5)]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.8, 0.95, 1e-6),
        optax.scale_by_learning_rate(lambda count: 1e-2 * (count + 1)),
    )
    expected, optimizer = widened, tx.init(widened)
    for gradient in gradients:
        updates, optimizer = tx.update(gradient, optimizer)
        expected = optax.apply_updates(expected, updates)
    assert_trees_close(state["master"], expected, 1e-5)
    for weight, master in zip(jax.tree.leaves(params), jax.tree.leaves(state["master"])):
        np.testing.assert_array_equal(np.asarray(weight), np.asarray(master.astype(jnp.bfloat16)))


@pytest.mark.parametrize("rows", [1, 3, 10, 11])
@pytest.mark.parametrize("on_host", [True, False])
def test_stream_covers_every_row_once(rows, on_host):
    x, y = np.arange(20, dtype=np.float32).reshape(10, 2), np.ones((10, 2), np.float32)

    def body(total, written, read):
        return total + jnp.sum(read[0]), (written[0] + read[0],)

    rows = min(rows, 10)
    total, (new,) = jax.jit(
        lambda x, y: stream(body, jnp.float32(0), written=(x,), read=(y,), rows=rows, on_host=(on_host, False))
    )(jax.device_put(x, jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=host.memory_kind(on_host))), y)
    assert float(total) == 20
    np.testing.assert_array_equal(new, x + 1)


def test_chunks_are_whole_layers_or_a_bounded_number_of_rows():
    assert host.chunk_rows((32, 4096, 14336), stacked=True) == 1
    assert host.chunk_rows((128256, 4096), stacked=False) * 4096 * 4 <= host.CHUNK_BYTES
    assert host.chunk_rows((7,), stacked=False) == 7


@pytest.mark.parametrize("schedule,middle,last", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_learning_rate(schedule, middle, last):
    rate = learning_rate_schedule(TrainConfig(schedule=schedule, warmup_steps=10), 110, 2.0)
    assert [rate(i) for i in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(60) == pytest.approx(2.0 * middle) and rate(110) == pytest.approx(2.0 * last)


@pytest.mark.parametrize(
    "states, master", [("float32", "float32"), ("float32", "low-bits"), ("bfloat16", "none"), ("int8", "none")]
)
def test_an_update_is_in_place_and_works_a_layer_at_a_time(states, master, monkeypatch):
    """What it replaces is gone afterwards, bfloat16 weights that their master makes anew included; and of what is
    worked on, little grows with the layers: a loop on a CPU begins with a copy of one parameter's arrays."""

    def compiled(layers):
        step = make_step(tiny(num_layers=layers), dtype=jnp.bfloat16, optimizer=AdamW(states=states, master=master))
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        lowered = step.update.lower(step.params, step.params, step.optimizer_state, scalar, scalar)
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= 0.99 * memory.output_size_in_bytes
        return step, memory.temp_size_in_bytes

    (step, few), (_, many) = compiled(3), compiled(24)
    copied = (2 + 4 + 4 + 4 + 2) * TINY.hidden_size * TINY.intermediate_size
    assert many - few <= 21 * copied  # all layers at once: 2.8 times that with low bits, 13.8 times with 8-bit states
    params = initial(step)
    state, gradients = TrainState.begin(step, params), jax.tree.map(jnp.copy, params)
    monkeypatch.setattr(step, "loss_and_grad", lambda *_: (jnp.float32(1), gradients))  # the update alone is compiled
    optimizer_step(step, state, {name: x[None] for name, x in random_batch().items()}, 1e-3)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.trained, state.optimizer)))


@pytest.mark.parametrize("mesh,on_host", [((1, 1), False), ((2, 2), True)])
def test_a_gradient_that_is_not_finite_is_named(mesh, on_host):
    """Its layer and its parameter, from whole, sharded and host-resident gradients."""
    step = make_step(TINY, *mesh, profile=dataclasses.replace(PLAIN, offload_weights=on_host))
    gradients = initial(step)
    assert where_not_finite(step, gradients) is None

    def spoil(gradients, wanted, *places):
        def one(path, x):
            if dotted(path) != wanted:
                return x
            values = np.array(x)
            for place in places:
                values[place] = np.nan if place[0] else np.inf
            return jax.device_put(values, x.sharding)

        return jax.tree_util.tree_map_with_path(one, gradients)

    gradients = spoil(gradients, "layers.mlp.up_proj.kernel", (1, 0, 0), (2, 5, 3), (2, 63, 95))
    assert where_not_finite(step, gradients) == "gradients not finite in layers 1, 2 of 3 (mlp.up_proj.kernel)"
    assert np.array_equal(leaf(step.count_not_finite(gradients), "layers.mlp.up_proj.kernel"), [0, 1, 2])
    gradients = spoil(gradients, "embed_tokens.embedding", (0, 0))
    assert "(embed_tokens.embedding, mlp.up_proj.kernel)" in where_not_finite(step, gradients)
