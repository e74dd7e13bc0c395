# pytest tests/cli/test_train_cli.py
"""train.py from outside: stop and resume bit for bit, metrics, checkpoints, the export."""

import json
import os
import pathlib
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from convert.from_hf import from_hf
from convert.to_hf import to_hf
from tests.runs import (
    assert_same_tensors,
    files,
    finish,
    make_hf,
    metrics,
    run_here,
    start,
    wait_for_steps,
    write_jsonl,
)

LONG_RUN = 150  # steps of some milliseconds: time enough for a signal to arrive
HELD_OUT = ["A short one.", "Now a longer text: the loss is a mean over all labels, not over the documents."]


@pytest.fixture(scope="module")
def long_flags(model, data):
    flags = f"--seq-len 128 --simulate-devices 2 --dp 1 --sp 2 --grad-accum 2 --steps {LONG_RUN} --learning-rate 1e-3"
    return "--model", model, "--data", data, *flags.split()


@pytest.fixture(scope="module")
def saving_flags(model, data):
    flags = "--seq-len 128 --dp 2 --sp 2 --schedule constant --learning-rate 1e-3"
    return "--model", model, "--data", data, *flags.split()


@pytest.fixture(scope="module")
def saving(saving_flags, tmp_path_factory):
    """A run of 8 steps that saves, evaluates and exports."""
    directory = tmp_path_factory.mktemp("saving")
    held_out = write_jsonl(directory / "held_out.jsonl", HELD_OUT)
    flags = "--steps 8 --save-every 2 --keep-checkpoints 3 --eval-every 3".split()
    assert run_here(*saving_flags, *flags, "--eval-data", held_out, "--out", directory / "run") == 0
    return directory / "run"


# ----------------------------------------------------------------------------------------------------- stop and resume


def assert_stopped(code: int, stdout: str, out: pathlib.Path, which: signal.Signals) -> int:
    """The step that was saved."""
    step = len(metrics(out))
    assert code == 128 + which and 3 <= step < LONG_RUN
    assert f"stopped by {which.name}; step {step} is saved. Go on with: python train.py --resume --out {out}" in stdout
    assert [p.name for p in (out / "checkpoints").iterdir()] == [str(step)]
    assert not (out / "hf").exists()
    return step


def test_stopped_and_resumed_is_as_if_never_stopped(long_flags, tmp_path):
    out, unbroken = tmp_path / "stopped", tmp_path / "unbroken"
    with start(*long_flags, "--out", unbroken) as beside:
        process = start(*long_flags, "--out", out)
        wait_for_steps(out, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        code, stdout, _ = finish(process)
        step = assert_stopped(code, stdout, out, signal.SIGINT)
        with (out / "metrics.jsonl").open("a") as file:  # as a run leaves it that was killed after its checkpoint
            file.write(json.dumps({"step": step + 1, "loss": -1.0}) + "\n" + '{"step": ')
        code, stdout, stderr = finish(start("--resume", "--out", out))
        assert code == 0 and f", resumed at step {step} -> " in stdout, stderr
        code, stdout, stderr = finish(beside)
        assert code == 0 and ", resumed at step" not in stdout, stderr

    resumed, whole = metrics(out), metrics(unbroken)
    assert [line["step"] for line in resumed] == list(range(1, LONG_RUN + 1))
    for name in ("step", "loss", "grad_norm", "learning_rate", "tokens", "labels"):
        assert [line[name] for line in resumed] == [line[name] for line in whole], name
    assert len({line["loss"] for line in whole}) > LONG_RUN // 2
    weights = [directory / "hf" / "model.safetensors" for directory in (out, unbroken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_sigterm_saves_too(long_flags, capfd, tmp_path):
    out, over = tmp_path / "run", threading.Event()

    def terminate():
        wait_for_steps(out, lambda: not over.is_set())
        os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # where train.py does not catch it, this process goes on
    thread = threading.Thread(target=terminate)
    thread.start()
    try:
        code = run_here(*long_flags, "--out", out)
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGTERM, previous)
    assert_stopped(code, capfd.readouterr().out, out, signal.SIGTERM)


def test_what_is_typed_with_resume_changes_the_flags_of_the_run(saving, model, data):
    config = train.parse(["--resume", "--out", str(saving), "--steps", "500"])
    assert (config.resume, config.steps) == (True, 500)
    assert (config.model, config.data, config.seq_len) == (None, (str(data),), 128)  # the run has its model with it
    assert (config.sp, config.schedule, config.save_every, config.learning_rate) == (2, "constant", 2, 1e-3)


# --------------------------------------------------------------------------------------------- what a run leaves behind


def test_each_step_has_its_line_in_the_metrics(saving):
    lines = metrics(saving)
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert {"step", "loss", "tokens", "grad_norm", "learning_rate", "seconds"} <= line.keys()
        assert line["tokens"] == 2 * 128 and line["learning_rate"] == pytest.approx(1e-3)
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["seconds"] > 0
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 8]
    assert lines[7]["eval_loss"] < lines[2]["eval_loss"]


def test_the_export_is_the_model_that_was_evaluated(saving):
    """Its loss, computed with torch, is the last evaluation's; and it generates."""
    exported = AutoModelForCausalLM.from_pretrained(saving / "hf")
    tokenizer = AutoTokenizer.from_pretrained(saving / "hf")
    total = labels = 0
    for text in HELD_OUT:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = exported(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        labels += ids.shape[1] - 1
    assert total / labels == pytest.approx(metrics(saving)[-1]["eval_loss"], abs=1e-4)

    prompt = torch.tensor([tokenizer("3 x ")["input_ids"]])
    written = exported.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert written.shape == (1, prompt.shape[1] + 5)
    assert tokenizer.decode(written[0]).startswith("3 x ")


def test_a_checkpoint_holds_the_weights_of_its_step(saving, saving_flags, tmp_path):
    assert sorted(p.name for p in (saving / "checkpoints").iterdir()) == ["4", "6", "8"]
    assert run_here(*saving_flags, "--steps", 4, "--out", tmp_path / "short") == 0
    to_hf(saving / "checkpoints" / "4", tmp_path / "middle")
    to_hf(saving, tmp_path / "newest")
    middle, last = (load_file(d / "model.safetensors") for d in (tmp_path / "middle", saving / "hf"))
    assert_same_tensors(middle, load_file(tmp_path / "short" / "hf" / "model.safetensors"))
    assert_same_tensors(last, load_file(tmp_path / "newest" / "model.safetensors"))
    assert all(not torch.equal(middle[name], last[name]) for name in last)


def test_each_held_out_source_is_evaluated_by_its_name(saving_flags, capfd, tmp_path):
    """Short documents as they are: losses are those of torch on each document alone."""
    sources = {
        "one": write_jsonl(tmp_path / "one.jsonl", HELD_OUT[:1]),
        "two": write_jsonl(tmp_path / "x.jsonl", HELD_OUT[1:]),
    }
    assert (
        run_here(
            *saving_flags,
            "--steps",
            2,
            "--out",
            tmp_path / "run",
            "--eval-data",
            sources["one"],
            f"two={sources['two']}",
        )
        == 0
    )
    line = metrics(tmp_path / "run")[-1]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    losses, labels = {}, {}
    for name, text in zip(sources, HELD_OUT):
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            losses[name] = torch.nn.functional.cross_entropy(exported(ids).logits[0, :-1], ids[0, 1:]).item()
        labels[name] = ids.shape[1] - 1
    for name, loss in losses.items():
        assert line[f"eval_loss/{name}"] == pytest.approx(loss, abs=1e-4)
        assert line[f"eval_perplexity/{name}"] == pytest.approx(np.exp(loss), rel=1e-4)
    mean = sum(losses[name] * labels[name] for name in losses) / sum(labels.values())
    assert line["eval_loss"] == pytest.approx(mean, abs=1e-4)
    assert line["eval_perplexity"] == pytest.approx(np.exp(mean), rel=1e-4)
    out = capfd.readouterr().out
    assert f"step 2: eval loss {line['eval_loss/two']:.4f} over {labels['two']} labels, perplexity " in out
    assert "eval    one: 1 file, text, 1 record, 1 document, " in out
    tags = b"".join(file.read_bytes() for file in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"eval_loss/one" in tags and b"eval_perplexity/two" in tags


def test_weighted_sources_resume_where_they_stopped(saving_flags, capfd, tmp_path):
    """Two steps and two more are four steps, bit for bit; other weights are refused."""
    pairs = [
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i} " + "0123456789" * 9 for i in range(5)]) for name in "ab"
    ]
    weights = (f"{pairs[0]}:0.2", f"{pairs[1]}:0.8")
    flags = [*saving_flags[:2], "--data", *weights, *saving_flags[4:]]
    assert run_here(*flags, "--steps", 4, "--out", tmp_path / "whole") == 0
    assert "weight  0.2 of the sequences from " in capfd.readouterr().out
    assert run_here(*flags, "--steps", 2, "--no-export", "--out", tmp_path / "parts") == 0
    assert (
        run_here("--resume", "--steps", 4, "--data", f"{pairs[0]}:0.3", f"{pairs[1]}:0.7", "--out", tmp_path / "parts")
        == 2
    )
    assert "--resume: changed since the checkpoint: --data (" in capfd.readouterr().err
    assert run_here("--resume", "--steps", 4, "--export", "--out", tmp_path / "parts") == 0
    assert [m["loss"] for m in metrics(tmp_path / "parts")] == [m["loss"] for m in metrics(tmp_path / "whole")]
    weights = [tmp_path / name / "hf" / "model.safetensors" for name in ("parts", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    "saved, held_out", [(None, ()), ("held_out.jsonl", ("held_out.jsonl",)), (["a", "b=c"], ("a", "b=c"))]
)
def test_flags_of_runs_with_one_held_out_source_are_read(tmp_path, saved, held_out):
    (tmp_path / "run.json").write_text(json.dumps({"kind": "training", "flags": {"eval_data": saved, "data": ["x"]}}))
    config = train.parse(["--resume", "--out", str(tmp_path)])
    assert (config.eval_data, config.data) == (held_out, ("x",))


# ----------------------------------------------------------------------------------------------------------- bad input


def test_the_directory_of_another_run_is_kept(call, saving, model, data):
    before = files(saving)
    code, error = call("--model", model, "--data", data, "--seq-len", 128, "--out", saving)
    assert code == 2
    assert f"--out {saving} holds another run; choose another directory, or continue that run with --resume" in error
    assert files(saving) == before


def test_resume_is_refused_where_it_would_be_another_run(call, saving, tmp_path):
    before = files(saving)
    other = make_hf(tmp_path / "other", hidden_size=32)
    shorter = write_jsonl(tmp_path / "shorter.jsonl", ["0123456789" * 20])
    for changed, message in (
        (["--model", other], "--resume: the model has changed since the checkpoint (hidden_size 64 -> 32"),
        (["--data", shorter], "--resume: changed since the checkpoint: --data ("),
        (["--seq-len", 64], "--seq-len (128 -> 64)"),
        (["--dp", 4], "the sequences of a step (2 -> 4)"),
    ):
        code, error = call("--resume", "--out", saving, *changed)
        assert code == 2 and message in error, error
        assert files(saving) == before


def test_resume_with_another_model_is_refused(call, saving, model, data, tmp_path):
    """A directory, a checkpoint of ours, or something that is not there: whatever --model names is looked at."""
    other = make_hf(tmp_path / "other", rms_norm_eps=1e-3)
    from_hf(other, tmp_path / "converted")
    for named in (other, tmp_path / "converted"):
        code, stderr = call("--resume", "--out", saving, "--steps", 9, "--model", named)
        assert code == 2 and "the model has changed since the checkpoint (rms_norm_eps 1e-06 -> 0.001)" in stderr
    code, stderr = call("--resume", "--out", saving, "--steps", 9, "--model", tmp_path / "nowhere")
    assert code == 2 and "no such directory" in stderr
    code, stderr = call("--resume", "--out", tmp_path / "converted", "--steps", 9)
    assert code == 2 and "a converted model, not a run" in stderr
