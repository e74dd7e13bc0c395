"""The device mesh: axes `data` (replicas) and `seq` (Ulysses). On one device both have size 1; there is no second code
path."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from alst_jax.config import UserError

DATA, SEQ = "data", "seq"
AXES = (DATA, SEQ)


def choose_degrees(dp: int | None, sp: int | None, num_devices: int) -> tuple[int, int]:
    """Fill in what the user left open: sp is 1, dp takes all other devices. UserError if they do not fit."""
    sp = sp or 1
    if sp > num_devices:
        raise UserError(f"sp={sp} needs {sp} devices and there are {num_devices}; use a smaller --sp or, "
                        f"on CPU, --simulate-devices {sp}")
    if dp is None:
        if num_devices % sp:
            raise UserError(f"sp={sp} does not divide the {num_devices} devices; choose --dp too "
                            f"(at most {num_devices // sp}), or an --sp that divides {num_devices}")
        dp = num_devices // sp
    if dp * sp > num_devices:
        raise UserError(f"dp={dp} x sp={sp} needs {dp * sp} devices and there are {num_devices}; use smaller --dp or "
                        f"--sp or, on CPU, --simulate-devices {dp * sp}")
    return dp, sp


def make_mesh(dp: int, sp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh[data=dp, seq=sp] over the first dp x sp devices; neighbours in the list are neighbours in `seq`."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices[: dp * sp]).reshape(dp, sp), AXES, axis_types=(AxisType.Auto,) * 2)
