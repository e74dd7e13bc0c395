# pytest tests/unit/test_run_directory.py
"""Run directories: names of checkpoints, the run file, files of the model."""

import json
import pathlib
import shutil

import jax
import pytest

from alst_jax import run as setup
from alst_jax.config import TrainConfig, UserError
from alst_jax.data.tokenizer import byte_tokenizer, load_tokenizer
from alst_jax.models.hf_config import hf_config_dict
from alst_jax.models.hf_saving import save_params
from alst_jax.storage import run_directory
from tests.helpers import TINY, make_step, tiny
from tests.unit.saves import filled


@pytest.fixture
def run(tmp_path):
    """A run directory with steps 7 and 10, which only their names make checkpoints."""
    run_directory.write_run_file(tmp_path / "run", "training", {"flags": {"steps": 10}})
    for name in ("7", "10", "11.orbax-checkpoint-tmp"):
        (tmp_path / "run" / run_directory.CHECKPOINTS / name).mkdir(parents=True)
    return tmp_path / "run"


def test_the_forms_of_a_checkpoints_name(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    newest = ("run", "run/", "run/checkpoints", "run/checkpoints/10")
    for form, step in [(form, 10) for form in newest] + [("run/checkpoints/7", 7)]:
        for given in (form, pathlib.Path(form), run.parent / form):
            assert run_directory.find_checkpoint(given) == (run, step)
            assert run_directory.is_checkpoint(given)


def test_a_run_directory_may_have_any_name(run):
    for name in ("checkpoints", "checkpoints/5"):
        moved = run.parent / "elsewhere" / name
        moved.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run, moved)
        assert run_directory.find_checkpoint(moved) == (moved, 10)


def test_what_is_no_checkpoint_is_said(run):
    other = run.parent / "other"
    other.mkdir()
    for path in (
        other,
        run.parent / "nowhere",
        run / run_directory.CHECKPOINTS / "7" / "params",
        run / run_directory.MODEL,
    ):
        with pytest.raises(UserError, match=f"^{path}: no checkpoint there; it is a directory with run.json, model/"):
            run_directory.find_checkpoint(path)
    with pytest.raises(UserError, match=f"^{run}/checkpoints/8: no such step; there are 7, 10$"):
        run_directory.find_checkpoint(run / run_directory.CHECKPOINTS / "8")
    shutil.rmtree(run / run_directory.CHECKPOINTS)
    with pytest.raises(UserError, match=f"^{run}: the run has saved no checkpoint yet$"):
        run_directory.find_checkpoint(run)
    assert not run_directory.is_checkpoint(other)


def test_the_export_inside_a_run_is_a_model_and_no_checkpoint(run):
    """OUT/hf is what a run leaves behind for others, --model among them."""
    export = run / run_directory.EXPORT
    params = filled(make_step().params)
    save_params(jax.tree_util.tree_leaves_with_path(params), TINY, export)
    (export / "config.json").write_text(json.dumps(hf_config_dict(TINY)))
    byte_tokenizer().save_pretrained(export)
    assert not run_directory.is_checkpoint(export)
    source = setup.find_model(TrainConfig(model=str(export), data=("any",)))
    assert source.hf_weights == export and source.config == TINY


# ------------------------------------------------------------------------------------------------------------ run files


def test_run_file(run):
    record = run_directory.read_run_file(run)
    assert record["kind"] == "training" and record["flags"] == {"steps": 10}
    assert record["versions"]["jax"] == jax.__version__
    assert run_directory.is_run_directory(run) and not run_directory.is_run_directory(run.parent)
    with pytest.raises(UserError, match="no run to resume there: it has no run.json; leave out --resume to start one"):
        run_directory.read_run_file(run.parent)
    (run / run_directory.RUN_FILE).write_text('{"kind": ')
    with pytest.raises(UserError, match=f"^{run}/run.json is not valid JSON: "):
        run_directory.read_run_file(run)


def test_a_changed_model_is_refused_field_by_field():
    run_directory.check_same_model(TINY, tiny())
    with pytest.raises(
        UserError,
        match="^--resume: the model has changed since the checkpoint "
        r"\(num_layers 3 -> 4; mlp_bias True -> False\); start a new run in another --out",
    ):
        run_directory.check_same_model(TINY, tiny(num_layers=4, mlp_bias=False))
    with pytest.raises(UserError, match="rope .*theta.*10000.0.* -> .*500000.0"):
        run_directory.check_same_model(TINY, tiny(rope=TINY.rope.__class__(theta=5e5)))


def test_model_files_are_copied_without_weights(tmp_path):
    source = tmp_path / "hf"
    (source / "original").mkdir(parents=True)
    copied = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "vocab.json",
    )
    left = (
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.00.pth",
        "model.gguf",
        ".gitattributes",
        "original/params.json",
    )
    for name in copied + left:
        (source / name).write_text(name)
    run_directory.copy_model_files(source, tmp_path / "run" / run_directory.MODEL)
    there = {p.name: p.read_text() for p in (tmp_path / "run" / run_directory.MODEL).iterdir()}
    assert there == {name: name for name in copied}


def test_named_chat_templates_are_copied_and_replaced_by_ones_own(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    tokenizer.save_pretrained(tmp_path / "hf")
    run_directory.copy_model_files(tmp_path / "hf", tmp_path / "model")
    run_directory.copy_model_files(tmp_path / "model", tmp_path / "export")
    assert load_tokenizer(tmp_path / "export").chat_template == {"default": "a", "tool_use": "b"}
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "old"}))
    run_directory.write_template("own", tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").chat_template == "own"
    tokenizer.chat_template = "typed"
    (tmp_path / "hf/config.json").write_text(json.dumps(hf_config_dict(TINY)))
    for given, expected in ((None, {"default": "a", "tool_use": "b"}), ("own.jinja", "typed")):
        out, config = tmp_path / f"run-{given}", TrainConfig(chat_template=given)
        run_directory.start_run_directory(out, config, TINY, tokenizer, tmp_path / "hf")
        assert load_tokenizer(out / "model").chat_template == expected
