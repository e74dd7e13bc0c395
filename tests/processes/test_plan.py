# pytest tests/processes/test_plan.py
"""Plans of several hosts and of several processes a host."""

import dataclasses

import pytest

from alst_jax.config import TrainConfig, UserError
from alst_jax.flag_checks import check_run
from alst_jax.hardware.machines import GIB, parse_cluster
from alst_jax.planning.job import Job
from alst_jax.planning.process import beside_pools
from alst_jax.planning.report import network
from alst_jax.planning.seconds import collectives, over_hosts
from alst_jax.profile import Profile
from alst_jax.run import target
from tests.helpers import tiny

JOB = Job(tiny(num_heads=32, num_kv_heads=16), Profile(), 4, 4096, 4, 8, 1, "float32", "float32")


@pytest.mark.parametrize(
    ("cluster", "dp", "sp", "outside"),
    [
        ("4x8xH100", 4, 8, {"all-gather", "reduce-scatter", "all-reduce"}),
        ("4x8xH100", 2, 16, {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}),
        ("8xH100", 1, 8, set()),
    ],
)
def test_what_goes_over_hosts(cluster, dp, sp, outside):
    job = dataclasses.replace(JOB, dp=dp, sp=sp, rows=dp)
    names = {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert collectives(job).keys() == names and collectives(job)["all-to-all"]["bytes"] > 0
    assert {name for name in names if over_hosts(name, job, parse_cluster(cluster))} == outside


def test_the_line_about_the_network():
    over = {name: call["bytes"] for name, call in collectives(JOB).items()}
    inside = over.pop("all-to-all")  # eight devices of a host share a sequence
    assert network(JOB, parse_cluster("4x8xH100")) == (
        f"collectives of a device in a step: {sum(over.values()) / GIB:.1f} GiB between hosts, "
        f"{inside / GIB:.1f} GiB inside of a host (seq 8 inside of a host)"
    )


def test_each_process_has_libraries_and_writers_of_its_own():
    """Beside the pools: 4 GiB a process, 3 for each further device, 3 for a save; the copies of this job are small."""
    of = lambda processes: round(beside_pools(JOB, 8, processes) / GIB)
    assert [of(1), of(2), of(8)] == [4 + 3 + 7 * 3, 2 * (4 + 3) + 6 * 3, 8 * (4 + 3)]


def test_processes_of_a_planned_run():
    plan = TrainConfig(plan_for="4x8xH100", plan_only=True)
    assert [target(dataclasses.replace(plan, processes=n)).processes for n in (None, 4, 32)] == [1, 1, 8]
    check_run(dataclasses.replace(plan, processes=32, seq_len=1024))
    for wrong in (6, 12, 2):
        with pytest.raises(UserError, match=f"--processes {wrong}: must be the same number on each host"):
            target(dataclasses.replace(plan, processes=wrong))
