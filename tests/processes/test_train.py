# pytest tests/processes/test_train.py
"""train.py in real processes: the numbers of one process, a signal to one of them, other processes that go on."""

import re

import numpy as np
import pytest
import safetensors.numpy

from convert.verify import verify
from tests.helpers import relative_error
from tests.processes.ranks import play


def weights(folder):
    return safetensors.numpy.load_file(folder / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return folder, *play(folder, "interrupted", "alone")


@pytest.mark.timeout(900)
def test_a_signal_to_one_saves_on_all(played):
    folder, two, _ = played
    assert two["codes"] == [143, 143], two["logs"]
    first, second = two["logs"]
    assert f"stopped by SIGTERM; step {two['done']} is saved" in first and two["done"] >= 2
    assert "SIGTERM: saving after this step" in second and "stopped" not in second and "step 1/" not in second
    assert "hosts   1 with 2 processes (found by: flags) and 4 devices: seq 2 inside of a host" in first
    assert [path.name for path in (folder / "two" / "checkpoints").iterdir()] == [str(two["done"])]
    assert verify(folder / "two") == 0 and verify(folder / "one") == 0


@pytest.mark.timeout(900)
def test_losses_and_weights_are_those_of_one_process(played):
    """Two processes, then one that goes on from their checkpoint, against one process alone: packs, of which each
    process reads its own, and held-out data."""
    folder, two, alone = played
    assert two["resumed"] == 0, two["resumed_log"]
    assert alone["codes"] == [0] and len(alone["losses"]) == two["done"] + 2 == len(two["resumed_losses"])
    np.testing.assert_allclose(two["resumed_losses"], alone["losses"], rtol=1e-6)
    assert two["resumed_losses"][: two["done"]] == two["losses"]
    assert len(alone["eval"]) == len(alone["losses"]) == len(two["resumed_eval"])
    np.testing.assert_allclose(two["resumed_eval"], alone["eval"], rtol=1e-6)
    ours, theirs = weights(folder / "one"), weights(folder / "alone")
    assert ours.keys() == theirs.keys()
    assert all(relative_error(ours[name], theirs[name]) < 1e-5 for name in ours)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_by_two_equals_four_by_one(tmp_path):
    hosted = "together:2:2:20:offload-weights:offload-optimizer:offload-activations:remat"
    two, four, resumed, hosted = play(
        tmp_path, "together:2:2:20", "together:4:1:20", "resumed:4:1:together-2x2:1:4:2:22", hosted
    )
    assert two["codes"] == [0, 0] and four["codes"] == [0] * 4, (two["logs"], four["logs"])
    assert two["losses"] == four["losses"] and len(two["losses"]) == 20
    ours, theirs = (weights(tmp_path / name) for name in ("together-2x2", "together-4x1"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert resumed["codes"] == [0] * 4 and len(resumed["losses"]) == 22, resumed["logs"]
    assert hosted["codes"] == [0, 0], hosted["logs"]  # arrays that live in host memory
    np.testing.assert_allclose(hosted["losses"], two["losses"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("stage", "number", "victim"), [("stepping", 3, 1), ("stepping", 3, 0), ("saving", 3, 1)])
def test_a_killed_process_ends_the_run_and_another_goes_on(tmp_path, stage, number, victim):
    (killed,) = play(tmp_path, f"killed:{stage}:{number}:{victim}")
    assert killed["codes"][victim] == -9 and killed["codes"][1 - victim] == 1 and killed["after"][1 - victim] < 60
    assert f"error: process {victim} of 2" in killed["logs"][1 - victim]
    assert killed["resumed"] == [0, 0], killed["resumed_log"]
    assert len(killed["losses"]) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["saving", "exporting"])
def test_a_process_that_hangs_beside_a_step_ends_the_run(tmp_path, stage):
    (hung,) = play(tmp_path, f"hung:{stage}:1:45")
    assert hung["codes"] == [1, 1] and max(hung["after"]) < 10, hung["logs"]
    what = {"saving": r"saving step 1", "exporting": "the export"}[stage]
    for log in hung["logs"]:
        assert re.search(rf"process [01] of 2.* gives up: {what} has run for 45 s", log), log


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_adapters_and_the_evaluation_at_length_are_those_of_one_process(tmp_path):
    """Two processes that are resumed once, and one alone."""
    two, one = play(tmp_path, "adapters:2:2", "adapters:1:4")
    assert two["codes"] == [0, 0, 0, 0] and one["codes"] == [0, 0], (two["logs"], one["logs"])
    assert len(one["losses"]) == 4 and one["long"].keys() == two["long"].keys() and len(one["long"]) > 2
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-6)
    for name, values in one["long"].items():
        np.testing.assert_allclose(two["long"][name], values, rtol=1e-5)
    ours, theirs = (
        safetensors.numpy.load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("adapters-2x2", "adapters-1x4")
    )
    assert ours.keys() == theirs.keys()
    assert all(relative_error(ours[name], theirs[name]) < 1e-5 for name in ours)
