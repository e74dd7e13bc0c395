# python -m pytest tests/cli/test_extend_cli.py
"""train.py --rope-scaling --eval-long: said at the start, judged before and after, exported, and the same on resume."""

import json

import pytest
from transformers import AutoConfig

from tests.runs import make_hf, metrics, run_here, write_jsonl

LONG = 512


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    directory = tmp_path_factory.mktemp("extend")
    texts = [" ".join(f"{i} x {n} is {i * n}." for n in range(100)) for i in range(1, 9)]
    model = make_hf(directory / "llama", max_position_embeddings=128)
    data, held_out = (write_jsonl(directory / f"{name}.jsonl", texts) for name in ("train", "held"))
    return (
        "--model",
        model,
        "--data",
        data,
        "--eval-long",
        held_out,
        "--eval-long-sequences",
        1,
        "--eval-long-context",
        256,
        "--seq-len",
        LONG,
        "--dp",
        1,
        "--sp",
        2,
        "--pack",
    )


@pytest.mark.parametrize("resume", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "and its resume"])
def test_a_run(resume, flags, tmp_path, capsys):
    scaled = ("--rope-scaling", "yarn", "--rope-factor", 4, "--out", tmp_path / "run")
    assert run_here(*flags, *scaled, "--steps", 2) == 0
    out, err = capsys.readouterr()
    assert "rope    loss of the first batch by position" in out and "is that of a model that knows nothing" in out
    assert "beyond the" not in err, "yarn has room for the length"
    assert "1 texts of 512 tokens, 4 short contexts of LongPPL" in out
    assert "step 0: judged at 512 tokens" in out and "step 2: judged at 512 tokens" in out
    config = AutoConfig.from_pretrained(tmp_path / "run" / "hf")
    assert config.max_position_embeddings == LONG
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 128)
    first, *_, last = metrics(tmp_path / "run")
    assert (first["event"], first["step"]) == ("long", 0) and "event" not in last
    assert last["long_loss/256-512"] < first["long_loss/256-512"] and last["long_key_tokens"] >= 0
    tags = b"".join(file.read_bytes() for file in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"long_loss/256-512" in tags and b"long_needle_exact" in tags
    folder = tmp_path / "run" / "long"
    names = {"step-00000000.json", "step-00000002.json", "needle.svg", "loss-by-position.svg"}
    assert names <= {p.name for p in folder.iterdir()}

    if not resume:
        return
    assert run_here("--resume", "--out", tmp_path / "run", "--steps", 3) == 0
    out, _ = capsys.readouterr()
    assert "step 3: judged" in out and "step 0: judged" not in out and "rope    loss" not in out
    lines = [line for line in metrics(tmp_path / "run") if line["step"] == 3]
    assert lines[0]["long_loss/256-512"] < first["long_loss/256-512"]
    assert json.loads((folder / "step-00000003.json").read_text())["step"] == 3

    assert run_here("--resume", "--out", tmp_path / "run", "--steps", 4, "--rope-factor", 8) == 2
    assert "changed since the checkpoint: --rope-factor (4.0 -> 8.0)" in capsys.readouterr()[1]


@pytest.mark.parametrize(
    "more,message",
    [
        (("--rope-scaling", "linear", "--rope-factor", 2), "128 positions become 256, and --seq-len 512 is beyond"),
        (("--eval-long", "SHORT"), "its longest document has 10 tokens, and a loss at 512"),
        (("--rope-theta", 1e6, "--rope-scaling", "yarn", "--rope-factor", 4), "stretch the same positions twice"),
    ],
)
def test_refused_in_one_line(more, message, flags, tmp_path, capsys):
    more = [write_jsonl(tmp_path / "short.jsonl", ["few words"]) if word == "SHORT" else word for word in more]
    assert run_here(*flags, *more, "--out", tmp_path / "run") == 2
    errors = [line for line in capsys.readouterr()[1].splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0] and not (tmp_path / "run").exists()
