"""The devices of this process, and devices that it does not have, to compile for."""

import dataclasses

import jax

from alst_jax.config import UserError
from alst_jax.hardware.environment import HOST_LIMIT, pinned_limit
from alst_jax.hardware.host_limits import host_memory
from alst_jax.hardware.machines import GIB, Cluster, machine_of_kind
from alst_jax.processes.link import link


def absent_devices(cluster: Cluster) -> list[jax.Device]:
    """Devices of a cluster that this process does not have, to compile for."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        "", "cuda", target_config=cluster.machine.target_config, topology=cluster.topology
    )
    return list(topology.devices)


def is_absent(mesh: jax.sharding.Mesh) -> bool:
    """Whether the mesh consists of absent devices. Devices of other processes of the run are not absent."""
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return not mine[0].addressable_memories()


def this_cluster(host_memory_gib: float | int | None = None, devices: int | None = None) -> Cluster | None:
    """The devices and the host of this process; None on a CPU.

    host_memory_gib: use no more host memory. devices: the number of devices that share it; None: all. A device that is
    not in the list counts as an H100 in speed, with its own memory. The environment's limit on pinned memory counts up
    to the host's memory. UserError if several devices together could pin more than that.
    """
    device = (jax.local_devices() if link().several else jax.devices())[0]
    if device.platform != "gpu":
        return None
    limit = device.memory_stats()["bytes_limit"]
    known = machine_of_kind(device.device_kind) or machine_of_kind("H100")
    machine = dataclasses.replace(known, name=device.device_kind, kind=device.device_kind, memory=limit, fraction=1.0)
    pinned = pinned_limit()
    hosts = len(set(link().machines))
    per_host = jax.device_count() // hosts if link().several else jax.local_device_count()
    cluster = Cluster(
        machine, hosts, per_host, host_memory(host_memory_gib), used=devices, processes=len(link().local_ranks)
    )
    if pinned is None:
        return cluster
    if cluster.sharing > 1 and pinned * cluster.sharing > host_memory():
        raise UserError(
            f"{HOST_LIMIT}={pinned // GIB}: jax may pin this much for each of {cluster.sharing} devices, but "
            f"the host has {host_memory() / GIB:.0f} GiB; set it to {cluster.host_share // GIB} or less, "
            "or unset it: then the run divides the host's memory among its GPUs"
        )
    return dataclasses.replace(cluster, pinned=min(pinned, host_memory()))
