"""A tiny model and a few texts for runs of train.py, and a call that keeps its error."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.runs import make_hf, run_here, write_jsonl

CACHE = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """A run and its resume compile the same programs: the second finds them in a directory of the module's own."""
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", *CACHE)}
    for name, value in (CACHE | {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs"))}).items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


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
