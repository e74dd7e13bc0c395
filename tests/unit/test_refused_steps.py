# pytest tests/unit/test_refused_steps.py
"""Steps that are refused: skipped, gone back from, or the end of the run."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax import trainer
from alst_jax.config import TrainConfig, UserError
from alst_jax.data.batches import TrainingBatches
from alst_jax.data.documents import Sequence
from alst_jax.flag_checks import check_run
from alst_jax.metrics import MetricsLog
from alst_jax.processes.stop import StopSignal
from alst_jax.refused import MOST_REFUSED, NotFinite, Saves, Spike
from alst_jax.step import TrainStep
from tests.helpers import TINY


def batches(length=8):
    return TrainingBatches(
        [Sequence(np.full(length, i, np.int32), np.full(length, i, np.int32)) for i in range(40)], length, 1, 1, 0, 0
    )


def numbers(count):
    """The batches of a run, in their order."""
    data = batches()
    return [int(next(data)["tokens"][0, 0, 0]) for _ in range(count)]


def fake_step():
    devices = np.array([types.SimpleNamespace(device_kind="cpu")])
    return step_with(mesh=types.SimpleNamespace(devices=devices), model=TINY, freeze=None, gradient_norm=lambda x: 1.0)


def step_with(**parts):
    """A TrainStep of these parts, without a compilation."""
    step = object.__new__(TrainStep)
    for name, part in ({"profile": types.SimpleNamespace(update_in_backward=False)} | parts).items():
        setattr(step, name, part)
    return step


def run(monkeypatch, tmp_path, bad, problem, steps=12, save_every=5, **flags):
    """(what each applied step saw, in order, going back included; the log) of a run in which some batches are bad."""
    log, saved, data = MetricsLog(tmp_path, 0), {}, batches()

    def optimizer_step(step, state, arrays, learning_rate, judge):
        number = int(arrays[0]["tokens"][0, 0])
        if number in bad:
            raise problem(f"batch {number} is bad", state)
        assert judge({"loss": 3.0, "grad_norm": 1.0}) is None
        return state.after((*state.trained, number), None), {"loss": 3.0, "grad_norm": 1.0, "labels": 8}

    def read(state):
        if not saved:
            return None
        at = max(saved)
        data.set_state(saved[at][1])
        return trainer.TrainState(saved[at][0], None, None, at)

    monkeypatch.setattr(trainer, "optimizer_step", optimizer_step)
    config = TrainConfig(seq_len=8, learning_rate=1e-3, save_every=save_every, **flags)
    write = lambda state: saved.update({state.step: (state.trained, data.get_state())})
    try:
        with StopSignal() as stop:
            state = trainer.TrainState((), None, None, 0)
            state = trainer.train(config, fake_step(), state, steps, trainer.Data(data), log, Saves(write, read), stop)
    finally:
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    of_kind = lambda event: [line for line in lines if ("event" in line) == event]
    return list(state.trained), of_kind(False), of_kind(True)


@pytest.mark.parametrize("problem,flag", [(NotFinite, "on_nonfinite"), (Spike, "on_spike")])
@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_refused_step_equals_data_without_its_batch(policy, problem, flag, monkeypatch, tmp_path):
    order = numbers(14)
    bad = [order[7], order[8]]
    seen, steps, events = run(monkeypatch, tmp_path, bad, problem, **{flag: policy})
    assert seen == [number for number in order if number not in bad]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [(line["step"], line["event"]) for line in events] == [(8, "spike" if problem is Spike else "nonfinite")] * 2
    assert all(("back to the checkpoint of step 5" in line["action"]) == (policy == "rewind") for line in events)


def test_without_a_checkpoint_there_is_no_way_back(monkeypatch, tmp_path):
    message = "step 3: batch .* is bad. The step was not applied; the state before it, step 2, is saved"
    with pytest.raises(UserError, match=message):
        run(monkeypatch, tmp_path, numbers(3)[2:], NotFinite, on_nonfinite="rewind")
    assert "no checkpoint was saved to go back to" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_batches_are_not_left_out_without_end(policy, monkeypatch, tmp_path):
    order = numbers(40)
    with pytest.raises(UserError, match="is bad"):
        run(monkeypatch, tmp_path, order[6:], NotFinite, on_nonfinite=policy)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "event" in line]
    assert len(events) == MOST_REFUSED + 1 and "the run ends" in events[-1]["action"]


def test_a_spike_stops_the_run_where_the_flag_says_so(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="step 3: batch .* is bad"):
        run(monkeypatch, tmp_path, numbers(3)[2:], Spike, on_spike="stop")


@pytest.mark.parametrize(
    "flags,words",
    [
        (
            dict(on_spike="rewind"),
            "--on-spike rewind goes back to a checkpoint; say how often one is saved with --save-every",
        ),
        (
            dict(
                on_nonfinite="skip",
                update_in_backward=True,
                offload_weights=True,
                offload_optimizer=True,
                clip_norm=0.0,
            ),
            "--on-nonfinite skip: with --update-in-backward the step is applied",
        ),
        (dict(spike_deviations=0.0), "--spike-deviations 0.0: must be above 0"),
        (dict(check_numerics=True, plan_only=True), "--check-numerics computes on the devices of a run"),
    ],
)
def test_flags_that_do_not_go_together(flags, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        check_run(TrainConfig(seq_len=8, **flags))


def test_a_spike_is_refused_before_the_update():
    """`optimizer_step` itself asks between gradient and update: the weights are those before."""
    updates = []
    step = step_with(
        model=TINY,
        put_batch=lambda **arrays: arrays,
        loss_and_grad=lambda *_: (jnp.float32(7), jnp.float32(0)),
        gradient_norm=lambda _: jnp.float32(2),
        update=lambda *_: updates.append(1) or (jnp.float32(0), None),
    )
    state, asked = trainer.TrainState(jnp.float32(1), None, None, 3), []
    arrays = {"tokens": np.zeros((1, 1, 4), np.int32), "labels": np.zeros((1, 1, 4), np.int32)}
    with pytest.raises(Spike) as refused:
        trainer.optimizer_step(step, state, arrays, 1e-3, lambda values: asked.append(values) or "too high")
    assert refused.value.state is state and not updates and asked == [{"loss": 7.0, "grad_norm": 2.0, "labels": 4}]
    assert trainer.optimizer_step(step, state, arrays, 1e-3)[0].step == 4 and updates
