# pytest tests/memory/test_decide.py
"""From flags to a plan with GPUs that are not here: what is chosen, compiled once, pinned and refused."""

import collections
import dataclasses
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

import train
from alst_jax import lowered
from alst_jax.config import TrainConfig, UserError
from alst_jax.hardware.machines import GIB
from alst_jax.ops.attention import flash
from alst_jax.optim.adamw import AdamW
from alst_jax.planning import planner as decide
from alst_jax.planning.candidates import CONFIRMED, UNCONFIRMED
from alst_jax.planning.estimate import estimate
from alst_jax.planning.job import Job
from alst_jax.planning.plan import COMPILED, ESTIMATED
from alst_jax.planning.planner import Planner
from alst_jax.planning.report import report
from alst_jax.profile import Profile
from alst_jax.trainer import TrainState, optimizer_step
from benchmarks.shapes import LLAMA_70B, llama_8b
from tests.helpers import TINY, initial, make_step, random_batch
from tests.memory.machines_and_jobs import EIGHT, H100, job, maker, planner

TILED = Profile(loss_tile=32, mlp_tile=32)


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
    monkeypatch.setattr("alst_jax.run.this_cluster", lambda host_memory_gib, devices: H100)
    monkeypatch.setattr("alst_jax.planning.report.seconds_compiled", lambda: 12.3)
    (tmp_path / "data.txt").write_text("A long time ago. " * 100)
    config = TrainConfig(
        data=(str(tmp_path / "data.txt"),),
        out=str(tmp_path / "run"),
        seq_len=128,
        dp=1,
        sp=1,
        steps=2,
        memory=memory,
        export=False,
    )
    assert train.run(config) == 0
    printed = capsys.readouterr().out
    assert "plan    compiled: device" in printed and "the whole process: about" in printed
    assert " s, 12 s of them to compile attention's kernels\n" in printed
    assert compiled["jit(loss_and_grad)"] == compiled["jit(update)"] == 1, compiled


def test_a_debug_run_compiles_its_own_programs_before_the_first_step(tmp_path, monkeypatch, compiled):
    """One for the bytes of the whole run, one that runs. (On a CPU a plan compiles no update.)"""
    monkeypatch.setattr("alst_jax.run.this_cluster", lambda host_memory_gib, devices: H100)
    planned = []
    monkeypatch.setattr("alst_jax.planning.report.announce_plan", lambda *_: planned.append(dict(compiled)))
    (tmp_path / "data.txt").write_text("A long time ago. " * 100)
    config = TrainConfig(
        data=(str(tmp_path / "data.txt"),),
        out=str(tmp_path / "run"),
        seq_len=128,
        dp=1,
        sp=1,
        steps=1,
        memory="manual",
        debug_attention_layers=1,
    )
    assert train.run(config) == 0
    assert planned[0]["jit(loss_and_grad)"] == compiled["jit(loss_and_grad)"] == 2


@pytest.mark.parametrize("accumulation, at_once", [(1, False), (1, True), (2, False)])
def test_gradient_and_update_are_compiled_as_a_run_calls_them(compiled, accumulation, at_once):
    step = make_step(TINY, 1, 2, TILED, AdamW(), jnp.bfloat16)
    batches = {name: jnp.stack([array] * accumulation) for name, array in random_batch().items()}
    programs = lowered.compile_programs(step, *batches["tokens"].shape[1:], accumulation, False, False, at_once)
    assert [program.memory_analysis().temp_size_in_bytes > 0 for program in programs] == [True, True]
    gradient = "jit(loss_and_grad)" if accumulation == 1 else "jit(loss_and_sums)"
    assert compiled[gradient] == compiled["jit(update)"] == 1, compiled
    params = initial(step)
    optimizer_step(step, TrainState.begin(step, params), jax.device_get(batches), 1e-3)
    assert compiled[gradient] == compiled["jit(update)"] == 1, compiled
    assert sum(compiled[f"jit({name})"] for name in ("loss_and_grad", "loss_and_sums")) == 1


LAUNCHERS = """
import jax
from tests.stand_in import flash_backward as backward, flash_forward as forward

option = jax.make_user_context()
"""


def test_a_kernel_whose_package_adds_options_to_jax_is_compiled_once(tmp_path, monkeypatch, compiled):
    """Its import lengthens the key of jax's caches: inside of a trace it would make the program compile twice."""
    (tmp_path / "planted_launchers.py").write_text(LAUNCHERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flash, "check_packages", lambda: None)
    monkeypatch.setattr(flash, "LAUNCHERS", "planted_launchers")
    try:
        step = make_step(TINY, 1, 1, dataclasses.replace(TILED, attention="flash"), AdamW(), jnp.float32)
        for _ in range(2):
            lowered.compile_programs(step, 1, 64, 1, False, True, False)
        assert compiled["jit(loss_and_grad)"] == 1
    finally:
        sys.modules.pop("planted_launchers", None)


@pytest.mark.parametrize("at_once", [False, True])
def test_programs_are_compiled_at_once_or_one_after_the_other(monkeypatch, at_once):
    inside, most, met = [], [], threading.Barrier(2)

    class Program:
        def compile(self):
            inside.append(self)
            if at_once:
                met.wait(60)  # for the other
            most.append(len(inside))
            inside.remove(self)

    step = make_step(TINY, 1, 2, TILED, AdamW(), jnp.bfloat16)
    monkeypatch.setattr(lowered, "lower_update", lambda *_: Program())
    monkeypatch.setattr(step, "loss_and_grad", type("Jitted", (), {"lower": lambda *_: Program()})())
    lowered.compile_programs(step, 1, 64, 1, False, False, at_once)
    assert len(most) == 2 and (most == [1, 1]) == (not at_once)


def test_another_job_has_a_step_of_its_own():
    planner = Planner(TrainConfig(), H100, True, maker(TrainConfig(), "float32"))
    job = Job(TINY, TILED, 1, 64)
    step = planner.step(job)
    assert planner.step(Job(TINY, dataclasses.replace(TILED), 1, 64)) is step
    other = planner.step(dataclasses.replace(job, profile=Profile(loss_tile=32, mlp_tile=32, segment_layers=(3,))))
    assert other.profile.segment_layers == (3,) and planner.cached.keys() != {job}
    assert planner.step(job) is not step  # only the last is kept


STREAMED = dict(offload_weights=True, offload_optimizer=True)


@pytest.mark.parametrize("memory", ["auto", "manual"])
@pytest.mark.parametrize(
    "profile,cure",
    [
        (dict(remat=False), "--no-remat"),
        (dict(loss_tile=None), "--no-tiled-loss"),
        (dict(mlp_tile=None), "--no-tiled-mlp"),
        (dict(loss_tile=None, remat=False), "--no-remat and --no-tiled-loss"),
    ],
)
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
        planner(memory="manual").choose(
            dataclasses.replace(job(**STREAMED, remat=False, mlp_tile=None), length=65536, states="int8", master="none")
        )
    assert "without --no-remat;" in str(error.value) + ";"


# ------------------------------------------------------------------------------------------------ the planner, by parts


def test_without_a_compiler_plans_are_estimates(monkeypatch):
    monkeypatch.setattr(decide, "plan_step", None)  # not called
    choice = planner().choose(EIGHT)
    assert choice.plan.source == ESTIMATED and not choice.plan.lacks and choice.next_faster is not None
    assert planner().search.margin == UNCONFIRMED and planner(compiles=True).search.margin == CONFIRMED


def test_what_is_typed_is_not_chosen():
    assert planner(typed=("offload_weights",)).search.fixed == {"offload_weights"}
    assert planner(typed=("remat",)).search.fixed == set()  # is never chosen
    assert planner(memory="manual").search.fixed >= {"offload_weights", "head_chunks", "loss_tile", "master_weights"}
    assert planner(allow_narrow_optimizer=True).search.narrow
    typed = planner(typed=("offload_weights", "head_chunks")).choose(job(offload_weights=False, head_chunks=2)).job
    assert (typed.profile.offload_weights, typed.profile.head_chunks) == (False, 2)


class Compiler:
    """In place of `plan_step`: the estimate, and `excess` bytes of device memory."""

    def __init__(self, monkeypatch, excess=0):
        self.excess, self.jobs, self.asked = excess, [], []
        monkeypatch.setattr(decide, "plan_step", self)
        monkeypatch.setattr(Planner, "step", lambda planner, job: job)

    def __call__(self, step, job, cluster, at_once, asked):
        assert step == job  # the step of this job
        self.at_once = at_once
        self.jobs.append(job)
        self.asked.append(asked)
        plan = estimate(job, cluster)
        return dataclasses.replace(plan, source=COMPILED, device=plan.device | {"excess": self.excess})


@pytest.mark.parametrize("flags", [{}, {"plan_only": True}, {"find_max_seq_len": True}], ids=str)
def test_only_plans_compile_all_at_once(monkeypatch, flags):
    """A run would keep the memory that this costs."""
    compiler = Compiler(monkeypatch)
    planner(compiles=True, **flags).compile(EIGHT)
    assert compiler.at_once == bool(flags)


@pytest.mark.parametrize("excess", [0, 8 * GIB])
def test_the_compiler_has_the_last_word(monkeypatch, excess):
    compiler, said = Compiler(monkeypatch, excess), []
    choice = planner(compiles=True).choose(EIGHT, said.append)
    assert choice.plan.source == COMPILED and choice.job == compiler.jobs[-1] and not choice.plan.lacks
    assert len(said) == len(compiler.jobs) - 1 and bool(said) == bool(excess)
    assert all("the compiled step needs +8.0 GiB of device memory" in text for text in said)


def test_no_profile_that_the_compiler_accepts(monkeypatch):
    Compiler(monkeypatch, 500 * GIB)
    with pytest.raises(UserError, match="--memory auto: by the compiler, no profile was found that fits 1 x H100-80"):
        planner(compiles=True).choose(dataclasses.replace(EIGHT, model=llama_8b(2)), lambda text: None)


def test_by_hand_the_compiler_is_asked_once_and_refuses(monkeypatch):
    fits, too_long = job(**STREAMED, offload_activations=True, head_chunks=8), 2**20
    compiler, narrow = Compiler(monkeypatch), dict(states="int8", master="none")
    by_hand = planner(compiles=True, memory="manual")
    assert by_hand.choose(dataclasses.replace(fits, **narrow)).job.profile == fits.profile
    with pytest.raises(UserError, match="GiB of host memory missing"):
        by_hand.choose(dataclasses.replace(fits, length=too_long, **narrow))
    assert len(compiler.jobs) == 2
    with pytest.raises(UserError, match="--head-chunks 3"):
        by_hand.choose(job(head_chunks=3))


def test_what_cannot_fit_is_refused_before_anything_is_compiled(monkeypatch):
    compiler = Compiler(monkeypatch)
    with pytest.raises(UserError, match="--allow-narrow-optimizer"):
        planner(compiles=True).choose(dataclasses.replace(EIGHT, length=2**19))
    assert not compiler.jobs


@pytest.mark.parametrize("excess", [0, 4 * GIB])
def test_the_longest_length_is_one_that_compiles(monkeypatch, excess):
    compiler = Compiler(monkeypatch, excess)
    found = planner(compiles=True).longest(EIGHT)
    assert found.job == compiler.jobs[-1] and not found.plan.lacks
    if excess:
        assert found.job.length < compiler.jobs[0].length


def test_there_is_no_longest_length_on_a_cpu_or_of_too_large_a_model():
    config = TrainConfig(find_max_seq_len=True)
    with pytest.raises(UserError, match="its memory limits are not known"):
        report(Planner.of(config, None, maker(config, "float32")), Job(TINY, TILED, 1, 64))
    with pytest.raises(UserError, match="at any length"):
        planner().longest(dataclasses.replace(EIGHT, model=LLAMA_70B))


def test_flash_is_compiled_as_cudnn_for_gpus_that_are_not_here(monkeypatch):
    compiler = Compiler(monkeypatch)
    made = planner(compiles=True, plan_for="H100").compile(job(attention="flash"))
    assert [j.profile.attention for j in compiler.jobs] == ["cudnn"]
    assert made.step_seconds == estimate(job(attention="flash"), H100).step_seconds
    planner(compiles=True).compile(job(attention="flash"))
    assert compiler.jobs[-1].profile.attention == "flash"
    packed = dataclasses.replace(job(attention="flash"), documents=64)  # planned with flash's own workspace
    planner(compiles=True, plan_for="H100").compile(packed)
    assert compiler.asked[-1] == packed and compiler.jobs[-1].documents == 0
