# pytest tests/mesh/test_meshes.py
"""One device against simulated meshes: loss, every gradient, updated weights, placement, and the collectives
themselves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from alst_jax.config import IGNORED, UserError
from alst_jax.models.lora import Lora
from alst_jax.ops.attention import attention
from alst_jax.parallel.mesh import AXES, choose_degrees, make_mesh
from alst_jax.parallel.ulysses import qkv_to_heads, to_tokens
from alst_jax.profile import Profile
from tests.helpers import (
    PLAIN,
    TINY,
    assert_trees_close,
    drawn,
    initial,
    leaves,
    loss_and_grad,
    make_step,
    random_batch,
    relative_error,
    tiny,
    to_numpy,
    train,
)

MESHES = [(1, 2), (1, 4), (1, 8), (2, 4), (4, 2)]
PROFILE = Profile(loss_tile=7, mlp_tile=5)


@pytest.fixture(scope="module")
def reference():
    return train(make_step(), random_batch())


@functools.cache
def tiled_step(dp, sp):
    return make_step(dp=dp, sp=sp, profile=PROFILE)


@pytest.mark.parametrize("dp,sp", MESHES)
def test_mesh_equals_one_device(dp, sp, reference):
    losses, gradients, weights = train(tiled_step(dp, sp), random_batch())
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    assert_trees_close(gradients, reference[1], 1e-5)
    assert_trees_close(weights, reference[2], 1e-4)


@pytest.mark.parametrize("heads,kv_heads,sp", [(8, 2, 4), (8, 2, 8), (8, 1, 8), (8, 8, 8), (12, 4, 6), (6, 3, 2)])
def test_kv_heads_are_repeated_as_needed(heads, kv_heads, sp):
    """Fewer kv heads than devices, as many, and numbers of which neither divides the other."""
    model = tiny(num_heads=heads, num_kv_heads=kv_heads, hidden_size=96, num_layers=1)
    batch = random_batch(model, rows=1, length=48)
    results = []
    for degree in (1, sp):
        step = make_step(model, sp=degree)
        results.append(loss_and_grad(step, initial(step), batch))
    assert abs(results[1][0] - results[0][0]) < 1e-5 * results[0][0]
    assert_trees_close(results[1][1], results[0][1], 1e-5)


def test_repeated_kv_heads_meet_their_queries():
    """12 query heads and 4 kv heads on 6 devices: each kv head is repeated three times, and its gradients are summed."""
    q, k, v, do = (jax.random.normal(jax.random.key(i), (1, 48, n, 8)) for i, n in enumerate((12, 4, 4, 12)))
    local = lambda *qkv: to_tokens(attention(*qkv_to_heads(*qkv, "seq"), kernel="xla"), "seq")
    shards = P(None, "seq")
    on_mesh = jax.shard_map(local, mesh=make_mesh(1, 6), in_specs=(shards,) * 3, out_specs=shards)

    def both_ways(attend):
        o, pullback = jax.vjp(attend, q, k, v)
        return o, *pullback(do)

    one, many = (jax.jit(lambda f=f: both_ways(f))() for f in (lambda *qkv: attention(*qkv, kernel="xla"), on_mesh))
    for a, b in zip(many, one, strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_rank_whose_labels_are_all_ignored():
    batch = random_batch(rows=1)
    batch["labels"][:, :16] = IGNORED  # the whole chunk of device 0 of 4
    batch["labels"][:, 48:] = IGNORED
    results = []
    for sp, profile in ((1, PLAIN), (4, PROFILE)):
        step = make_step(sp=sp, profile=profile)
        results.append(loss_and_grad(step, initial(step), batch))
    assert np.isfinite(results[1][0]) and abs(results[1][0] - results[0][0]) < 1e-5 * results[0][0]
    assert_trees_close(results[1][1], results[0][1], 1e-5)


def test_parameters_that_no_device_count_divides_are_replicated_and_exact():
    model = tiny(hidden_size=36, intermediate_size=35, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=97)
    batch = random_batch(model)
    step = make_step(model, dp=2, sp=4, profile=PROFILE)
    specs = {
        jax.tree_util.keystr(p, simple=True): s
        for p, s in jax.tree_util.tree_leaves_with_path(
            step.specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
        )
    }
    assert any(all(axes is None for axes in spec) for spec in specs.values())
    one, many = (loss_and_grad(made, initial(made), batch) for made in (make_step(model), step))
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    assert_trees_close(many[1], one[1], 1e-5)


def test_everything_is_sharded_over_both_axes():
    """ZeRO-3: weights, gradients and optimizer state are an eighth each on every device."""
    step = tiled_step(2, 4)
    params = initial(step)
    state = step.init_optimizer(params)
    _, gradients = step.loss_and_grad(*step.split(params), step.put_batch(**random_batch()), jnp.float32(1))
    for leaf in jax.tree.leaves((params, gradients, state["mu"], state["nu"])):
        assert AXES in tuple(leaf.sharding.spec), leaf.sharding
        assert all(shard.data.size * 8 == leaf.size for shard in leaf.addressable_shards)
    norm = step.gradient_norm(gradients)
    expected = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in jax.tree.leaves(gradients)))
    assert abs(float(norm) - expected) < 1e-5 * expected
    new_params, new_state = step.update(params, gradients, state, norm, jnp.float32(1e-3))
    for leaf in jax.tree.leaves((new_params, new_state["mu"], new_state["nu"])):
        assert AXES in tuple(leaf.sharding.spec), leaf.sharding


def collectives(compiled_text: str) -> dict[str, int]:
    names = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")
    return {name: len(re.findall(rf" {name}(?:-start)?\(", compiled_text)) for name in names}


def compiled(step, batch):
    device_batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), step.put_batch(**batch)
    )
    return step.loss_and_grad.lower(
        step.trained, step.frozen, device_batch, jax.ShapeDtypeStruct((), jnp.float32)
    ).compile()


def test_collectives_are_exactly_those_written_down():
    counts = collectives(compiled(tiled_step(2, 4), random_batch()).as_text())
    # The layer body stands in the program twice, once in the forward scan and once, recomputed and then transposed, in
    # the backward one. Forward: q, k, v, o. Backward: q, k, v again (the output's all-to-all is not needed to
    # differentiate what follows it: that is recomputed from its result, so o too), then the four transposes.
    assert counts["all-to-all"] == 4 + 4 + 4
    # 16 parameters a layer, gathered forward and again backward, but for the last bias, which no gradient reads;
    # embedding, final norm and head once each.
    assert counts["all-gather"] == 16 + 15 + 3
    # Each gathered parameter's gradient goes back once.
    assert counts["reduce-scatter"] == 16 + 3
    # The loss.
    assert counts["all-reduce"] == 1
    assert counts["collective-permute"] == 0


def test_one_device_compiles_to_no_collectives():
    counts = collectives(compiled(make_step(profile=PROFILE), random_batch()).as_text())
    assert counts.pop("all-reduce") <= 1  # of the loss, a scalar, among one device
    assert not any(counts.values())


def test_reduce_dtype_is_used():
    """Sums of gradients in bfloat16 are off by more than those in float32, which test_mesh_equals_one_device has."""
    steps = make_step(sp=8, profile=Profile(reduce_dtype="bfloat16")), tiled_step(2, 4)
    gradients = (loss_and_grad(step, initial(step), random_batch())[1] for step in steps)
    errors = [relative_error(a, b) for a, b in zip(*map(jax.tree.leaves, gradients), strict=True)]
    assert 1e-4 < max(errors) < 2e-2


def test_two_rows_a_device_equal_one():
    batch = random_batch(rows=4)
    results = []
    for dp in (2, 4):
        step = make_step(dp=dp, sp=2, profile=PROFILE)
        results.append(loss_and_grad(step, initial(step), batch))
    assert_trees_close(results[0][1], results[1][1], 1e-5)


def test_same_seed_gives_the_same_weights_on_every_mesh():
    one = to_numpy(make_step().init_params(jax.random.key(3), jnp.float32))
    many = to_numpy(make_step(dp=2, sp=4).init_params(jax.random.key(3), jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, many, one)


def test_weights_that_tests_draw_are_like_those_of_a_run():
    model = tiny(num_layers=2, norm_offset=1.0, qk_norm="head", lora=Lora(4, 8.0))
    ours = drawn(model, jnp.dtype("float32"), 0)
    theirs = to_numpy(make_step(model).init_params(jax.random.key(0), jnp.float32))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for name, one in leaves(ours).items():
        other, spread = leaves(theirs)[name], one.std()
        assert one.shape == other.shape and one.dtype == other.dtype, name
        assert spread == pytest.approx(np.std(other), rel=0.1), name
        assert abs(one.mean() - np.mean(other)) <= 0.2 * spread, name


def test_degrees_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"sp=3 must divide 8 query heads; use 1, 2, 4 or 8 \(--sp\)"):
        make_step(TINY, sp=3)
    with pytest.raises(UserError, match=r"sp=16 needs 16 devices and there are 8"):
        choose_degrees(None, 16, 8)
    with pytest.raises(UserError, match=r"dp=4 x sp=4 needs 16 devices and there are 8"):
        choose_degrees(4, 4, 8)
    with pytest.raises(UserError, match=r"sp=3 does not divide the 8 devices"):
        choose_degrees(None, 3, 8)
    assert choose_degrees(None, 2, 8) == (4, 2) and choose_degrees(None, None, 8) == (8, 1)
    assert choose_degrees(1, 3, 8) == (1, 3)
