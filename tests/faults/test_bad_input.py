# pytest tests/faults/test_bad_input.py
"""Bad input to train.py and the converters: one clear line, exit code 2, no traceback, nothing written.

Everything is refused before a program is compiled. The model is the smallest of tests/data.
"""

import pathlib
import shutil
import sys

import pytest
import transformers  # noqa: F401  its log keeps the stream of its first import, which must not be one of a test's

import train
from alst_jax.hardware import environment
from convert import verify
from convert.cli import run
from convert.from_hf import from_hf
from convert.to_hf import to_hf
from tests.faults.bad_input import TABLES, write

OLD = pathlib.Path(__file__).parents[1] / "data" / "run-eb801e0"
COMMANDS = {"train": train.main, "from_hf": lambda: run(from_hf), "to_hf": lambda: run(to_hf), "verify": verify.main}


def test_there_are_cases_of_60_kinds():
    assert sum(map(len, TABLES.values())) >= 60


def test_the_files_that_cases_change_are_good(good, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(environment, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--model", str(good["model"]), "--data", str(good["data"]), "--show-samples", "1"]
    )
    assert train.main() == 0 and "tokens, " in capfd.readouterr().out


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model, its data, and a run: copied where a case changes them."""
    top = tmp_path_factory.mktemp("good")
    to_hf(OLD / "converted", top / "model")
    shutil.copytree(OLD / "run", top / "run")
    shutil.copy(OLD / "data.jsonl", top / "data.jsonl")
    return {"model": top / "model", "run": top / "run", "data": top / "data.jsonl"}


def arguments_of(table: str, case: tuple, good: dict, folder: pathlib.Path) -> tuple[list, dict]:
    """(the command and its arguments, the names of places in them) of a case, whose files are made in `folder`."""
    places = good | {"out": folder / "out"}
    train_on = lambda model, data: [
        "train",
        "--model",
        model,
        "--data",
        data,
        "--seq-len",
        128,
        "--dp",
        1,
        "--out",
        places["out"],
    ]
    if table in ("model", "weights"):
        model = shutil.copytree(good["model"], folder / "model")
        case[0](model)
        return train_on(model, good["data"]) if table == "model" else ["from_hf", model, places["out"]], places
    if table == "data":
        file = folder / case[0]
        if case[1] is not None:
            write(case[0], case[1])(folder)
        return train_on(good["model"], file), places | {"file": file}
    if table == "resume":
        shutil.copytree(good["run"], folder / "run")
        case[0](folder / "run")
        more = case[1].format(**places).split()
        return [
            "train",
            "--resume",
            "--out",
            folder / "run",
            "--data",
            good["data"],
            "--steps",
            3,
            "--dp",
            1,
            *more,
        ], places
    if table == "convert":
        return [case[0], *case[1].format(**places).split()], places
    if "{large}" in case[0]:
        places["large"] = folder / "large.jsonl"
        places["large"].write_text("\n" * 5_000_000)
    return [*train_on(good["model"], good["data"]), *case[0].format(**places).split()], places


@pytest.mark.parametrize(
    "table, case",
    [
        pytest.param(table, case, id=f"{table}: {name}")
        for table, cases in TABLES.items()
        for name, case in cases.items()
    ],
)
def test_refused(table, case, good, tmp_path, monkeypatch, capfd):
    (command, *given), places = arguments_of(table, case, good, tmp_path)
    content = lambda: {
        p: p.read_bytes() if p.is_file() else None for top in (tmp_path, good["model"].parent) for p in top.rglob("*")
    }
    before = content()
    monkeypatch.setattr(environment, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *map(str, given)])
    code = COMMANDS[command]()
    error = capfd.readouterr().err
    lines = error.strip().splitlines()
    assert code == 2 and "Traceback" not in error
    assert [line.startswith("error: ") for line in lines].count(True) == 1 and lines[-1].startswith("error: "), error
    for words in case[{"train": 1, "model": 1, "weights": 1}.get(table, 2) :]:
        assert words.format(**places) in lines[-1]
    assert content() == before
