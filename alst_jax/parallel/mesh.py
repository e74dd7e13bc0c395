"""The device mesh: axes `data` (replicas) and `seq` (Ulysses). On one device both have size 1; there is no second code
path."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from alst_jax.config import UserError
from alst_jax.processes.link import link

DATA, SEQ = "data", "seq"
AXES = (DATA, SEQ)


def choose_degrees(dp: int | None, sp: int | None, num_devices: int) -> tuple[int, int]:
    """Fill in degrees that the user left open: sp is 1, dp takes all other devices. UserError if they do not fit."""
    sp = sp or 1
    if sp > num_devices:
        raise UserError(
            f"sp={sp} needs {sp} devices and there are {num_devices}; use a smaller --sp or, "
            f"on CPU, --simulate-devices {sp}"
        )
    if dp is None:
        if num_devices % sp:
            raise UserError(
                f"sp={sp} does not divide the {num_devices} devices; choose --dp too "
                f"(at most {num_devices // sp}), or an --sp that divides {num_devices}"
            )
        dp = num_devices // sp
    if dp * sp > num_devices:
        raise UserError(
            f"dp={dp} x sp={sp} needs {dp * sp} devices and there are {num_devices}; use smaller --dp or "
            f"--sp or, on CPU, --simulate-devices {dp * sp}"
        )
    return dp, sp


def make_mesh(dp: int, sp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh[data=dp, seq=sp] over the first dp x sp devices; neighbours in the list are neighbours in `seq`."""
    if devices is None:
        devices = by_host(jax.devices(), link().machines) if link().several else jax.devices()
    if link().several and dp * sp != len(devices):
        raise UserError(
            f"dp={dp} x sp={sp} needs {dp * sp} devices, and the {link().count} processes have "
            f"{len(devices)}: some would have no part in a step; use all (--dp, --sp), or fewer processes"
        )
    return Mesh(np.asarray(devices[: dp * sp]).reshape(dp, sp), AXES, axis_types=(AxisType.Auto,) * 2)


def own_rows(rows: int, dp: int, sp: int) -> frozenset[int] | None:
    """The rows of a batch [rows, S] of which this process has devices; None for all, in a run of one process."""
    if not link().several:
        return None
    devices, share = make_mesh(dp, sp).devices, rows // dp
    mine = [
        replica
        for replica in range(dp)
        if any(device.process_index == jax.process_index() for device in devices[replica])
    ]
    return frozenset(row for replica in mine for row in range(replica * share, (replica + 1) * share))


def by_host(devices: list[Any], hosts: tuple[str, ...]) -> list[Any]:
    """The devices host by host, so that `seq`, which varies fastest in a mesh, stays inside of hosts where it fits.

    hosts: of each process. Launchers may deal the processes out over the hosts in turn.
    """
    order = {host: number for number, host in reversed(list(enumerate(hosts)))}
    return sorted(devices, key=lambda device: (order[hosts[device.process_index]], device.process_index, device.id))


def seq_over_hosts(sp: int, hosts: tuple[str, ...]) -> str:
    """Words for where the `seq` axis of a mesh of all devices lies. hosts: of each process."""
    count = len(set(hosts))
    per_host = jax.device_count() // count
    if count == 1 or per_host % sp == 0:
        return f"seq {sp} inside of a host" + f", data over {count} hosts" * (count > 1)
    return f"seq {sp} goes over hosts of {per_host} devices"
