# pytest tests/cli/test_refusals_cli.py
"""train.py refuses bad models, data and flags, and leaves nothing behind."""

import json
import pathlib
import shutil

import pytest

from tests.runs import ROOT, files, finish, metrics, start, write_jsonl

# ----------------------------------------------------------------------------------------------------------- bad input


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
    "not a Hugging Face directory": (
        lambda m: remove(m, "config.json"),
        "{model} is not a Hugging Face model directory",
    ),
    "weights cut short": (lambda m: truncate(m / "model.safetensors"), "model.safetensors is corrupt or cut short"),
    "no weights": (lambda m: remove(m, "*.safetensors"), "{model} holds no weights"),
    "weights of other sizes": (lambda m: edit_config(m, intermediate_size=97), "the weights are not those config.json"),
    "another architecture": (
        lambda m: edit_config(m, model_type="gemma2", architectures=["Gemma2ForCausalLM"]),
        "model_type 'gemma2', architectures ['Gemma2ForCausalLM'] is not supported",
    ),
    "another RoPE": (
        lambda m: edit_config(m, rope_parameters=dict(rope_type="proportional", rope_theta=1e4)),
        "RoPE type 'proportional' is not implemented; these are: default, linear, dynamic, llama3, yarn",
    ),
    "no tokenizer": (lambda m: remove(m, "tokenizer*"), "{model} has no tokenizer"),
    "a broken tokenizer": (lambda m: truncate(m / "tokenizer.json"), "{model}: the tokenizer cannot be read"),
    "a tokenizer of another model": (lambda m: edit_config(m, vocab_size=100), "outside the model's vocabulary of 100"),
}
GOOD_LINE = json.dumps({"text": "long enough " * 20}) + "\n"
BAD_DATA = {
    "a broken line": (GOOD_LINE * 2 + '{"text": "cut of', "{data}:3: not valid JSON"),
    "a line without the field": (
        GOOD_LINE + '{"body": "x"}\n',
        "{data}:2: neither a 'text' nor a 'messages' field (it has: body)",
    ),
    "an empty file": ("", "{data}: the file is empty"),
    "empty lines": ("\n\n", "--data {data}: no documents found"),
    "empty documents": ('{"text": ""}\n' * 2, "--data {data}: no documents found; records left out: 2 empty"),
    "short documents": ('{"text": "short"}\n' * 2, "--data is too short: the longest of its 2 documents has 6 tokens"),
    "no such file": (None, "--data {data}: no such file or directory"),
}
BAD_FLAGS = {
    "a hub name that is none": (
        ["--model", "no-such-user/no-such-model"],
        "no such model could be fetched from the hub",
    ),
    "sp and the heads": (["--dp", 1, "--sp", 3], "sp=3 must divide 4 query heads; use 1, 2 or 4 (--sp)"),
    "dp x sp and the devices": (["--dp", 4, "--sp", 4], "dp=4 x sp=4 needs 16 devices and there are 8"),
    "packing": (
        ["--pack-attention", "across"],
        "--pack-attention across says what attention reads in a pack; it needs --pack",
    ),
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
    code, _, stderr = finish(
        start("--model", missing, "--data", data, "--simulate-devices", 2, "--out", tmp_path / "run")
    )
    assert code == 2
    assert stderr.strip().startswith(f"error: {missing}: no such directory")
    assert list(tmp_path.iterdir()) == []


def test_sequences_beyond_the_models_positions_are_warned_of(call, model, tmp_path):
    long = write_jsonl(tmp_path / "long.jsonl", ["0123456789" * 60])
    code, error = call(
        "--model",
        model,
        "--data",
        long,
        "--seq-len",
        512,
        "--dp",
        1,
        "--sp",
        2,
        "--steps",
        1,
        "--out",
        tmp_path / "run",
    )
    assert code == 0
    assert "warning: --seq-len 512 is beyond the 256 positions the model was made for" in error
    assert "attention has not learned such distances" in error and "--rope-scaling yarn --rope-factor" in error
    assert len(metrics(tmp_path / "run")) == 1


def test_a_directory_with_other_files_is_kept(call, model, data, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, error = call("--model", model, "--data", data, "--seq-len", 128, "--out", tmp_path)
    assert code == 2 and f"--out {tmp_path} is not empty; choose another directory" in error
    assert files(tmp_path) == {"thesis.tex": b"years of work"}
