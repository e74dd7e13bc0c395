# pytest tests/memory/test_ledger.py
"""The ledgers add up to the plan; a step with attention in some layers only needs the bytes of the whole step."""

import dataclasses

import jax
import pytest

from alst_jax import run as setup
from alst_jax.config import TrainConfig, UserError
from alst_jax.flag_checks import check_run
from alst_jax.hardware.machines import parse_cluster
from alst_jax.optim.adamw import AdamW
from alst_jax.planning import planner
from alst_jax.planning.estimate import estimate, ledger_of_bytes
from alst_jax.planning.job import Job, total
from alst_jax.planning.report import explain
from alst_jax.planning.seconds import ledger
from alst_jax.profile import DEVICE, HOST, Profile
from alst_jax.step import TrainStep
from benchmarks import plan_accuracy
from benchmarks.shapes import LLAMA_8B
from tests.helpers import leaf, make_step, plan_of, random_batch, tiny

H100 = parse_cluster("8xH100", 1000)
SMALL = tiny(
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_layers=4,
    attention_bias=False,
    mlp_bias=False,
)
KEPT = dict(segment_layers=(4,), keep_attention_on_device=1, keep_attention_on_host=2)


def job(**changes) -> Job:
    return Job(LLAMA_8B, Profile(attention="cudnn", compute_dtype="bfloat16", **changes), 1, 131072)


def test_ledgers_add_up_to_the_estimate():
    for combination in plan_accuracy.FITTED + plan_accuracy.HELD_OUT:
        one = plan_accuracy.bare_job(*combination)
        plan, places = estimate(one, H100), ledger_of_bytes(one)
        sums = {place: sum(map(total, parts.values())) for place, parts in places.items()}
        assert sums == {DEVICE: plan.device_bytes, HOST: plan.host_bytes}, combination
        assert total(ledger(one, H100)) == pytest.approx(plan.step_seconds, rel=1e-12)


def test_explanation_names_its_terms():
    one = job(**KEPT)
    text = explain(one, H100, estimate(one, H100))
    hidden = next(line for line in text.splitlines() if "h and dh" in line)
    assert hidden.split() == ["2.000", "h", "and", "dh", "stack/layer"]
    assert "GiB of one device, whose peak is at the backward pass of the layers" in text
    assert "not in the cost model" not in text and "seconds of a step" in text
    plan = estimate(one, H100, correction=3 * 2**30)
    assert "3.000  not in the cost model" in explain(one, H100, plan)


def test_seconds_count_the_layers_with_attention():
    """The first 2 of 32 layers compute attention; their outputs are not kept, so that each computes it twice
    forward."""
    full = job(**KEPT)
    some = dataclasses.replace(full, model=dataclasses.replace(LLAMA_8B, attention_layers=2))
    whole, part = estimate(full, H100), estimate(some, H100)
    assert part.device == whole.device and part.host == whole.host
    assert part.seconds["attention backward"] == pytest.approx(whole.seconds["attention backward"] * 2 / 32)
    assert part.seconds["attention forward"] == pytest.approx(whole.seconds["attention forward"] * 4 / (32 + 29))
    assert part.seconds["matmuls"] == whole.seconds["matmuls"] and part.flops < whole.flops


def test_a_debug_run_is_planned_as_the_whole_run(monkeypatch):
    def make(job):
        step = object.__new__(TrainStep)
        step.model = job.model
        return step

    compiled, full = [], job()
    some = dataclasses.replace(full, model=dataclasses.replace(LLAMA_8B, attention_layers=2))
    monkeypatch.setattr(planner, "plan_step", lambda step, *_: compiled.append(step.model) or estimate(full))
    plan = planner.Planner.of(TrainConfig(), None, make).compile(some)
    assert (
        compiled == [LLAMA_8B, some.model]
        and plan.device == estimate(full).device
        and plan.flops == some.flops < full.flops
    )


def test_a_debug_run_has_the_profile_of_the_whole_run():
    """Chosen by its own seconds it would keep no attention outputs: layers without attention spare nothing by it."""
    plans = planner.Planner(TrainConfig(), parse_cluster("H100-80", 125), False, lambda job: None)
    full = job(offload_activations=True)
    chosen = plans.choose(full).job.profile
    some = dataclasses.replace(full, model=dataclasses.replace(LLAMA_8B, attention_layers=2))
    choice = plans.choose(some)
    assert choice.job.profile == chosen and choice.job.model.attention_layers == 2
    assert chosen.keep_attention_on_device + chosen.keep_attention_on_host > 0
    assert choice.plan.step_seconds < plans.choose(full).plan.step_seconds


def test_attention_in_some_layers_needs_the_bytes_of_all():
    """Compiled for a CPU, on one device, layers in loops; of other programs docs/log.md. Without the kernel, its
    buffers would be missing."""
    profile = Profile(loss_tile=128, mlp_tile=128, offload_activations=True)
    model = tiny(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        num_layers=6,
        attention_bias=False,
        mlp_bias=False,
    )
    plans = [
        plan_of(make_step(dataclasses.replace(model, attention_layers=n), 1, 1, profile, AdamW()), 1, 8192)
        for n in (None, 2)
    ]
    full, some = (plan.device["working set"] + plan.device["kept activations"] for plan in plans)
    assert some == pytest.approx(full, rel=1e-3)


def test_layers_without_attention_have_no_gradients_of_queries():
    step = make_step(dataclasses.replace(SMALL, attention_layers=1), profile=Profile(loss_tile=None, mlp_tile=None))
    trained, frozen = step.split(step.init_params(jax.random.key(0), "float32"))
    _, gradients = step.loss_and_grad(trained, frozen, step.put_batch(**random_batch(SMALL, 2, 32)), 1.0)
    used = lambda name: [float(abs(layer).max()) > 0 for layer in leaf(gradients, f"layers.{name}.kernel")]
    assert used("self_attn.q_proj") == [True, False, False, False] and used("mlp.up_proj") == [True] * 4


@pytest.mark.parametrize(
    "flags,message",
    [
        (dict(debug_attention_layers=0), "--debug-attention-layers 0: must be at least 1"),
        (dict(debug_attention_layers=1, resume=True, out="x"), "nothing that could be resumed"),
        (dict(debug_attention_layers=1, save_every=2), "which never saves"),
        (dict(explain=True), "--explain is for --plan-only"),
        (dict(profile_steps="3:5", steps=4), "is after the last of --steps 4"),
    ],
)
def test_flags(flags, message):
    with pytest.raises(UserError, match=message):
        check_run(TrainConfig(**flags))


def test_flags_against_the_model():
    debug = lambda **flags: setup.debug_model(TrainConfig(**flags), SMALL)
    assert debug() is SMALL and debug(debug_attention_layers=4).attention_layers == 4
    with pytest.raises(UserError, match="the model has 4 layers"):
        debug(debug_attention_layers=5)
    with pytest.raises(UserError, match="needs --stack segments and --remat"):
        debug(debug_attention_layers=2, stack="plain")


def test_heads_that_cudnn_lacks_are_estimated_for_gpus_that_are_not_here(monkeypatch):
    monkeypatch.setattr(planner, "has_cuda_compiler", lambda: True)
    for attention, head_dim, there in (("flash", 256, False), ("flash", 128, True), ("xla", 256, True)):
        some = Job(dataclasses.replace(SMALL, head_dim=head_dim), Profile(attention=attention), 1, 64)
        assert planner.Planner.of(TrainConfig(plan_for="H100"), None, None, some).compiles is there
        assert planner.Planner.of(TrainConfig(), None, None, some).compiles
