# python -m pytest tests/faults/test_security.py
"""Nothing that is read is executed, no name leaves its directory, and sizes are checked before memory is taken."""

import datetime
import json
import pathlib
import pickle
import resource

import jax.numpy as jnp
import jinja2
import pytest

from alst_jax.config import UserError
from alst_jax.data.templates import ChatTemplate
from alst_jax.data.tokenizer import byte_tokenizer, load_tokenizer
from alst_jax.models.hf_config import hf_config_dict, model_config
from alst_jax.models.weight_files import INDEX, find_tensors
from alst_jax.storage import checksums, run_directory
from alst_jax.storage.checkpoint import Checkpoints
from convert.to_hf import to_hf
from tests.helpers import TINY

CHAT = [{"role": "user", "content": "hello"}]
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "import": "{{ self.__init__.__globals__['__builtins__']['__import__']('os').system('touch MARK') }}",
    "method of ours": "{{ strftime_now.__self__.__class__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "attr filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "change": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_templates_stay_in_their_sandbox(escape, marked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% endfor %}" + ESCAPES[escape], {}, datetime.datetime.now()
    )
    program = template.marked if marked else template.plain
    names = dict(
        messages=[dict(m) for m in CHAT],
        strftime_now=datetime.datetime.now().strftime,
        alst_turn=lambda *_: "",
        alst_end=lambda *_: "",
    )
    try:
        text = program.render(names)
    except (jinja2.exceptions.SecurityError, jinja2.exceptions.UndefinedError):
        text = ""
    assert "class" not in text and "__" not in text and "function" not in text
    assert not list(tmp_path.iterdir())
    assert type(program.environment).__mro__[1].__name__ == "ImmutableSandboxedEnvironment" or isinstance(
        program.environment, jinja2.sandbox.ImmutableSandboxedEnvironment
    )


def test_code_beside_a_tokenizer_or_a_model_is_not_run(tmp_path, monkeypatch):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(
        json.dumps(
            json.loads(settings.read_text())
            | {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
        )
    )
    (tmp_path / "config.json").write_text(
        json.dumps(hf_config_dict(TINY) | {"auto_map": {"AutoConfig": "evil.T", "AutoModelForCausalLM": "evil.T"}})
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run remote code"))
    try:
        load_tokenizer(tmp_path)
    except UserError as error:
        assert "auto_map in tokenizer_config.json), and is never executed" in str(error)
    assert model_config(tmp_path) == TINY
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("ran"),)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00001.pt"])
def test_pickles_are_not_loaded(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        find_tensors(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert (tmp_path / "ran").exists()  # the bomb is one


def test_no_program_of_ours_reads_pickles_or_evaluates_text():
    """json, safetensors, zarr and the sandbox are the only readers."""
    root = pathlib.Path(__file__).parents[2]
    sources = [root / "train.py", *(root / "alst_jax").rglob("*.py"), *(root / "convert").rglob("*.py")]
    for word in (
        "pickle.load",
        "import pickle",
        "torch.load",
        "eval(",
        "exec(",
        "allow_pickle=True",
        "trust_remote_code=True",
        "yaml.load",
        "shell=True",
        "os.system",
    ):
        users = [
            str(file)
            for file in sources
            if any(
                word in line and f"_{word}" not in line and f".{word}" not in line
                for line in file.read_text().splitlines()
            )
        ]
        assert not users, (word, users)


@pytest.mark.parametrize(
    "name", ["../w.safetensors", "/etc/w.safetensors", "sub/w.safetensors", "sub/../../w.safetensors", ".."]
)
def test_an_index_cannot_leave_its_directory(name, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match="names files outside of its directory|names files that are not there: \\.\\."):
        find_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_checksums_cannot_leave_their_directory(name, tmp_path):
    (tmp_path / "secret").write_text("x")
    with pytest.raises(UserError, match="its checksums name files outside of it"):
        checksums.compare(tmp_path / "in", {name: [1, "0"]})


def test_a_checkpoint_with_arrays_of_absurd_shape_is_refused_before_they_are_allocated(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    run_directory.write_run_file(run_dir, "training", {"flags": {}})
    (run_dir / "model").mkdir()
    (run_dir / "model" / "config.json").write_text(json.dumps(hf_config_dict(TINY)))
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, {"norm": {"scale": jnp.zeros(8)}}, None, {"step": 1})
    opened = dict(checkpoints.open_params(1))
    huge = next(iter(opened.values()))
    huge.shape = (2**50,)
    monkeypatch.setattr(Checkpoints, "open_params", lambda *_, **__: iter(opened.items()))
    monkeypatch.setattr(type(huge), "__getitem__", lambda *_: pytest.fail("read"))
    with pytest.raises(
        UserError, match=r"not those of its model/config.json: .*norm\.scale is \(1125899906842624,\), not \(64,\)"
    ):
        to_hf(run_dir, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_header_of_absurd_length_takes_no_memory(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}" + b"\0" * 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="is corrupt or cut short"):
        find_tensors(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB
