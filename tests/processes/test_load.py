# pytest -m slow tests/processes/test_load.py
"""A process that loads weights holds its own shards, and reads its own bytes of the files."""

import json
import subprocess
import sys

import pytest

from tests.processes.ranks import ROOT, free_port

MIB = 2**20
MAKE = """
import json, pathlib, sys
import numpy as np
from alst_jax.models.hf_config import hf_config_dict
from alst_jax.models.hf_weights import expected_shapes
from alst_jax.models.weight_files import Unwritten, write_file
from tests.helpers import tiny
model = tiny(vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_layers=int(sys.argv[2]), num_heads=8, num_kv_heads=8,
             head_dim=128, attention_bias=False, mlp_bias=False)
top = pathlib.Path(sys.argv[1])
(top / "config.json").write_text(json.dumps(hf_config_dict(model)))
zeros = lambda shape: lambda: np.full(shape, 0.5, np.float32)
write_file(top / "model.safetensors", [Unwritten(n, s, np.dtype("float32"), zeros(s)) for n, s in expected_shapes(model).items()])
"""
LOAD = """
import os, resource, sys
import jax.numpy as jnp
from alst_jax.config import TrainConfig
from alst_jax.processes import start
start.join(TrainConfig(coordinator=f"127.0.0.1:{sys.argv[2]}", processes=2, process=int(sys.argv[3]), simulate_devices=1))
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
start.start_jax(TrainConfig(simulate_devices=1), lambda: 0)
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import load_params
from alst_jax.models import weight_files
from alst_jax.optim.adamw import AdamW
from alst_jax.parallel.mesh import make_mesh
from alst_jax.profile import Profile
from alst_jax.step import TrainStep
read, given = weight_files.read_stored, [0]
def counted(tensor, index):
    part = read(tensor, index)
    given[0] += part.nbytes
    return part
weight_files.read_stored = counted
model = model_config(sys.argv[1])
step = TrainStep(model, make_mesh(2, 1), Profile(), AdamW(), jnp.float32)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params = load_params(sys.argv[1], model, step.params)
here = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
os.write(2, (__import__("json").dumps({"peak": peak() - before, "shards": here, "read": given[0], "model": model.num_params * 4}) + "\\n").encode())
start.finish()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_holds_and_reads_its_shards_alone(tmp_path):
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path), "12"], cwd=ROOT, check=True)
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(tmp_path), str(port), str(rank)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, err = rank.communicate(timeout=800)
        assert rank.returncode == 0, err
        found = json.loads(next(line for line in err.splitlines() if line.startswith("{")))
        print(found)
        assert found["model"] > 900 * MIB and abs(found["shards"] - found["model"] / 2) < MIB
        assert abs(found["read"] - found["shards"]) < MIB
        assert found["peak"] < found["shards"] + 400 * MIB
