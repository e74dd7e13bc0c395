# python -m pytest tests/cli/test_watch_cli.py
"""train.py --check-numerics refuses to start, and --on-nonfinite rewind goes back to a checkpoint on disk, bit for
bit."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from alst_jax import trainer
from alst_jax.data.batches import TrainingBatches
from alst_jax.preflight import check
from alst_jax.preflight.limits import Row, exact
from alst_jax.refused import NotFinite
from tests.runs import make_hf, metrics, run_here, write_jsonl

ROOT = pathlib.Path(__file__).parents[2]
BAD = 4  # of the batches, counted from 1


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    directory = tmp_path_factory.mktemp("watch")
    texts = [" ".join(f"{i} x {n} is {i * n}." for n in range(30)) for i in range(1, 12)]
    data = write_jsonl(directory / "train.jsonl", texts)
    return (
        "--model",
        make_hf(directory / "llama"),
        "--data",
        data,
        "--seq-len",
        128,
        "--dp",
        1,
        "--steps",
        6,
        "--schedule",
        "constant",
        "--learning-rate",
        1e-3,
        "--save-every",
        2,
    )


def weights(out):
    return load_file(out / "hf" / "model.safetensors")


def test_a_run_that_goes_back_equals_one_whose_data_lack_the_batch(flags, tmp_path, monkeypatch, capsys):
    drawn, real_next, real_step = [], TrainingBatches.__next__, trainer.optimizer_step

    def without(self):
        drawn.append(batch := real_next(self))
        return real_next(self) if len(drawn) == BAD else batch

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "__next__", without)
        assert run_here(*flags, "--out", tmp_path / "without") == 0
    bad = drawn[BAD - 1]["tokens"][0]

    def refuse_it(step, state, batches, *rest):
        if np.array_equal(batches[0]["tokens"], bad):
            raise NotFinite("loss nan", state)
        return real_step(step, state, batches, *rest)

    monkeypatch.setattr(trainer, "optimizer_step", refuse_it)
    monkeypatch.setattr(check, "run_checks", lambda *_: iter([exact("moved", 0.0)]))
    assert run_here(*flags, "--out", tmp_path / "back", "--on-nonfinite", "rewind", "--check-numerics") == 0
    printed = capsys.readouterr().out
    assert "1 of 1 passed" in printed
    assert "warning: step 4: nonfinite: loss nan; back to the checkpoint of step 2; its batch is left out" in printed
    one, other = weights(tmp_path / "without"), weights(tmp_path / "back")
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    lines = metrics(tmp_path / "back")
    assert [line["step"] for line in lines if "event" not in line] == [1, 2, 3, 4, 5, 6]
    assert [line["event"] for line in lines if "event" in line] == ["nonfinite"]
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"`{key}`" in page for line in lines for key in line)
    losses = lambda out: [line["loss"] for line in metrics(out) if "event" not in line]
    assert losses(tmp_path / "without") == losses(tmp_path / "back")


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_run_whose_check_fails_does_not_start(error, flags, tmp_path, monkeypatch, capsys):
    rows = [exact("moved", 0.0), Row("attention: dq", error, 0.01, "4 roundings")]
    monkeypatch.setattr(check, "run_checks", lambda *_: iter(rows))
    assert run_here(*flags, "--out", tmp_path / "run", "--check-numerics") == 2
    out, err = capsys.readouterr()
    assert f"FAIL {error:9.1e}   1.0e-02  attention: dq: 4 roundings" in out
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "1 of 2 checks failed, so that the run does not start: attention: dq is off by" in line
    assert "another --attention kernel" in line
    assert not (tmp_path / "run").exists()


def test_events_are_records_of_the_log(tmp_path):
    from alst_jax.metrics import MetricsLog
    from alst_jax.watch import Event

    log = MetricsLog(tmp_path, 0)
    for step in (1, 2):
        log.write({"step": step, "seconds": 1.0})
    log.event(Event("spike", 3, "a cause", "none").record())
    log.rewind(1)
    log.write({"step": 2, "seconds": 2.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "seconds": 1.0},
        {"step": 3, "event": "spike", "cause": "a cause", "action": "none"},
        {"step": 2, "seconds": 2.0},
    ]
