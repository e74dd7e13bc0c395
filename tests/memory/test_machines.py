# pytest tests/memory/test_machines.py
"""Machines by name, and what is said when there is no such machine."""

import pytest

from alst_jax.config import UserError
from alst_jax.hardware.environment import peak_flops
from alst_jax.hardware.machines import GIB, MACHINES, machine_of_kind, parse_cluster, pinned_share


@pytest.mark.parametrize(
    "text,name,hosts,per_host,topology",
    [
        ("H100-80", "H100-80", 1, 1, "1x1x1"),
        ("h100", "H100-80", 1, 1, "1x1x1"),
        ("8xH100-80", "H100-80", 1, 8, "1x1x8"),
        ("2xA100", "A100-80", 1, 2, "1x1x2"),
        ("4x8xH200", "H200-141", 4, 8, "4x1x8"),
        ("B200", "B200", 1, 1, "1x1x1"),
        ("RTX", "RTX-4090-24", 1, 1, "1x1x1"),
        (" 4xL40S-48 ", "L40S-48", 1, 4, "1x1x4"),
    ],
)
def test_names_and_numbers(text, name, hosts, per_host, topology):
    cluster = parse_cluster(text)
    assert (cluster.machine.name, cluster.hosts, cluster.per_host, cluster.topology) == (
        name,
        hosts,
        per_host,
        topology,
    )
    assert cluster.devices == hosts * per_host


@pytest.mark.parametrize(
    "text,message",
    [
        ("X100", "no such machine; known are H100-80, H200-141"),
        ("X100", "the closest is H100-80"),
        ("8xL4OS", "the closest is L40S-48"),
        ("H", "several machines begin so"),
        ("", "(nothing)"),
        ("16xH100", "a host has at most 8 devices"),
        ("16xH100", "as in 2x8xH100-80"),
        ("0xH100", "at least one host of one device"),
        ("2x2x2xH100", "no such machine"),
    ],
)
def test_what_does_not_exist_is_refused(text, message):
    with pytest.raises(UserError) as error:
        parse_cluster(text)
    assert "--plan-for" in str(error.value) and message in str(error.value)


def test_host_memory_is_that_of_a_host_and_shared_by_its_devices():
    cluster = parse_cluster("2x4xH100", 1000)
    assert cluster.host_memory == 1000 * GIB and cluster.host_share == (1000 - 16 - 3 * 8) * GIB // 4
    assert parse_cluster("8xH100").host_memory == 8 * parse_cluster("H100").host_memory


@pytest.mark.parametrize(
    "gib,devices,pinned",
    [(1000, 1, 984), (64, 1, 51), (30, 1, 17), (16, 1, 4), (250, 2, 226), (560, 8, 488), (64, 8, 16)],
)
def test_what_a_host_keeps_for_itself(gib, devices, pinned):
    assert pinned_share(gib * GIB, devices) == pinned * GIB // devices


def test_every_machine_is_described_for_the_compiler():
    for machine in MACHINES.values():
        major, minor = machine.capability
        text = machine.target_config
        assert f"major: {major} minor: {minor}" in text and f"device_memory_size: {machine.memory}" in text
        assert text.count("{") == text.count("}") and machine.usable < machine.memory
        assert machine.memory / 1e9 == pytest.approx(
            float(machine.name.rsplit("-", 1)[1]) if "-" in machine.name else 180, rel=0.11
        )


def test_device_kinds_as_jax_names_them():
    assert machine_of_kind("NVIDIA H100 80GB HBM3").name == "H100-80"
    assert machine_of_kind("NVIDIA GH200 480GB").name == "GH200-96"  # not the H200 in it
    assert machine_of_kind("NVIDIA GeForce RTX 4090").name == "RTX-4090-24"
    assert machine_of_kind("cpu") is None and peak_flops("cpu") is None
    assert peak_flops("NVIDIA H200") == 989e12
