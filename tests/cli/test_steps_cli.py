# pytest tests/cli/test_steps_cli.py
"""Which sequences a step takes: --samples-per-step on any mesh, --lengths, --add-data."""

import dataclasses
import json

import numpy as np
import pytest

from alst_jax.config import TrainConfig, UserError
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.models.config import TINY_LLAMA
from alst_jax.planning.job import Job
from alst_jax.profile import Profile
from alst_jax.run import accumulation
from alst_jax.run_data import additions, read_data
from alst_jax.storage import run_directory
from alst_jax.storage.checkpoint import Checkpoints
from alst_jax.storage.source import ModelSource
from tests.runs import make_hf, metrics, run_here, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_hf(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory):
    texts = [" ".join(str(i * n) for n in range(2 + i % 23)) for i in range(1, 60)]
    data = write_jsonl(tmp_path_factory.mktemp("data") / "short.jsonl", texts)
    return (
        "--model",
        model,
        "--data",
        data,
        "--seq-len",
        128,
        "--schedule",
        "constant",
        "--learning-rate",
        1e-3,
        "--no-export",
        "--pack",
    )


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


@pytest.mark.slow
def test_packs_resume_on_four_other_meshes(flags, tmp_path):
    step, whole, parts = ("--samples-per-step", 4), tmp_path / "whole", tmp_path / "parts"
    assert run_here(*flags, *step, "--dp", 2, "--sp", 2, "--steps", 10, "--out", whole) == 0
    assert run_here(*flags, *step, "--dp", 2, "--sp", 2, "--steps", 2, "--out", parts) == 0
    for steps, dp, sp, batch in ((4, 1, 4, 1), (6, 4, 1, 1), (8, 1, 1, 4), (10, 2, 4, 2)):
        mesh = ("--dp", dp, "--sp", sp, "--batch-size", batch)
        assert run_here("--resume", "--out", parts, *step, *mesh, "--steps", steps) == 0
    one, other = metrics(whole), metrics(parts)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in other] == pytest.approx([line[name] for line in one], rel=1e-5)
    assert [(line["labels"], line["padding"]) for line in other] == [(line["labels"], line["padding"]) for line in one]


def test_batches_of_a_step():
    assert accumulation(TrainConfig(grad_accum=3, batch_size=5), 2) == 3
    assert accumulation(TrainConfig(samples_per_step=24, batch_size=3), 2) == 4
    assert accumulation(TrainConfig(samples_per_step=24, batch_size=3, grad_accum=4), 2) == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            dict(samples_per_step=10, batch_size=2),
            r"--samples-per-step 10: dp 2 x --batch-size 2 = 4 .* must divide it; use 8, 12 or another multiple",
        ),
        (dict(samples_per_step=2, batch_size=3), r"use 6, 12 or another"),
        (dict(samples_per_step=8, grad_accum=2), r"--samples-per-step 8 is 4 batches .* --grad-accum is 2"),
        (dict(samples_per_step=8, update_in_backward=True), r"use --samples-per-step 2, or leave --update-in-backward"),
    ],
)
def test_numbers_that_cannot_be_met_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        accumulation(TrainConfig(**flags), 2)


def test_lengths_change_the_padding_and_nothing_else(model, tmp_path, capfd):
    """Two sequences a step, in batches of one: loss and gradient as in the longest length alone; one program a
    length."""
    data = write_jsonl(tmp_path / "mixed.jsonl", ["x" * n for n in (100, 9, 30, 90, 12, 40)])
    flags = (
        "--model",
        model,
        "--data",
        data,
        "--schedule",
        "constant",
        "--learning-rate",
        1e-3,
        "--no-export",
        "--dp",
        1,
        "--sp",
        2,
        "--samples-per-step",
        2,
        "--eval-data",
        data,
    )
    one, several = tmp_path / "one", tmp_path / "several"
    assert run_here(*flags, "--seq-len", 128, "--steps", 6, "--out", one) == 0
    assert run_here(*flags, "--lengths", 32, 128, "--steps", 3, "--out", several) == 0
    assert "lengths 3 of 32, 3 of 128 tokens: 40" in capfd.readouterr().out  # 289 tokens with their ends, in 480
    assert run_here("--resume", "--out", several, "--dp", 2, "--sp", 2, "--steps", 6) == 0
    wanted, lines = metrics(one), metrics(several)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in wanted], rel=1e-5)
    assert lines[-1]["eval_loss"] == pytest.approx(wanted[-1]["eval_loss"], rel=1e-5)
    assert sum(line["tokens"] for line in lines[:3]) == 480 < sum(line["tokens"] for line in wanted[:3]) == 6 * 128
    for i, line in enumerate(lines[:3]):  # a step compiles where it is the first with a length
        new = seen_until(lines, i) - (seen_until(lines, i - 1) if i else set())
        assert (line["compilations"] > 0) == bool(new)
    assert run_here("--resume", "--out", several, "--seq-len", 64, "--steps", 7) == 2


def seen_until(lines, last):
    """The lengths of the first steps of two sequences."""
    return set().union(*({64: {32}, 160: {32, 128}, 256: {128}}[line["tokens"]] for line in lines[: last + 1]))


def test_added_data_are_learned_from_then_on(flags, tmp_path, capfd):
    """And in later resumes, without the flag. Other data, the same data twice and no steps left are refused."""
    more = write_jsonl(tmp_path / "more.jsonl", [f"added {i} " * 12 for i in range(9)])
    mesh, out = ("--dp", 2, "--sp", 2, "--samples-per-step", 4), tmp_path / "run"
    assert run_here(*flags, *mesh, "--steps", 2, "--out", out) == 0
    resume = ("--resume", "--out", out)
    assert run_here(*resume, "--add-data", more) == 2
    assert "--add-data: the 2 steps of the run are done" in capfd.readouterr().err
    assert not (out / "added.json").exists()
    assert run_here(*resume, "--add-data", more, "--steps", 3) == 0
    assert f"added   after step 2: {more}" in capfd.readouterr().out
    (added,) = json.loads((out / "added.json").read_text())
    assert (added["data"], added["step"], added["batches"]) == ([str(more)], 2, 2)
    assert run_here(*resume, "--add-data", more, "--steps", 4) == 2
    assert "the run has these data since step 2" in capfd.readouterr().err
    assert run_here(*resume, "--steps", 4) == 0 and metrics(out)[-1]["step"] == 4
    assert f"added   after step 2: {more}" in capfd.readouterr().out
    assert run_here(*resume, "--steps", 5, "--seq-len", 32) == 2
    refused = capfd.readouterr().err
    assert "--resume: changed since the checkpoint: --seq-len (" in refused and "added at step" not in refused
    more.write_text('{"text": "other data"}\n' * 9)
    assert run_here(*resume, "--steps", 5) == 2
    assert "the data that were added at step 2 have changed (" in capfd.readouterr().err


def test_an_addition_begins_behind_all_batches_that_were_read(tmp_path):
    """Those left out by --on-nonfinite skip included, which count in no step: else sequences are met twice and lost."""
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
    old, more = (write_jsonl(tmp_path / folder / "a.jsonl", ["a text"]) for folder in ("old", "new"))
    out = tmp_path / "run"
    run_directory.write_run_file(out, "training", {"flags": {}})
    checkpoints = Checkpoints(out)
    loop = {"step": 2, "data": {"next_index": 5}, "geometry": {}}
    checkpoints.save(2, {"a": np.zeros(4, np.float32)}, None, loop)
    checkpoints.close()
    config = TrainConfig(data=(str(old),), add_data=(str(more),), out=str(out), resume=True)
    assert additions(config) == [{"data": [str(more)], "step": 2, "batches": 5}]
    with pytest.raises(UserError, match="the run has these data since the beginning"):
        additions(dataclasses.replace(config, add_data=(str(old.parent),)))  # the folder of a file that it has
    run_directory.record_added(out, [{"data": ["x.jsonl"], "step": 4, "batches": 9, "hash": "0a"}])
    with pytest.raises(UserError, match="data were added at step 4 already, and the newest checkpoint is of step 2"):
        additions(config)


def test_a_copy_of_the_runs_data_is_not_added(tmp_path, monkeypatch):
    """Neither of --data nor of an earlier addition, under another name; a later resume reads what was added."""
    old, copy, more, other = (
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{text} text {i}" * 3 for i in range(4)])
        for name, text in (("old", "a"), ("copy", "a"), ("more", "b"), ("other", "b"))
    )
    source, job = ModelSource("tiny", TINY_LLAMA, byte_tokenizer(), None), Job(TINY_LLAMA, Profile(), 1, 32)

    def read(*added):
        monkeypatch.setattr("alst_jax.run_data.additions", lambda _: [dict(addition) for addition in added])
        return read_data(TrainConfig(data=(str(old),), seq_len=32, pack=True), source, job)[0].added

    addition = lambda file: {"data": [str(file)], "step": 2, "batches": 2}
    (known,) = read(addition(more))
    assert read(known) == (known,)
    for added in ([addition(copy)], [known, addition(other)]):
        with pytest.raises(UserError, match="(copy|other).jsonl: the run has a copy of these data, so they would be"):
            read(*added)
