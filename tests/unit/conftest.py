"""A tokenizer that must not be called any more."""

import pytest

from alst_jax.data.tokenizer import byte_tokenizer


@pytest.fixture
def deaf(monkeypatch):
    """From now on nothing can be tokenised."""

    def stop():
        refuse = lambda *_, **__: pytest.fail("tokenised again")
        monkeypatch.setattr(type(byte_tokenizer()), "__call__", refuse)

    return stop
