# python -m pytest tests/cli/test_train_cli.py
"""train.py from outside: stop and resume bit for bit, metrics, checkpoints, the export, and every bad input refused."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import train
from alst_jax import run as setup
from alst_jax import trainer
from alst_jax.config import TrainConfig, UserError
from alst_jax.models.config import TINY_LLAMA
from alst_jax.ops.attention import KERNELS
from alst_jax.ops.rope import RopeConfig
from alst_jax.storage.checkpoint import Checkpoints
from convert.from_hf import from_hf
from convert.to_hf import to_hf
from tests.runs import (
    ROOT,
    SHAPE,
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
def model(tmp_path_factory):
    return make_hf(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    texts = [" ".join(f"{i} x {n} is {i * n}." for n in range(4 + 3 * i)) for i in range(1, 8)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", texts)


@pytest.fixture(scope="module")
def long_flags(model, data):
    return ("--model", model, "--data", data, "--seq-len", 128, "--simulate-devices", 2, "--dp", 1, "--sp", 2,
            "--grad-accum", 2, "--steps", LONG_RUN, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def saving_flags(model, data):
    return ("--model", model, "--data", data, "--seq-len", 128, "--dp", 2, "--sp", 2, "--schedule", "constant",
            "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def saving(saving_flags, tmp_path_factory):
    """A run of 8 steps that saves, evaluates and exports."""
    directory = tmp_path_factory.mktemp("saving")
    held_out = write_jsonl(directory / "held_out.jsonl", HELD_OUT)
    assert run_here(*saving_flags, "--steps", 8, "--save-every", 2, "--keep-checkpoints", 3, "--eval-data", held_out,
                    "--eval-every", 3, "--out", directory / "run") == 0
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
    written = exported.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, min_new_tokens=5,
                                do_sample=False, pad_token_id=tokenizer.pad_token_id)
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
    sources = {"one": write_jsonl(tmp_path / "one.jsonl", HELD_OUT[:1]), "two": write_jsonl(tmp_path / "x.jsonl", HELD_OUT[1:])}
    assert run_here(*saving_flags, "--steps", 2, "--out", tmp_path / "run", "--eval-data", sources["one"],
                    f"two={sources['two']}") == 0
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
    pairs = [write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i} " + "0123456789" * 9 for i in range(5)]) for name in "ab"]
    weights = (f"{pairs[0]}:0.2", f"{pairs[1]}:0.8")
    flags = [*saving_flags[:2], "--data", *weights, *saving_flags[4:]]
    assert run_here(*flags, "--steps", 4, "--out", tmp_path / "whole") == 0
    assert "weight  0.2 of the sequences from " in capfd.readouterr().out
    assert run_here(*flags, "--steps", 2, "--no-export", "--out", tmp_path / "parts") == 0
    assert run_here("--resume", "--steps", 4, "--data", f"{pairs[0]}:0.3", f"{pairs[1]}:0.7", "--out", tmp_path / "parts") == 2
    assert "--resume: changed since the checkpoint: --data (" in capfd.readouterr().err
    assert run_here("--resume", "--steps", 4, "--export", "--out", tmp_path / "parts") == 0
    assert [m["loss"] for m in metrics(tmp_path / "parts")] == [m["loss"] for m in metrics(tmp_path / "whole")]
    weights = [tmp_path / name / "hf" / "model.safetensors" for name in ("parts", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("saved, held_out", [(None, ()), ("held_out.jsonl", ("held_out.jsonl",)), (["a", "b=c"], ("a", "b=c"))])
def test_flags_of_runs_with_one_held_out_source_are_read(tmp_path, saved, held_out):
    (tmp_path / "run.json").write_text(json.dumps({"kind": "training", "flags": {"eval_data": saved, "data": ["x"]}}))
    config = train.parse(["--resume", "--out", str(tmp_path)])
    assert (config.eval_data, config.data) == (held_out, ("x",))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def call(capsys):
    """(exit code, standard error on one line) of train.main() in this process."""

    def call(*arguments) -> tuple[int, str]:
        return run_here(*arguments), " ".join(capsys.readouterr().err.split())

    return call


def edit_config(model: pathlib.Path, **changes) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def remove(directory: pathlib.Path, pattern: str) -> None:
    for file in directory.glob(pattern):
        file.unlink()


# What is done to a good model directory and data file, and what the refusal says.
BAD_MODELS = {
    "no such directory": (shutil.rmtree, "{model}: no such directory"),
    "not a Hugging Face directory": (lambda m: remove(m, "config.json"),
                                      "{model} is not a Hugging Face model directory"),
    "weights cut short": (lambda m: truncate(m / "model.safetensors"), "model.safetensors is corrupt or cut short"),
    "no weights": (lambda m: remove(m, "*.safetensors"), "{model} holds no weights"),
    "weights of other sizes": (lambda m: edit_config(m, intermediate_size=97), "the weights are not those config.json"),
    "another architecture": (lambda m: edit_config(m, model_type="gemma2", architectures=["Gemma2ForCausalLM"]),
                             "model_type 'gemma2', architectures ['Gemma2ForCausalLM'] is not supported"),
    "another RoPE": (lambda m: edit_config(m, rope_parameters=dict(rope_type="proportional", rope_theta=1e4)),
                     "RoPE type 'proportional' is not implemented; these are: default, linear, dynamic, llama3, yarn"),
    "no tokenizer": (lambda m: remove(m, "tokenizer*"), "{model} has no tokenizer"),
    "a broken tokenizer": (lambda m: truncate(m / "tokenizer.json"), "{model}: the tokenizer cannot be read"),
    "a tokenizer of another model": (lambda m: edit_config(m, vocab_size=100), "outside the model's vocabulary of 100"),
}
GOOD_LINE = json.dumps({"text": "long enough " * 20}) + "\n"
BAD_DATA = {
    "a broken line": (GOOD_LINE * 2 + '{"text": "cut of', "{data}:3: not valid JSON"),
    "a line without the field": (GOOD_LINE + '{"body": "x"}\n',
                                 "{data}:2: neither a 'text' nor a 'messages' field (it has: body)"),
    "an empty file": ("", "{data}: the file is empty"),
    "empty lines": ("\n\n", "--data {data}: no documents in there"),
    "empty documents": ('{"text": ""}\n' * 2, "--data {data}: no documents in there; records left out: 2 empty"),
    "short documents": ('{"text": "short"}\n' * 2,
                        "--data is shorter than asked for: the longest of 2 documents has 6 tokens"),
    "no such file": (None, "--data {data}: no such file or directory"),
}
BAD_FLAGS = {
    "a hub name that is none": (["--model", "no-such-user/no-such-model"],
                                "no such model could be fetched from the hub"),
    "sp and the heads": (["--dp", 1, "--sp", 3], "sp=3 must divide 4 query heads; use 1, 2 or 4 (--sp)"),
    "dp x sp and the devices": (["--dp", 4, "--sp", 4], "dp=4 x sp=4 needs 16 devices and there are 8"),
    "packing": (["--pack-attention", "across"], "--pack-attention across says what attention reads in a pack; it needs --pack"),
    "evaluation without data": (["--eval-every", 2], "--eval-every needs --eval-data"),
    "two held-out sources of one name": (["--eval-data", "a/x.txt", "b/x.txt"], "two sources of one name (x)"),
    "a split that does not exist": (["--split", "tset", "--data", str(ROOT / "tests" / "data")], "no split 'tset'"),
    "evaluation data missing": (["--eval-data", "nowhere.jsonl"], "--eval-data nowhere.jsonl: no such file"),
    "an unknown flag": (["--learning-rat", 1], "--learning-rat"),
    "resume without a run": (["--resume"], "no run to resume there: it has no run.json"),
}


@pytest.fixture
def refused(call, model, data, tmp_path):
    """Standard error of a run with a change to good flags, which must be refused and leave nothing behind."""
    model, data = shutil.copytree(model, tmp_path / "llama"), shutil.copy(data, tmp_path / "train.jsonl")

    def refused(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, error = call("--model", model, "--data", data, "--seq-len", 128, "--out", tmp_path / "run", *arguments)
        assert code == 2, error
        assert not (tmp_path / "run").exists()
        assert sorted(tmp_path.rglob("*")) == before
        return error

    refused.model, refused.data = model, data
    return refused


@pytest.mark.parametrize("spoil, message", BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_bad_models_are_refused(refused, spoil, message):
    spoil(refused.model)
    error = refused()
    assert error.startswith("error: ") and message.format(model=refused.model) in error


@pytest.mark.parametrize("text, message", BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_are_refused(refused, text, message):
    refused.data.write_text(text) if text is not None else refused.data.unlink()
    assert f"error: {message.format(data=refused.data)}" in refused()


@pytest.mark.parametrize("flags, message", BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_flags_are_refused(refused, flags, message):
    assert message in refused(*flags)


def test_the_exit_code_of_a_refused_process(data, tmp_path):
    missing = tmp_path / "nowhere"
    code, _, stderr = finish(start(
        "--model", missing, "--data", data, "--simulate-devices", 2, "--out", tmp_path / "run"))
    assert code == 2
    assert stderr.strip().startswith(f"error: {missing}: no such directory")
    assert list(tmp_path.iterdir()) == []


def test_sequences_beyond_the_models_positions_are_warned_of(call, model, tmp_path):
    long = write_jsonl(tmp_path / "long.jsonl", ["0123456789" * 60])
    code, error = call("--model", model, "--data", long, "--seq-len", 512, "--dp", 1, "--sp", 2, "--steps", 1, "--out",
                       tmp_path / "run")
    assert code == 0
    assert "warning: --seq-len 512 is beyond the 256 positions the model was made for" in error
    assert "attention has not learned such distances" in error and "--rope-scaling yarn --rope-factor" in error
    assert len(metrics(tmp_path / "run")) == 1


def test_the_directory_of_another_run_is_kept(call, saving, model, data):
    before = files(saving)
    code, error = call("--model", model, "--data", data, "--seq-len", 128, "--out", saving)
    assert code == 2
    assert f"--out {saving} holds another run; choose another directory, or continue that run with --resume" in error
    assert files(saving) == before


def test_a_directory_with_other_files_is_kept(call, model, data, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, error = call("--model", model, "--data", data, "--seq-len", 128, "--out", tmp_path)
    assert code == 2 and f"--out {tmp_path} is not empty; choose another directory" in error
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


def test_resume_is_refused_where_it_would_be_another_run(call, saving, tmp_path):
    before = files(saving)
    other = make_hf(tmp_path / "other", hidden_size=32)
    shorter = write_jsonl(tmp_path / "shorter.jsonl", ["0123456789" * 20])
    for changed, message in (
            (["--model", other], "--resume: the model has changed since the checkpoint (hidden_size 64 -> 32"),
            (["--data", shorter], "--resume: changed since the checkpoint: --data ("),
            (["--seq-len", 64], "--seq-len (128 -> 64)"),
            (["--dp", 4], "the sequences of a step (2 -> 4)")):
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


# ------------------------------------------------------------------------------------------------- numbers that are none


def test_a_loss_that_is_not_finite_stops_with_its_state_saved(call, model, data, tmp_path):
    flags = ("--model", model, "--data", data, "--seq-len", 128, "--dp", 1, "--schedule", "constant", "--warmup-steps", 0,
             "--clip-norm", 0, "--out", tmp_path / "run")
    code, stderr = call(*flags, "--steps", 20, "--learning-rate", 1e15)
    assert code == 2 and "The step was not applied; the state before it, step" in stderr and "is saved" in stderr
    assert "gradients not finite in layers 0, 1" in stderr
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1 and saved[0].isdigit()  # complete, not cut off
    assert not (tmp_path / "run" / "hf").exists()


def test_weights_that_are_not_finite_are_not_saved_and_the_run_can_start_again(call, model, data, tmp_path):
    flags = ("--model", model, "--data", data, "--seq-len", 128, "--dp", 1, "--steps", 1, "--schedule", "constant",
             "--warmup-steps", 0, "--out", tmp_path / "run")
    code, stderr = call(*flags, "--learning-rate", 3e38, "--weight-decay", 1e3)
    assert code == 2 and "step 1 made weights that are not finite numbers; they are not saved" in stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [] and not (tmp_path / "run" / "hf").exists()
    assert call(*flags, "--learning-rate", 1e-3)[0] == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]


# ------------------------------------------------------------------------------------------------------- dtypes, amounts


def test_the_export_of_a_bfloat16_model_trained_in_float32_is_float32(data, tmp_path):
    model = make_hf(tmp_path / "bfloat16", dtype="bfloat16")
    weights = load_file(model / "model.safetensors")
    save_file({name: w.bfloat16() for name, w in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    assert run_here("--model", model, "--data", data, "--seq-len", 128, "--dp", 1, "--steps", 2, "--learning-rate", 1e-5,
                    "--out", tmp_path / "run") == 0
    to_hf(tmp_path / "run", tmp_path / "converted")
    for export in (tmp_path / "run" / "hf", tmp_path / "converted"):
        loaded = AutoModelForCausalLM.from_pretrained(export)
        assert loaded.dtype == torch.float32
        assert_same_tensors({k: v for k, v in loaded.state_dict().items()}, load_file(export / "model.safetensors"))


def test_the_export_of_a_large_model_is_in_several_files(model, data, tmp_path, monkeypatch):
    """Each is held in host memory, which is nearly full after a long run."""
    monkeypatch.setattr("alst_jax.storage.saving.EXPORT_FILE", 10**5)
    run = tmp_path / "run"
    assert run_here("--model", model, "--data", data, "--seq-len", 128, "--dp", 1, "--steps", 1, "--out", run) == 0
    files = sorted((run / "hf").glob("*.safetensors"))
    exported = LlamaForCausalLM.from_pretrained(run / "hf").state_dict()
    largest = max(x.nbytes for name, x in exported.items())
    assert len(files) > 2 and all(file.stat().st_size < max(10**5, largest) + 10**4 for file in files)
    saved = dict(Checkpoints(run).read_params(1))
    np.testing.assert_array_equal(exported["model.norm.weight"].numpy(), saved["norm", "scale"])


def test_a_step_does_not_meet_a_sequence_twice(call, model, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", ["x" * 100])
    code, stderr = call("--model", model, "--data", one, "--seq-len", 128, "--dp", 2, "--grad-accum", 2, "--out",
                           tmp_path / "run")
    assert code == 2 and "--data gives 1 sequences, fewer than the 4 of one step" in stderr


def test_float32_on_a_gpu_does_not_choose_slow_attention_in_silence(monkeypatch):
    monkeypatch.setattr(setup.jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="--dtype float32 on a GPU: .*--attention xla, which is exact and very slow"):
        setup.make_profile(TrainConfig(), np.dtype("float32"), TINY_LLAMA)


def test_random_weights_need_only_a_config_and_are_exported_only_on_purpose(call, model, data, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(model / "config.json", bare / "config.json")
    flags = ("--data", data, "--seq-len", 128, "--dp", 1)
    code, stderr = call("--model", bare, *flags, "--out", tmp_path / "refused")
    assert code == 2 and "has no tokenizer" in stderr
    out = tmp_path / "run"
    assert run_here("--model", bare, "--random-weights", *flags, "--steps", 1, "--out", out) == 0
    assert metrics(out)[0]["loss"] == pytest.approx(np.log(SHAPE["vocab_size"]), rel=0.05) and not (out / "hf").exists()
    assert run_here("--resume", "--out", out, "--steps", 2, "--export") == 0
    assert [line["step"] for line in metrics(out)] == [1, 2]
    AutoModelForCausalLM.from_pretrained(out / "hf")
    code, stderr = call("--random-weights", "--data", data, "--out", tmp_path / "none")
    assert code == 2 and "name its directory with --model" in stderr


def test_packed_runs_resume_in_the_middle_of_an_epoch_on_another_mesh(model, tmp_path, capfd):
    texts = [" ".join(str(i * n) for n in range(2 + i % 23)) for i in range(1, 60)]
    data, held_out = write_jsonl(tmp_path / "short.jsonl", texts), write_jsonl(tmp_path / "held.jsonl", texts[:9])
    flags = ("--model", model, "--data", data, "--seq-len", 128, "--schedule", "constant", "--learning-rate", 1e-3,
             "--eval-data", held_out, "--no-export")
    packed, whole, parts = ("--pack",), tmp_path / "whole", tmp_path / "parts"
    assert run_here(*flags, *packed, "--dp", 2, "--sp", 2, "--steps", 6, "--out", whole) == 0
    out = capfd.readouterr().out
    assert "59 documents in " in out and "% full; at most " in out
    assert run_here(*flags, *packed, "--dp", 2, "--sp", 2, "--steps", 3, "--out", parts) == 0
    assert run_here("--resume", "--out", parts, "--dp", 1, "--batch-size", 2, "--sp", 4, "--steps", 6) == 0
    one, other = metrics(whole), metrics(parts)
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [(line["labels"], line["padding"]) for line in other] == [(line["labels"], line["padding"]) for line in one]
    assert all(line["tokens"] + line["padding"] == 2 * 128 for line in one)
    assert run_here("--resume", "--out", parts, "--steps", 7, "--no-pack") == 2  # other sequences
    alone = tmp_path / "alone"  # the same weights on documents that are not packed: the same held-out loss
    assert run_here("--model", whole, *flags[2:], "--learning-rate", 1e-30, "--dp", 2, "--steps", 1, "--out", alone) == 0
    assert metrics(alone)[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=1e-5)


def test_long_documents_are_dropped_and_counted(model, tmp_path, capfd):
    data = write_jsonl(tmp_path / "mixed.jsonl", ["short one", "x" * 300, "y" * 90])
    flags = ("--model", model, "--data", data, "--seq-len", 128, "--dp", 1, "--steps", 1, "--no-export")
    assert run_here(*flags, "--long-documents", "drop", "--pack", "--out", tmp_path / "run") == 0
    out = capfd.readouterr().out
    assert "1 longer than 128 tokens" in out and "2 documents in 1 packs of 128" in out


def test_random_weights_are_exported_where_that_is_typed():
    flags = ["--model", "m", "--random-weights"]
    assert not train.parse(flags).export and train.parse([*flags, "--export"]).export and train.parse(flags[:2]).export


def test_a_kernel_that_cannot_keep_documents_apart_is_refused_before_anything_is_loaded(monkeypatch):
    flags = dict(model="any", plan_for="H100", attention="cudnn", pack=True)
    setup.make_profile(TrainConfig(**flags), np.dtype("bfloat16"), TINY_LLAMA)
    monkeypatch.setitem(KERNELS, "cudnn", dataclasses.replace(KERNELS["cudnn"], serves=frozenset()))
    with pytest.raises(UserError, match="--attention cudnn does not implement documents, .*use --attention xla or flash"):
        setup.make_profile(TrainConfig(**flags), np.dtype("bfloat16"), TINY_LLAMA)
    setup.make_profile(TrainConfig(**flags, pack_attention="across"), np.dtype("bfloat16"), TINY_LLAMA)


def test_ropes_that_depend_on_the_length_are_not_packed():
    model = dataclasses.replace(TINY_LLAMA, rope=RopeConfig(rope_type="dynamic", factor=2.0, max_position_embeddings=64))
    with pytest.raises(UserError, match="--pack: this model's rotary embedding .dynamic or longrope."):
        setup.make_profile(TrainConfig(pack=True), np.dtype("float32"), model)
    setup.make_profile(TrainConfig(pack=True, pack_attention="across"), np.dtype("float32"), model)
    with pytest.raises(UserError, match="--lengths: this model's rotary embedding .dynamic or longrope."):
        setup.make_profile(TrainConfig(lengths=(32, 64)), np.dtype("float32"), model)
    setup.make_profile(TrainConfig(lengths=(32, 64)), np.dtype("float32"), TINY_LLAMA)


def test_a_jax_with_wrong_gradients_is_refused(monkeypatch):
    monkeypatch.setattr(setup.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(setup.jax, "__version_info__", (0, 11, 0))
    with pytest.raises(UserError, match="wrong gradients for offloaded activations on CUDA .*install 0.11.1 or newer"):
        setup.make_profile(TrainConfig(), np.dtype("bfloat16"), TINY_LLAMA)


def test_out_of_memory_names_what_is_left_to_try(call, model, data, tmp_path, monkeypatch):
    def too_much(*_):
        jax.block_until_ready(jax.numpy.zeros((2**46,)))

    words, jobs = train.out_of_memory, []
    monkeypatch.setattr(train, "out_of_memory", lambda config, reason, job=None: jobs.append(job) or words(config, reason, job))
    monkeypatch.setattr(trainer, "optimizer_step", too_much)
    code, stderr = call("--model", model, "--data", data, "--seq-len", 128, "--dp", 1, "--offload-optimizer", "--out",
                        tmp_path / "run")
    assert code == 2 and "error: out of memory: RESOURCE_EXHAUSTED" in stderr
    assert [job.profile.offload_optimizer for job in jobs] == [True]  # of the profile that ran
    assert "These need less: --offload-activations, --offload-weights, --optimizer-states int8, --head-chunks" in stderr


def test_memory_flags_reach_the_profile():
    flags = dict(remat=True, offload_activations=True, offload_weights=True, offload_optimizer=True, segment_layers=(2, 1),
                 keep_attention_on_device=1, keep_attention_on_host=2, head_chunks=2, reduce_dtype="bfloat16", loss_tile=7,
                 mlp_tile=5)
    profile = setup.make_profile(TrainConfig(**flags), np.dtype("float32"), TINY_LLAMA)
    assert {name: getattr(profile, name) for name in flags} == flags
    off = setup.make_profile(TrainConfig(remat=False, tiled_loss=False, tiled_mlp=False), np.dtype("float32"), TINY_LLAMA)
    assert (off.remat, off.loss_tile, off.mlp_tile) == (False, None, None)


def test_optimizer_flags_reach_the_checkpoint(model, data, tmp_path):
    assert run_here("--model", model, "--data", data, "--seq-len", 128, "--dp", 1, "--steps", 1, "--dtype", "bfloat16",
                    "--optimizer-states", "int8", "--master-weights", "none", "--segment-layers", 2,
                    "--keep-attention-on-host", 1, "--head-chunks", 2, "--out", tmp_path / "run") == 0
    names = (tmp_path / "run" / "checkpoints" / "1" / "optimizer" / "_METADATA").read_text()
    assert "code" in names and "scale" in names and "master" not in names
