# python -m pytest tests/unit/test_watch.py
"""Watching a run: an event for each thing that goes wrong and none for what is usual."""

import itertools
import os
import time

import numpy as np
import pytest

from alst_jax import watch
from alst_jax.watch import ENOUGH, Watch, limits_of
from alst_jax.watch_flags import WatchFlags

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
