# pytest tests/processes/test_service.py
"""jax's coordination service outlives process 0: the others have the time to say who died."""

import subprocess
import sys
import time

from tests.processes.ranks import ROOT, free_port

SCRIPT = """
import os, signal, sys, time
from alst_jax.config import TrainConfig
from alst_jax.processes import link, start
end = link.Link.end
link.Link.end = lambda self, text, code: (time.sleep(2), end(self, text, code))  # as on a busy machine
start.join(TrainConfig(coordinator=f"127.0.0.1:{sys.argv[2]}", processes=2, process=int(sys.argv[1]), simulate_devices=1))
start.start_jax(TrainConfig(simulate_devices=1), lambda: 0)
link.link().wait("started")
if sys.argv[1] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def test_the_others_outlive_process_0(tmp_path):
    """With the service inside of process 0, jax would end this process at once: SIGABRT, and no line that names it."""
    port, began = free_port(), time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(port)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    assert ranks[0].wait(200) == -9
    _, err = ranks[1].communicate(timeout=60)
    assert ranks[1].returncode == 1 and "error: process 0 of 2" in err and "process 1 of 2 ends too" in err, err
    assert time.monotonic() - began < 250
    for rank in ranks:
        rank.stdout.close()
        rank.stderr.close()
