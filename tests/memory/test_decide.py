# pytest tests/memory/test_decide.py
"""From flags to a plan with GPUs that are not here: what is chosen, compiled once, pinned and refused."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest

import train
from alst_jax.config import TrainConfig, UserError
from alst_jax.memory import decide, plan
from alst_jax.memory.cost import Job
from alst_jax.memory.decide import Planner
from alst_jax.memory.machines import parse_cluster
from alst_jax.memory.profile import Profile
from alst_jax.optim.adamw import AdamW
from alst_jax.trainer import TrainState, optimizer_step
from benchmarks.shapes import LLAMA_8B
from tests.helpers import TINY, make_step, random_batch

H100 = parse_cluster("H100-80", 125)
TILED = Profile(loss_tile=32, mlp_tile=32)
ON_GPU = Profile(attention="cudnn", compute_dtype="bfloat16")
EIGHT = Job(LLAMA_8B, ON_GPU, 1, 131072)


@pytest.fixture
def compiled():
    """Names of what is compiled, and how often."""
    counts = collections.Counter()

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            counts[details["fun_name"]] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listen)


# ------------------------------------------------------------------------------------------------------- compiled once


@pytest.mark.parametrize("memory", ["manual", "auto"])
def test_a_run_compiles_nothing_that_its_plan_has_compiled(tmp_path, monkeypatch, capsys, compiled, memory):
    monkeypatch.setattr(decide, "this_cluster", lambda host_memory_gib: H100)
    (tmp_path / "data.txt").write_text("A long time ago. " * 100)
    config = TrainConfig(data=(str(tmp_path / "data.txt"),), out=str(tmp_path / "run"), seq_len=128, dp=1, sp=1,
                         steps=2, memory=memory, export=False)
    assert train.run(config) == 0
    assert "plan    compiled: device" in capsys.readouterr().out
    assert compiled["jit(local_loss)"] == compiled["jit(apply_update)"] == 1, compiled


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_update_is_compiled_as_a_run_calls_it(compiled, accumulation):
    step = make_step(TINY, 1, 2, TILED, AdamW(), jnp.bfloat16)
    plan._update_bytes(step, accumulation)
    params = step.init_params(jax.random.key(0), jnp.bfloat16)
    batches = {name: jnp.stack([array] * accumulation) for name, array in random_batch().items()}
    optimizer_step(step, TrainState(params, step.init_optimizer(params), 0), jax.device_get(batches), 1e-3)
    assert compiled["jit(apply_update)"] == 1, compiled


def test_another_job_has_a_step_of_its_own():
    planner = Planner(TrainConfig(), H100, True, jnp.dtype("float32"))
    job = Job(TINY, TILED, 1, 64)
    step = planner.step(job)
    assert planner.step(Job(TINY, dataclasses.replace(TILED), 1, 64)) is step
    other = planner.step(dataclasses.replace(job, profile=Profile(loss_tile=32, mlp_tile=32, segment_layers=(3,))))
    assert other.profile.segment_layers == (3,) and planner.last.keys() != {job}
    assert planner.step(job) is not step  # only the last is kept


# ------------------------------------------------------------------------------------------------------------- refused


def planner(cluster=H100, compiles=False, **flags) -> Planner:
    """For GPUs that are not here, without a compiler for them."""
    return Planner(TrainConfig(**flags), cluster, compiles, jnp.dtype("bfloat16"))


def job(**changes) -> Job:
    return dataclasses.replace(EIGHT, profile=dataclasses.replace(ON_GPU, **changes))


STREAMED = dict(offload_weights=True, offload_optimizer=True)


@pytest.mark.parametrize("memory", ["auto", "manual"])
@pytest.mark.parametrize("profile,cure", [
    (dict(remat=False), "--no-remat"), (dict(loss_tile=None), "--no-tiled-loss"),
    (dict(mlp_tile=None), "--no-tiled-mlp"),
    (dict(loss_tile=None, remat=False), "--no-remat and --no-tiled-loss")])
def test_the_switch_that_makes_it_too_large_is_named(memory, profile, cure):
    """Whether the placements are typed or chosen: with them in host memory, what is switched off is the cause."""
    length = 4 * 131072 if "mlp_tile" in profile else 131072
    asked = dataclasses.replace(job(**STREAMED | profile), length=length, states="int8", master="none")
    with pytest.raises(UserError) as error:
        planner(memory=memory, typed=tuple(STREAMED)).choose(asked)
    assert f"What would help: without {cure}" in str(error.value), error.value
    assert f"without {cure}, and" not in str(error.value) or memory == "manual"  # by hand, more may have to change


def test_a_switch_that_is_not_the_cause_is_not_named():
    with pytest.raises(UserError) as error:  # too long with everything on
        planner().choose(dataclasses.replace(job(remat=False), length=2**21))
    assert "--no-remat" not in str(error.value)
    with pytest.raises(UserError) as error:  # one of two suffices
        planner(memory="manual").choose(dataclasses.replace(
            job(**STREAMED, remat=False, mlp_tile=None), length=65536, states="int8", master="none"))
    assert "without --no-remat;" in str(error.value) + ";"
