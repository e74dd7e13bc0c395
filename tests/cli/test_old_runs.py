# pytest tests/cli/test_old_runs.py
"""Run directories and checkpoints that commit eb801e0 wrote load, resume and convert.

tests/data/run-eb801e0: `converted` is by convert.from_hf from a random bfloat16 Llama (2 layers of 16), `run` by
train.py --model converted --data data.jsonl --seq-len 128 --simulate-devices 2 --sp 2 --steps 2 --learning-rate 1e-2
--optimizer-states int8 --dtype float32 --no-export. expected.json is from eb801e0's own third step.
"""

import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from alst_jax.storage.checkpoint import Checkpoints
from convert.to_hf import to_hf
from tests.runs import run_here

ROOT = pathlib.Path(__file__).parents[2]
OLD = ROOT / "tests" / "data" / "run-eb801e0"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def test_a_third_step_is_the_one_of_the_old_program(tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(OLD / "run", out)
    here = ("--dp", 1, "--sp", 2)  # this process has more devices than that run had
    assert run_here("--resume", "--out", out, "--data", OLD / "data.jsonl", "--steps", 3, "--export", *here) == 0
    assert ", resumed at step 2 -> " in capfd.readouterr().out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for name in ("loss", "grad_norm"):
        assert lines[2][name] == pytest.approx(EXPECTED[name], rel=1e-5)
    weights = load_file(out / "hf" / "model.safetensors")
    assert weights.keys() == EXPECTED["weights"].keys()
    for name, wanted in EXPECTED["weights"].items():
        flat = weights[name].reshape(-1).astype(np.float64)
        assert np.linalg.norm(flat) == pytest.approx(wanted["norm"], rel=1e-5), name
        values = flat[:: max(1, flat.size // 8)][:8]
        np.testing.assert_allclose(values, wanted["values"], rtol=1e-5, atol=1e-5 * np.abs(flat).max(), err_msg=name)


def test_an_old_conversion_is_converted_back(tmp_path):
    to_hf(OLD / "converted", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    content = b"".join(weights[name].tobytes() for name in sorted(weights))
    assert hashlib.sha256(content).hexdigest() == EXPECTED["converted_sha256"]


def test_the_names_on_disk_are_the_old_ones(tmp_path):
    """A checkpoint read and written again has the same entries."""
    for run in ("converted", "run"):
        shutil.copytree(OLD / run, tmp_path / run)
        (step,) = (checkpoints := Checkpoints(tmp_path / run)).steps()
        params = {}
        for names, array in checkpoints.read_params(step):
            inner = params
            for name in names[:-1]:
                inner = inner.setdefault(name, {})
            inner[names[-1]] = array
        checkpoints.save(9, params, None, {})
        tree = lambda step: json.loads(
            (tmp_path / run / "checkpoints" / str(step) / "params" / "_METADATA").read_text()
        )["tree_metadata"]
        assert tree(9).keys() == tree(step).keys() and len(tree(step)) == 19
        assert all(tree(9)[name]["key_metadata"] == entry["key_metadata"] for name, entry in tree(step).items())
