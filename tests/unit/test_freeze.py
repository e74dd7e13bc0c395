# pytest tests/unit/test_freeze.py
"""--freeze: which patterns are refused, and that a resumed run must freeze the same."""

import pytest

from alst_jax import run as setup
from alst_jax.config import UserError
from alst_jax.storage.run_directory import check_geometry
from tests.helpers import TINY, tiny


@pytest.mark.parametrize(
    "pattern",
    [None, "embed_tokens|lm_head", "layers", r"^layers\.mlp\..*kernel$", "norm", "q_proj.bias", r"layers\.self_attn"],
)
def test_patterns_that_match_some_parameters(pattern):
    setup.check_freeze(pattern, TINY)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("(", r"--freeze '\(' is not a regular expression: .*searched for in the names of parameters"),
        ("lm_heads", "--freeze 'lm_heads' matches none of the 19, and must match at least one"),
        ("layers.0.mlp", "matches none"),  # the layers are one stack
        ("", "--freeze '' matches all 19, and must leave at least one to train"),
        (".", "matches all 19"),
    ],
)
def test_other_patterns_are_refused_with_names(pattern, message):
    with pytest.raises(UserError, match=message) as error:
        setup.check_freeze(pattern, TINY)
    error.match(r"embed_tokens\.embedding, layers\..*, norm\.scale and so on; `embed_tokens\|lm_head`, for example")


def test_a_tied_model_has_no_head():
    with pytest.raises(UserError, match="matches none"):
        setup.check_freeze("lm_head", tiny(tie_word_embeddings=True))


def test_a_resumed_run_freezes_the_same():
    saved = {"data": "0a", "seed": 0}
    check_geometry(saved, saved | {"freeze": None})  # a checkpoint from before the flag
    check_geometry(saved | {"freeze": "norm"}, saved | {"freeze": "norm"})
    with pytest.raises(UserError, match=r"--resume: changed since the checkpoint: --freeze \(None -> norm\)"):
        check_geometry(saved, saved | {"freeze": "norm"})
    with pytest.raises(UserError, match=r"--freeze \(norm -> None\)"):
        check_geometry(saved | {"freeze": "norm"}, saved | {"freeze": None})
