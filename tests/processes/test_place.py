# pytest tests/processes/test_place.py
"""Which process is this one, and where do its devices lie in the mesh: by flags, SLURM and Open MPI."""

import dataclasses
import types

import pytest

from alst_jax.config import TrainConfig, UserError
from alst_jax.flag_checks import check_run
from alst_jax.parallel.mesh import by_host
from alst_jax.processes.place import Place, find_place, first_node
from alst_jax.processes.start import check_same, local_devices

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"}


def flags(**values):
    return TrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "environment", "place"),
    [
        ({}, {}, None),
        ({"processes": 1}, SLURM, None),  # alone, whatever the launcher says
        ({}, SLURM, Place("gpu007", 61440 + 906, 16, 9, "SLURM")),  # (5000 + 2) % 4096 = 906
        ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, {k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # in a batch script, before srun
        ({"coordinator": "other:7000"}, SLURM, Place("other", 7000, 16, 9, "SLURM")),
        ({"coordinator": "node1:6000"}, OPEN_MPI, Place("node1", 6000, 8, 3, "Open MPI")),
        ({}, OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"start_timeout": 60}, OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),  # the script of more hosts, on one
        ({"coordinator": "[fe80::1]:6000", "processes": 2, "process": 1}, {}, Place("fe80::1", 6000, 2, 1, "flags")),
    ],
)
def test_the_place_of_a_process(values, environment, place):
    assert find_place(flags(**values), environment) == place


@pytest.mark.parametrize(
    ("values", "environment", "words"),
    [
        ({"processes": 2}, {}, "need --coordinator HOST:PORT and --process;"),
        ({"coordinator": "a:1", "process": 0}, {}, "need --processes;"),
        ({}, OPEN_MPI, "need --coordinator HOST:PORT (Open MPI was found, which does not say it)"),
        (
            {"coordinator": "a:1", "processes": 2, "process": 2},
            {},
            "--process 2: processes are counted from 0, and --processes is 2; use 0 to 1",
        ),
        ({"coordinator": "a", "processes": 2, "process": 0}, {}, "--coordinator a: write HOST:PORT"),
        ({"coordinator": "a:70000", "processes": 2, "process": 0}, {}, "a port from 1 to 65535"),
        ({"processes": 1, "process": 3}, {}, "--process 3 with --processes 1"),
        ({"process": 0}, {}, "several processes need --coordinator HOST:PORT and --processes;"),
        ({"start_timeout": 60}, {}, "--start-timeout 60: the run has one process, which waits for no other"),
    ],
)
def test_what_names_no_place_is_refused(values, environment, words):
    with pytest.raises(UserError) as error:
        find_place(flags(**values), environment)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("n[1,7-15]", "n1"),
        ("rack[2-3]-ib", "rack2-ib"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("values", "several", "words"),
    [
        ({"check_numerics": True}, True, "--check-numerics compares on the devices of one process"),
        ({"on_nonfinite": "rewind", "save_every": 1}, True, "--on-nonfinite rewind is written for one process"),
        ({"on_spike": "rewind", "save_every": 1}, True, "--on-spike rewind is written for one process"),
        ({"merge_adapter": True, "lora_rank": 4}, True, "--merge-adapter needs the whole model in one process"),
        ({"plan_only": True, "processes": 2}, False, "--plan-only prints a plan and needs no other process"),
        ({"plan_only": True, "process": 0}, False, "--plan-only prints a plan and needs no other process"),
        ({"show_samples": 2, "start_timeout": 60}, False, "--show-samples prints samples and needs no other process"),
        ({"local_devices": (0, 1)}, False, "--local-devices divides a host's GPUs between several processes"),
        ({"local_devices": (-1,)}, True, "GPUs are counted from 0"),
    ],
)
def test_what_several_processes_refuse(values, several, words):
    with pytest.raises(UserError) as error:
        check_run(flags(**values), several)
    assert words in str(error.value)


def test_one_process_refuses_nothing_of_these():
    check_run(flags(check_numerics=True, on_nonfinite="rewind", save_every=1), several=False)


def test_different_flags_and_versions_are_named():
    facts = [
        {"host": host, "flags": {"seq_len": 1024, "data": ["a", "b"]}, "versions": {"jax": "0.12.0"}} for host in "xy"
    ]
    check_same(facts)
    facts[1]["flags"] = {"seq_len": 2048, "data": ["a", "b"]}
    with pytest.raises(UserError, match=r"--seq-len 2048 on process 1 \(y\), and 1024 on process 0 \(x\)"):
        check_same(facts)
    facts[1]["flags"] = facts[0]["flags"]
    facts[1]["versions"] = {"jax": "0.11.2"}
    with pytest.raises(UserError, match=r"version of jax: 0.11.2 on process 1 \(y\), and 0.12.0 on process 0"):
        check_same(facts)


def test_devices_are_ordered_by_host():
    """Four processes that were dealt out in turn over two hosts, two devices each: a row of four stays on its host."""
    devices = [types.SimpleNamespace(process_index=p, id=10 * p + n) for p in range(4) for n in range(2)]
    ordered = by_host(devices, ("a", "b", "a", "b"))
    assert [d.id for d in ordered] == [0, 1, 20, 21, 10, 11, 30, 31]
    assert by_host(devices, ("a", "a", "b", "b")) == devices


def test_containers_of_two_machines_may_have_one_name():
    from alst_jax.processes.link import Link

    link = Link.__new__(Link)
    link.rank, link.hosts, link.machines = 1, ("c", "c", "c"), ("c 1", "c 2", "c 2")
    assert link.local_ranks == [1, 2]
    devices = [types.SimpleNamespace(process_index=p, id=p) for p in range(3)]
    assert [d.id for d in by_host(devices, ("c 1", "c 2", "c 1"))] == [0, 2, 1]


def test_an_event_of_all_is_told_once(monkeypatch):
    """Those of a host are told by its first process, which names itself."""
    from alst_jax import metrics
    from alst_jax.watch import Event

    said, shown = [], []
    log = types.SimpleNamespace(event=lambda record: None)
    for rank in range(4):  # two on each host
        first = [0, 2][rank // 2]
        of_rank = types.SimpleNamespace(
            rank=rank,
            first=rank == 0,
            local_ranks=[first, first + 1],
            say=lambda text, rank=rank: said.append((rank, text)),
        )
        monkeypatch.setattr(metrics, "link", lambda of_rank=of_rank: of_rank)
        tell = metrics.teller(types.SimpleNamespace(say=shown.append), log)
        for kind in ("spike", "memory"):
            tell(Event(kind, 3, "why", "none"))
    assert shown == ["warning: step 3: spike: why; none", "warning: step 3: memory: why; none"]
    assert said == [(2, "warning: step 3: memory: why; none")]


@dataclasses.dataclass
class Host:
    """What `local_devices` asks of a link."""

    rank: int
    local_ranks: list
    facts: list
    several: bool = True
    host: str = "a"


def test_the_gpus_of_a_host_are_divided(monkeypatch):
    def of(rank, ranks, seen, gpus):
        current = Host(rank, ranks, [{"gpus": s} for s in seen])
        monkeypatch.setattr("alst_jax.processes.start.link", lambda: current)
        return local_devices(current, gpus)

    assert of(1, [0, 1], [None, None], 8) == [4, 5, 6, 7]
    assert of(5, [4, 5, 6, 7], [None] * 8, 4) == [1]
    assert of(0, [0], [None], 8) is None  # one process a host
    assert of(1, [0, 1], ["0", "1"], 1) is None  # the launcher has divided them
    assert of(1, [0, 1], [None, None], 0) is None  # no GPUs
    with pytest.raises(UserError, match="3 processes on a do not divide its 8 GPUs"):
        of(1, [0, 1, 2], [None] * 3, 8)
