# pytest tests/cli/test_steps_cli.py
"""Which sequences a step takes, on any mesh: --samples-per-step."""

import pytest

from alst_jax.config import TrainConfig, UserError
from alst_jax.flag_checks import accumulation
from tests.cli.test_train_cli import make_hf, metrics, run_here, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_hf(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory):
    texts = [" ".join(str(i * n) for n in range(2 + i % 23)) for i in range(1, 60)]
    data = write_jsonl(tmp_path_factory.mktemp("data") / "short.jsonl", texts)
    return ("--model", model, "--data", data, "--seq-len", 128, "--schedule", "constant", "--learning-rate", 1e-3,
            "--no-export", "--pack")


def test_a_step_takes_as_many_sequences_on_any_mesh(flags, tmp_path, capfd):
    """Of dp 2 x accumulation 2, or of a batch of 4 and on after a resume: the same losses, labels and padding."""
    step, whole, parts = ("--samples-per-step", 4), tmp_path / "whole", tmp_path / "parts"
    assert run_here(*flags, *step, "--dp", 2, "--sp", 2, "--steps", 4, "--out", whole) == 0
    assert "steps   4 of 4 sequences" in capfd.readouterr().out
    assert run_here(*flags, "--dp", 1, "--sp", 2, "--batch-size", 4, "--steps", 2, "--out", parts) == 0
    assert run_here("--resume", "--out", parts, *step, "--dp", 2, "--sp", 2, "--batch-size", 1, "--steps", 4) == 0
    one, other = metrics(whole), metrics(parts)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in other] == pytest.approx([line[name] for line in one], rel=1e-5)
    assert [(line["labels"], line["padding"]) for line in other] == [(line["labels"], line["padding"]) for line in one]
    assert all(line["tokens"] + line["padding"] == 4 * 128 for line in one)
    assert run_here("--resume", "--out", parts, "--samples-per-step", 8, "--steps", 5) == 2  # another order


def test_batches_of_a_step():
    assert accumulation(TrainConfig(grad_accum=3, batch_size=5), 2) == 3
    assert accumulation(TrainConfig(samples_per_step=24, batch_size=3), 2) == 4
    assert accumulation(TrainConfig(samples_per_step=24, batch_size=3, grad_accum=4), 2) == 4


@pytest.mark.parametrize("flags, message", [
    (dict(samples_per_step=10, batch_size=2),
     r"--samples-per-step 10: dp 2 x --batch-size 2 = 4 .* must divide it; use 8, 12 or another multiple"),
    (dict(samples_per_step=2, batch_size=3), r"use 6, 12 or another"),
    (dict(samples_per_step=8, grad_accum=2), r"--samples-per-step 8 is 4 batches .* --grad-accum 2 says another"),
    (dict(samples_per_step=8, update_in_backward=True), r"use --samples-per-step 2, or leave --update-in-backward")])
def test_numbers_that_cannot_be_met_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        accumulation(TrainConfig(**flags), 2)
