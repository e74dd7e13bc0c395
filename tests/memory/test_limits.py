# pytest tests/memory/test_limits.py
"""Host memory that is really there: control groups, --host-memory, and what the user says jax may pin."""

import fnmatch
import os

import jax
import psutil
import pytest

from alst_jax import run
from alst_jax.config import TrainConfig, UserError
from alst_jax.hardware import environment
from alst_jax.hardware import host_limits as limits
from alst_jax.hardware.host_limits import cgroup_limits, host_memory
from alst_jax.hardware.machines import GIB, pinned_share
from alst_jax.run import target
from train import parse

TOTAL = psutil.virtual_memory().total
UNLIMITED = 9223372036854771712  # of version 1


def files(root, **texts):
    """A file system with these files; `__` in a name is a slash."""
    for name, text in texts.items():
        file = root / name.replace("__", "/").replace("DOT", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


V2, V1 = "sys__fs__cgroup", "sys__fs__cgroup__memory"


@pytest.mark.parametrize(
    "texts,expected",
    [
        ({}, []),
        ({"proc__self__cgroup": "0::/"}, []),
        # version 2: the process's own group, and those above it
        (
            {"proc__self__cgroup": "0::/a/b", f"{V2}__a__b__memoryDOTmax": 5 * GIB, f"{V2}__a__memoryDOTmax": "max"},
            [5 * GIB],
        ),
        (
            {"proc__self__cgroup": "0::/a/b", f"{V2}__a__b__memoryDOTmax": "max", f"{V2}__a__memoryDOTmax": 3 * GIB},
            [3 * GIB],
        ),
        ({"proc__self__cgroup": "0::/a", f"{V2}__other__memoryDOTmax": 3 * GIB}, []),
        # in a container: the host's path, or one above the top; the container's own limit is at the top
        ({"proc__self__cgroup": "0::/docker/1f", f"{V2}__memoryDOTmax": 4 * GIB}, [4 * GIB]),
        ({"proc__self__cgroup": "0::/../x", f"{V2}__memoryDOTmax": 4 * GIB}, [4 * GIB]),
        ({f"{V2}__memoryDOTmax": 4 * GIB}, [4 * GIB]),
        # version 1, with its own path for each controller
        (
            {
                "proc__self__cgroup": "9:cpu,memory:/m\n3:pids:/p\n0::/",
                f"{V1}__m__memoryDOTlimit_in_bytes": 2 * GIB,
                f"{V1}__p__memoryDOTlimit_in_bytes": GIB,
                f"{V1}__memoryDOTlimit_in_bytes": UNLIMITED,
            },
            [2 * GIB, UNLIMITED],
        ),
        # both at once
        (
            {
                "proc__self__cgroup": "4:memory:/\n0::/u",
                f"{V1}__memoryDOTlimit_in_bytes": 6 * GIB,
                f"{V2}__unified__u__memoryDOTmax": 7 * GIB,
            },
            [6 * GIB, 7 * GIB],
        ),
    ],
)
def test_limits_of_control_groups(tmp_path, texts, expected):
    root = files(tmp_path, **texts)
    assert sorted(set(cgroup_limits(root))) == expected
    assert host_memory(root=root) == min([TOTAL, *expected])


def test_the_least_counts(tmp_path):
    root = files(tmp_path, proc__self__cgroup="0::/", **{f"{V2}__memoryDOTmax": GIB // 2})
    assert host_memory(0.25, root) == GIB // 4 and host_memory(0.75, root) == GIB // 2
    assert host_memory(10**6, tmp_path / "nothing") == TOTAL


@pytest.fixture
def variables(monkeypatch):
    """environment.prepare on a machine with 100 GiB, of which a control group leaves 40; what it sets is taken back."""
    monkeypatch.setattr(environment, "visible_gpus", lambda: 0)
    monkeypatch.setattr(limits, "cgroup_limits", lambda root: [40 * GIB])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 100 * GIB}))
    monkeypatch.setattr(os, "environ", {})
    return os.environ


@pytest.mark.parametrize("cap,counts", [(None, 40), (50, 40), (20, 20)])
def test_jax_may_pin_what_is_there(variables, cap, counts):
    environment.prepare(None, host_memory_gib=cap)
    assert variables[environment.HOST_LIMIT] == str(pinned_share(counts * GIB, 1) // GIB)


@pytest.mark.parametrize("gpus,used,sharing", [(1, None, 1), (4, None, 4), (4, 2, 2), (2, 8, 2)])
def test_each_device_has_its_share(variables, monkeypatch, gpus, used, sharing):
    """XLA's limit is of each device's pool: two pools of a host may not both take all of it."""
    monkeypatch.setattr(environment, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(limits, "cgroup_limits", lambda root: [])
    environment.prepare(None, devices=used)
    share = int(variables[environment.HOST_LIMIT])
    assert share == pinned_share(100 * GIB, sharing) // GIB and share * sharing <= 100 - 13 - 8 * (sharing - 1)


@pytest.mark.parametrize(
    "listed,visible,count",
    [
        (["GPU 0: NVIDIA H100 (UUID: GPU-1)", "GPU 1: NVIDIA H100 (UUID: GPU-2)"], None, 2),
        (["GPU 0: NVIDIA H100 (UUID: GPU-1)", "  MIG 1g.10gb Device 0: (UUID: MIG-1)"], None, 1),
        (["GPU 0: a", "GPU 1: b", "GPU 2: c"], "2,0", 2),
        (["GPU 0: a"], "0,1", 1),
        (["GPU 0: a"], "", 0),
        (["GPU 0: a", "GPU 1: b"], "-1", 0),
        (["GPU 0: a", "GPU 1: b"], "1,-1,0", 1),
        (["GPU 0: a"], "NoDevFiles", 0),
        ([], None, 3),
        ([], "0", 1),
    ],
)  # no nvidia-smi, and three files of the driver
def test_gpus_that_jax_will_see(monkeypatch, listed, visible, count):
    monkeypatch.setattr(os, "environ", {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    files = ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia2", "/dev/nvidiactl", "/dev/nvidia-uvm"]
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: fnmatch.filter(files, pattern))
    smi = environment.subprocess.run
    command = ["printf", "\n".join(listed)] if listed else ["false"]
    monkeypatch.setattr(environment.subprocess, "run", lambda _, **how: smi(command, **how))
    assert environment.visible_gpus() == count
    if not listed:
        monkeypatch.setattr(environment.subprocess, "run", lambda _, **how: smi(["no-such-command"], **how))
        assert environment.visible_gpus() == count


@pytest.mark.parametrize("traced,deterministic", [(False, False), (True, False), (False, True), (True, True)])
def test_the_compiler_is_told(variables, monkeypatch, traced, deterministic):
    monkeypatch.setattr(environment, "visible_gpus", lambda: 1)
    monkeypatch.setattr(environment, "has_cuda_compiler", lambda: True)
    environment.prepare(None, deterministic=deterministic, traced=traced)
    given = variables["XLA_FLAGS"].split()
    assert ("--xla_gpu_enable_command_buffer=" in given) == traced  # no CUDA graphs
    assert ("--xla_gpu_deterministic_ops=true" in given) == deterministic
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in given


@pytest.mark.parametrize("gpus,beside,limit", [(1, 5, 87), (1, 23, 77), (2, 30, 35), (1, 200, 0)])
def test_a_model_that_needs_more_beside_its_pools_is_left_room(variables, monkeypatch, gpus, beside, limit):
    """Of 100 GiB, 13 are kept back for each first device, and 8 for each other."""
    monkeypatch.setattr(environment, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(limits, "cgroup_limits", lambda root: [])
    environment.prepare(None)
    environment.leave_room(lambda pools: beside * GIB)
    assert variables[environment.HOST_LIMIT] == str(limit)


def test_the_model_is_known_before_jax_makes_its_devices(monkeypatch):
    """Devices read the limit once."""
    asked = []
    monkeypatch.setattr(environment, "leave_room", lambda beside: asked.append(beside(2) // GIB))
    monkeypatch.setattr(run, "target", lambda config: asked.append("devices") or target(config))
    run.subject(parse(["--steps", "1", "--seq-len", "128", "--sp", "1", "--simulate-devices", "1"]))
    assert asked == [7 + 3, "devices"]  # a save's 3 GiB, a process's 4, the second device's 3, and some MiB


def test_what_the_user_sets_wins(variables):
    variables[environment.HOST_LIMIT] = "37"
    environment.prepare(None, host_memory_gib=20)
    environment.leave_room(lambda pools: 90 * GIB)
    assert variables[environment.HOST_LIMIT] == "37" and environment.pinned_limit() == 37 * GIB
    variables[environment.HOST_LIMIT] = "a lot"
    with pytest.raises(UserError, match="=a lot: a whole number of GiB"):
        environment.pinned_limit()


class Card:
    """What a plan asks of a device."""

    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    def memory_stats(self):
        return {"bytes_limit": 75 * GIB}


@pytest.fixture
def card(monkeypatch, variables):
    """One GPU on that machine."""
    monkeypatch.setattr(jax, "devices", lambda: [Card()])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    return variables


@pytest.mark.parametrize(
    "cap,set_by_user,host,usable",
    [
        (None, None, 40, pinned_share(40 * GIB, 1)),
        (20, None, 20, pinned_share(20 * GIB, 1)),
        (20, "37", 20, 37 * GIB),
        (None, "90", 40, 40 * GIB),
    ],
)  # no more than is there, whatever the user says
def test_the_cluster_at_hand(card, cap, set_by_user, host, usable):
    if set_by_user:
        card[environment.HOST_LIMIT] = set_by_user
    environment.prepare(None, host_memory_gib=cap)
    cluster = target(TrainConfig(host_memory=cap and float(cap)))
    assert cluster.host_memory == host * GIB and usable - GIB < cluster.host_share <= usable
    assert (cluster.machine.name, cluster.machine.usable) == (Card.device_kind, 75 * GIB)
    assert (cluster.machine.peak_flops, cluster.devices) == (989e12, 1)


@pytest.mark.parametrize(
    "dp,set_by_user,share", [(None, None, 9), (1, None, 27), (None, "20", 20), (1, "30", 30), (None, "21", None)]
)
def test_two_cards_share_the_host_if_both_are_used(card, monkeypatch, dp, set_by_user, share):
    monkeypatch.setattr(environment, "visible_gpus", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    if set_by_user:
        card[environment.HOST_LIMIT] = set_by_user
    config = TrainConfig(dp=dp)
    environment.prepare(None, devices=config.devices)
    if share is None:
        with pytest.raises(
            UserError, match="_GB=21: jax may pin this much for each of 2 devices, but the host has 40 GiB; set it to 9"
        ):
            target(config)
    else:
        assert target(config).host_share == share * GIB


def test_a_card_that_is_not_in_the_list_counts_as_an_h100(card, monkeypatch):
    monkeypatch.setattr(Card, "device_kind", "NVIDIA Strange")
    assert target(TrainConfig()).machine.bandwidth == 3.352e12


def test_host_memory_means_nothing_on_a_cpu():
    assert target(TrainConfig()) is None
    with pytest.raises(UserError, match="--host-memory 8: limits what GPUs may keep .* --plan-for"):
        target(TrainConfig(host_memory=8.0))
