# pytest tests/memory/test_host_pools.py
"""Pinned host memory: the pools of the devices, and what a process holds beside them."""

import dataclasses
import json
import sys

import jax
import pytest

import train
from alst_jax.config import UserError
from alst_jax.hardware import environment
from alst_jax.hardware.machines import GIB, parse_cluster
from alst_jax.planning.estimate import estimate
from alst_jax.planning.plan import Choice
from alst_jax.planning.planner import Planner
from alst_jax.planning.process import describe_process, host_outgrown, process_bytes, with_room
from alst_jax.planning.report import announce_plan, report
from alst_jax.run_state import make_host_pool
from alst_jax.storage import saving
from alst_jax.xla import host
from benchmarks.shapes import LLAMA_8B, LLAMA_70B, QWEN3_32B
from tests.memory.machines_and_jobs import EIGHT, H100, planner


@pytest.fixture
def reserved(monkeypatch):
    """GiB that were asked for of each pool, and of how many devices, on a machine with two GPUs."""
    asked = []
    monkeypatch.setattr(host, "reserve", lambda gibibytes, devices: asked.append((gibibytes, len(devices))))
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    monkeypatch.setenv(environment.HOST_LIMIT, "100")
    return asked


def on_host(gib: float, devices: int):
    """A plan with so much pinned host memory a device, beside what saving holds."""
    made = estimate(dataclasses.replace(EIGHT, sp=devices), H100)
    return dataclasses.replace(made, host={"weights": int(gib * GIB), "saving": saving.BUFFERS // min(devices, 8)})


@pytest.mark.parametrize(
    "gib,devices,pinned",
    [
        (40, 1, [(42, 1)]),
        (40.5, 1, [(43, 1)]),
        (40, 2, [(42, 2)]),
        (40, 8, [(42, 2)]),  # of the devices that are here
        (99, 2, [(100, 2)]),
        (100, 1, [(100, 1)]),
        (104, 1, [(104, 1)]),  # never more than jax may pin, if less will do
        (15, 1, []),
        (15, 2, []),
    ],
)
def test_the_pools_are_of_the_plans_size(reserved, capsys, gib, devices, pinned):
    make_host_pool(on_host(gib, devices))
    assert reserved == pinned
    assert ("pinning" in capsys.readouterr().out) == bool(pinned)


def chosen(gib: float, devices: int, limit: int | None = 109, model=LLAMA_8B) -> Choice:
    """Such a plan, of weights whose largest stack is 3.5 GiB."""
    plan = dataclasses.replace(on_host(gib, devices), host_limit=limit and limit * GIB)
    return Choice(dataclasses.replace(EIGHT, model=model, dp=1, sp=devices), plan)


@pytest.mark.parametrize(
    "gib,pool",
    [
        (101.1, 109),
        (60, 64),
        (61.5, 64),
        (62.5, 109),  # a power of two with the slack, or the limit
        (112, 112),
        (10, 10),
        (0.5, 1),
        (0, 0),
    ],
)  # or what is needed
def test_a_process_holds_a_pool_of_whole_pieces_for_each_device(gib, pool):
    for devices, per_host, here, staging in ((1, 1, 1, 4), (1, 8, 1, 4), (2, 2, 2, 2), (16, 2, 2, 0.25)):
        expected = lambda pool: (here * pool + staging + 3 + 4 + (here - 1) * 3) * GIB
        assert process_bytes(chosen(gib, devices), per_host) == expected(pool)
        if pool == 109:
            assert process_bytes(chosen(gib, devices, None), per_host) == expected(128)


@pytest.mark.parametrize(
    "planned,devices,layers,pinned,measured",
    [
        (104.1, 1, 32, 109, 118.7),
        (104.1, 1, 32, 109, 119.0),
        (105.1, 1, 32, 106, 116.7),
        (44.0, 2, 32, 105, 141.1),
        (25.7, 1, 8, 109, 38.6),
        (8.9, 1, 4, 109, 13.8),
        (4.4, 2, 4, 109, 16.1),
    ],
)  # as they are planned today
def test_processes_that_were_measured(planned, devices, layers, pinned, measured):
    """Of one and two H100 (benchmarks/results/2026-11-27-h100.md has them all); the constants are fitted to them."""
    model = dataclasses.replace(LLAMA_8B, num_layers=layers)
    choice = chosen(planned - 3 / devices, devices, pinned, model)
    assert process_bytes(choice, devices) == pytest.approx(measured * GIB, rel=0.04)


def test_more_than_a_host_has_is_said():
    cluster = parse_cluster("2xH100", 100)
    fits, not_so = chosen(28, 2), chosen(40, 2)
    text = describe_process(fits, cluster)
    assert text.startswith("the whole process: about 76 of 100 GiB of host memory: 64 in jax's pools")
    assert host_outgrown(fits, cluster) == ""
    text = host_outgrown(not_so, cluster)
    assert text.startswith("the host has less memory than the run needs: the whole process: about 140 of 100")
    assert text.endswith("_GB=44 in the environment leaves it room")
    assert host_outgrown(not_so, parse_cluster("2xH100", 8)).endswith("loading and saving")  # nothing would help


@pytest.mark.parametrize("gib,fits", [(28, True), (40, False)])
def test_what_is_more_than_a_host_has_does_not_fit(monkeypatch, gib, fits):
    ask = planner(cluster=parse_cluster("2xH100", 100), json=True, plan_only=True)
    choice = chosen(gib, 2)
    choice = dataclasses.replace(choice, plan=dataclasses.replace(choice.plan, device={"weights": GIB}))
    monkeypatch.setattr(Planner, "choose", lambda self, job, say=print: choice)
    assert json.loads(report(ask, EIGHT))["fits"] is fits
    if fits:
        announce_plan(ask, ask.choose(EIGHT), 0.0)
    else:
        with pytest.raises(UserError, match="^the host has less memory than the run needs: .*_GB=44"):
            announce_plan(ask, ask.choose(EIGHT), 0.0)


@pytest.mark.parametrize(
    "name,gib,job,pinned",
    [
        ("H100", 125, EIGHT, 109),
        ("8xH100", 560, dataclasses.replace(EIGHT, sp=8), 61),  # what is left to the system is enough
        (
            "H100",
            221,
            dataclasses.replace(EIGHT, model=QWEN3_32B),
            221 - 16 - 3 - 4,
        ),  # a stack of 15.6 GiB goes through 16
        ("2xH100", 221, dataclasses.replace(EIGHT, model=LLAMA_70B, sp=2), (221 - 32 - 3 - 4 - 3) / 2),
    ],
)
def test_plans_leave_room_for_what_a_process_holds(name, gib, job, pinned):
    cluster = parse_cluster(name, gib)
    room = with_room(cluster, job)
    assert room.host_share == pinned * GIB
    plan = dataclasses.replace(on_host(pinned - 4, job.devices), host_limit=room.host_share)
    assert process_bytes(Choice(job, plan), cluster.per_host) <= cluster.host_memory
    limited = dataclasses.replace(cluster, pinned=7 * GIB)
    assert with_room(limited, job) == limited and with_room(None, job) is None


def test_each_device_gets_its_pool(monkeypatch):
    """XLA has one for each: had the first got all, the second would be refused its own in the step."""

    class Program:
        def lower(self, number):
            self.place = number.sharding
            return self

        def compile(self):
            return self

        def __call__(self, number):
            assert number.sharding == self.place
            made.append((self.gibibytes, *self.place.device_set))
            return number

    def program(gibibytes):
        made_one = Program()
        made_one.gibibytes = gibibytes
        return made_one

    made = []
    monkeypatch.setattr(host, "reservation", program)
    host.reserve(3, jax.devices()[:2])
    assert sorted(made, key=str) == [(3, device) for device in jax.devices()[:2]]


def test_the_environment_is_for_the_devices_of_the_flags(monkeypatch):
    asked = []
    monkeypatch.setattr(train.environment, "prepare", lambda *values: asked.append(values[2:]))
    monkeypatch.setattr(train, "run", lambda config: 0)
    for flags in (("--dp", "1", "--sp", "2"), ("--dp", "2"), ("--sp", "2"), (), ("--profile-steps", "2")):
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", "any", "--data", "any", *flags, "--host-memory", "50"])
        assert train.main() == 0
    expected = [(2, False), (2, False), (None, False), (None, False), (None, True)]  # devices; whether steps are traced
    assert asked == [(50.0, devices, False, 1, traced) for devices, traced in expected]  # one process


def test_a_pool_without_a_limit(reserved, monkeypatch):
    monkeypatch.delenv(environment.HOST_LIMIT)
    make_host_pool(on_host(120, 1))
    assert reserved == [(122, 1)]


def test_a_host_that_refuses_to_pin(reserved, monkeypatch):
    def refuse(gibibytes, devices, reason="RESOURCE_EXHAUSTED: no more"):
        raise jax.errors.JaxRuntimeError(f"{reason}\nand more lines")

    monkeypatch.setattr(host, "reserve", refuse)
    with pytest.raises(UserError, match="42 GiB of host memory could not be pinned: RESOURCE_EXHAUSTED: no more. Free"):
        make_host_pool(on_host(40, 1))
    monkeypatch.setattr(host, "reserve", lambda gibibytes, devices: refuse(gibibytes, devices, "INTERNAL: broken"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):  # not the user's fault
        make_host_pool(on_host(40, 1))
