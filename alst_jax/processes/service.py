"""jax's coordination service in a process of its own, started by process 0.

jax keeps it inside of process 0. When that is killed, jax's clients end the other processes from C++, with a stack
trace and without a name, before the link can say who died. Here the service outlives process 0 by OUTLIVES seconds.
"""

import subprocess
import sys
from typing import Any

OUTLIVES = 20  # seconds
PROGRAM = f"""
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
from jaxlib import _jax
service = _jax.get_distributed_runtime_service(sys.argv[1], int(sys.argv[2]), heartbeat_timeout=int(sys.argv[3]))
print("ready", flush=True)
sys.stdin.read()  # until process 0 ends
time.sleep({OUTLIVES})
"""


class Service:
    """What jax expects of its service: `shutdown`. Called as jax makes the service: address to listen on, processes."""

    def __init__(self, address: str, count: int, heartbeat_timeout: int, **_: Any):
        command = [sys.executable, "-c", PROGRAM, address, str(count), str(heartbeat_timeout)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(
                f"jax's coordination service did not start at {address}: exit code {self._process.wait()}"
            )

    def shutdown(self) -> None:
        """End the service; all processes have left it."""
        self._process.kill()
        self._process.wait()
