# python -m pytest tests/unit/test_watch.py
"""Watching a run: an event for each thing that goes wrong and none for what is usual; steps that are skipped or gone
back from."""

import itertools
import json
import os
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax import trainer, watch
from alst_jax.config import TrainConfig, UserError
from alst_jax.data.batches import TrainingBatches
from alst_jax.data.documents import Sequence
from alst_jax.flag_checks import check_run
from alst_jax.metrics import MetricsLog
from alst_jax.processes.stop import StopSignal
from alst_jax.refused import MOST_REFUSED, NotFinite, Saves, Spike
from alst_jax.step import TrainStep
from alst_jax.watch import ENOUGH, Watch, limits_of
from alst_jax.watch_flags import WatchFlags
from tests.helpers import TINY

GIB = 2**30


@pytest.fixture
def events():
    return []


def usual(watched, steps=20):
    """Losses near 3 and gradient norms near 1, with the noise of a run."""
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        values = {"loss": 3 + 0.05 * rng.normal(), "grad_norm": 1 + 0.2 * abs(rng.normal())}
        assert watched.judge(step, values) is None


@pytest.mark.parametrize(
    "values,words",
    [({"loss": 4.0, "grad_norm": 1.0}, "loss 4 is "), ({"loss": 3.0, "grad_norm": 9.0}, "gradient norm 9 is ")],
)
def test_a_spike_is_told_and_kept_out_of_what_is_usual(values, words, events):
    watched = Watch(WatchFlags(), events.append)
    usual(watched)
    assert watched.judge(21, values) is None and len(events) == 1
    assert events[0].kind == "spike" and words in events[0].cause and "the step is applied" in str(events[0])
    refusing = Watch(WatchFlags(on_spike="skip"), events.append)
    usual(refusing)
    assert words in refusing.judge(21, values) and words in refusing.judge(22, values)
    assert refusing.judge(23, {"loss": 3.0, "grad_norm": 1.0}) is None and len(events) == 1
    assert Watch(WatchFlags(on_spike="stop"), events.append).judge(1, values) is None  # nothing is usual yet


def test_no_spike_where_losses_fall_or_vary_as_before(events):
    watched = Watch(WatchFlags(on_spike="stop"), events.append)
    for step in range(100):  # the fast fall at the beginning, then a plateau without any noise
        assert watched.judge(step, {"loss": max(11 - step, 3) * 1.0, "grad_norm": 1.0}) is None
    assert watched.judge(100, {"loss": 3.05, "grad_norm": 1.3}) is None
    assert Watch(WatchFlags(spike_deviations=1e9), events.append).judge(1, {"loss": 1e9, "grad_norm": 1}) is None
    assert not events


def speeds(watched, rates, seconds=2.0):
    for step, rate in enumerate(rates, 1):
        watched.begin(step)
        watched.end({"seconds": seconds, "tokens_per_second": rate})


def test_falling_throughput_is_told_once(events):
    speeds(Watch(WatchFlags(), events.append), [100.0] * 20 + [90.0] * 20)
    speeds(Watch(WatchFlags(), events.append), [100.0] * 20 + [50.0] * 20, seconds=0.5)  # steps too short to judge
    assert not events
    speeds(Watch(WatchFlags(), events.append), [100.0] * 20 + [50.0] * 20)
    assert [event.kind for event in events] == ["throughput"] and "after 100" in events[0].cause


def test_memory_that_runs_out_is_told_once_until_it_is_there_again(events, monkeypatch):
    left = itertools.cycle([50, 2, 2, 4, 50, 2])
    monkeypatch.setattr(watch, "memory_left", lambda: next(left) * GIB)
    monkeypatch.setattr(watch, "host_memory", lambda: 100 * GIB)
    speeds(Watch(WatchFlags(), events.append), [100.0] * 6)
    assert [(event.kind, event.step) for event in events] == [("memory", 2), ("memory", 6)]
    assert "2.0 of 100.0 GiB" in events[0].cause


def test_memory_left_is_within_what_the_process_may_have(monkeypatch):
    monkeypatch.setattr(watch, "host_memory", lambda: 2**50)
    assert 0 < watch.memory_left() < 2**50
    monkeypatch.setattr(watch, "host_memory", lambda: 1000)
    assert watch.memory_left() < 0


def test_a_throttled_gpu_is_told(events, monkeypatch, tmp_path):
    file = tmp_path / "nvidia-smi"
    gpus = (0, "Not Active"), (1, "Active")
    answer = "".join(f"echo '{gpu}, {hot}, Not Active, Not Active'\n" for gpu, hot in gpus)
    file.write_text("#!/bin/sh\n" + answer)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    speeds(Watch(WatchFlags(), events.append, on_gpu=True), [100.0] * 3)  # asked once a minute
    assert [event.cause for event in events] == ["GPU 1 has slowed its clock: it is too hot"]
    file.write_text("#!/bin/sh\nexit 9\n")
    speeds(Watch(WatchFlags(), events.append, on_gpu=True), [100.0])
    assert len(events) == 1


def test_a_stalled_step_is_told_while_it_runs(events):
    now = [0.0]
    watched = Watch(WatchFlags(), events.append, clock=lambda: now[0])
    speeds(watched, [100.0] * 3, seconds=20.0)
    watched.start()
    watched.begin(4)
    now[0] = 99.0
    time.sleep(1.5)
    assert not events  # not yet five times the usual
    now[0] = 101.0
    deadline = time.monotonic() + 20
    while not events and time.monotonic() < deadline:
        time.sleep(0.05)
    watched.close()
    assert [(event.kind, event.step) for event in events] == [("stall", 4)] and "20.0 s are usual" in events[0].cause


def test_a_run_of_several_processes_gives_up_a_step_that_hangs(events):
    """Not a long one: three times the longest of the last steps, and 300 s at least. A save is no step."""
    now, given_up = [0.0], []
    watched = Watch(WatchFlags(), events.append, clock=lambda: now[0], give_up=given_up.append)
    for step, seconds in ((1, 2.0), (2, 150.0), (3, 2.0)):  # the second one has longer rows
        watched.begin(step)
        watched.end({"seconds": seconds, "tokens_per_second": 100.0})

    def look(seconds):
        now[0] += seconds
        time.sleep(1.3)
        return len(given_up)

    watched.start()
    watched.begin(4)
    assert not look(445.0)
    assert [event.kind for event in events] == ["stall"]
    assert look(10.0)  # also a step that was told to stall
    given_up.clear()
    watched.rest()
    assert not look(1000.0)
    watched.begin(5)
    deadline = time.monotonic() + 20
    while not look(451.0) and time.monotonic() < deadline:
        pass
    watched.close()
    assert "step 5 has run for" in given_up[0] and "the longest of the last ones took 150.0 s" in given_up[0]
    assert limits_of(None, False) == (3600, 300) and limits_of(7200.0, False) == (25200, 21600)
    assert limits_of(10.0, True) == (3630, 3630)


# ------------------------------------------------------------------------------------------------------------ the loop


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


def test_enough_steps_make_what_is_usual(events):
    watched = Watch(WatchFlags(on_spike="stop"), events.append)
    usual(watched, ENOUGH)
    watched.rewind(ENOUGH - 1)  # one too few
    assert watched.judge(ENOUGH, {"loss": 9.0, "grad_norm": 1.0}) is None


def test_a_norm_of_a_few_times_the_usual_one_is_no_spike():
    """As batches that are mostly padding have. Norms vary by factors, so that their logarithm is judged."""
    events = []
    watch = Watch(WatchFlags(), events.append)
    norms = [0.7, 1.1, 0.9, 1.3, 0.8, 1.0, 1.2, 0.75, 0.95, 1.05, 1.4, 0.85]
    for step, norm in enumerate([*norms, 4.6], 1):
        assert watch.judge(step, {"loss": 2.0, "grad_norm": norm}) is None
    assert not events
    watch.judge(14, {"loss": 2.0, "grad_norm": 100.0})
    assert [event.kind for event in events] == ["spike"] and "gradient norm 100 is" in events[0].cause
