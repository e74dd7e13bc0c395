"""A tiny model and a few texts for runs of train.py, and a call that keeps its error."""

import pytest

from tests.runs import make_hf, run_here, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_hf(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    texts = [" ".join(f"{i} x {n} is {i * n}." for n in range(4 + 3 * i)) for i in range(1, 8)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", texts)


@pytest.fixture
def call(capsys):
    """(exit code, standard error on one line) of train.main() in this process."""

    def call(*arguments) -> tuple[int, str]:
        return run_here(*arguments), " ".join(capsys.readouterr().err.split())

    return call
