# pytest tests/unit/test_flags.py
"""Every flag, from the command line to what it changes: none can be dropped on the way."""

import ast
import dataclasses
import inspect
import pathlib
import re
import subprocess
import sys
import textwrap
import types
import typing

import jax
import jax.numpy as jnp
import pytest
import tyro

import train
from alst_jax import run as setup
from alst_jax.config import DEFAULT_LEARNING_RATE, GROUPS, TrainConfig, UserError, chosen_fields, parse_flags
from alst_jax.declare import AtLeast, Words, flag, marked
from alst_jax.optim.schedule import learning_rate_schedule
from alst_jax.planning.job import Job, describe
from alst_jax.profile import TILES, Profile, Switches
from alst_jax.stack.batch import Batch
from tests.helpers import make_step, tiny

ROOT = pathlib.Path(__file__).parents[2]
DEFAULT = TrainConfig()
FLAGS = [field.name for field in dataclasses.fields(TrainConfig) if field.name != "typed"]
SWITCHES = [field.name for field in dataclasses.fields(Switches)]


def another(kind, value):
    """(words on the command line, value) of a flag of this type, other than its usual value."""
    kind = typing.get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        return another(kind, value)
    if typing.get_origin(kind) is typing.Literal:
        other = next(choice for choice in typing.get_args(kind) if choice != value)
        return [other], other
    if typing.get_origin(kind) is tuple:
        part = getattr(part := typing.get_args(kind)[0], "__origin__", part)
        return (["5", "7"], (5, 7)) if part is int else (["x", "y"], ("x", "y"))
    return {int: (["11"], 11), float: (["0.625"], 0.625), str: (["word"], "word")}[kind]


def typed_otherwise():
    """(a command line that types every flag, the values that it means)."""
    kinds, words, values = typing.get_type_hints(TrainConfig, include_extras=True), [], {}
    for name in FLAGS:
        usual = getattr(DEFAULT, name)
        if isinstance(usual, bool):
            words.append(flag(f"no_{name}" if usual else name))
            values[name] = not usual
        else:
            given, values[name] = another(kinds[name], usual)
            words += [flag(name), *given]
    return words, values


def test_every_flag_is_parsed():
    words, values = typed_otherwise()
    config, given = parse_flags(words)
    assert {name: getattr(config, name) for name in FLAGS} == values and given == set(FLAGS)
    assert not any(values[name] == getattr(DEFAULT, name) for name in FLAGS)
    assert parse_flags([])[0] == DEFAULT
    assert parse_flags(["--head_chunks=2", "--no-remat"])[1] == {"head_chunks", "remat"}


def read_names(sources):
    """Names that any of these sources reads of an object called config."""
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
                "config",
                "self.config",
                "planner.config",
            ):
                found.add(node.attr)
    return found


def test_every_flag_is_read():
    """Outside of the declarations and their checks: of memory flags see `test_each_switch_changes_the_step`."""
    declarations = {
        "config.py",
        "data_flags.py",
        "lora_flags.py",
        "watch_flags.py",
        "extend_flags.py",
        "flag_checks.py",
        "declare.py",
        "profile.py",
    }
    files = [path for path in (ROOT / "alst_jax").rglob("*.py") if path.name not in declarations] + [ROOT / "train.py"]
    read = read_names(path.read_text() for path in files)
    missing = set(FLAGS) - read - set(SWITCHES) - set(TILES.values())
    assert not missing, missing
    assert "planted" not in read and read_names(["config.planted + 1"]) == {"planted"}


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    text = capsys.readouterr().out
    for title, group in GROUPS.items():
        assert f"{title} options" in text
        body = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0].body
        for field, after in zip(body, body[1:] + [None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr) and len(after.value.value) > 10, field.target.id
    for name in FLAGS:
        assert re.search(rf"{flag(name)}\b", text), name
    assert "(default: None)" not in text and "(default: )" not in text
    assert f"Peak learning rate. (default: {DEFAULT_LEARNING_RATE:g}; without --model" in re.sub(r"[│\s]+", " ", text)


# ------------------------------------------------------------------------------------------------------ memory flags

EXAMPLES = dict(
    loss_tile=32,
    mlp_tile=32,
    remat=False,
    offload_activations=True,
    offload_weights=True,
    offload_optimizer=True,
    update_in_backward=True,
    segment_layers=(2,),
    keep_attention_on_device=1,
    keep_attention_on_host=1,
    head_chunks=2,
    keep_qkv_on_device=1,
    keep_mlp_on_device=1,
    share_gradients=True,
    prefetch_activations=True,
    rebuild_inputs_alone=True,
    stack="plain",
    reduce_dtype="bfloat16",
    compute_dtype="bfloat16",
    attention="none such",
)
MODEL = tiny(num_layers=2)


def program(**changes):
    """All that a step computes, and where its arrays live."""
    step = make_step(MODEL, 1, 2, Profile(**changes), dtype=jnp.bfloat16)
    batch, scale = Batch.abstract(2, 128, step.mesh), jax.ShapeDtypeStruct((), jnp.float32)
    places = jax.tree.map(lambda x: x.sharding.memory_kind, (step.params, step.optimizer_state))
    return str(step.loss_and_grad.trace(step.trained, step.frozen, batch, scale).jaxpr), str(places)


@pytest.fixture(scope="module")
def usual():
    program()  # of the first trace the constants have other names
    found = program()
    assert program() == found
    return found


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Profile)])
def test_each_switch_changes_the_step(name, usual):
    """A switch that nothing reads leaves the program as it was."""
    assert EXAMPLES[name] != getattr(Profile(), name)
    refused = "Use it with --offload-weights|it needs --offload-weights|attention kernel|so use --keep-(attention|qkv)"
    if name in ("update_in_backward", "share_gradients", "attention", "keep_qkv_on_device", "keep_mlp_on_device"):
        with pytest.raises((UserError, ValueError), match=refused):  # without what it needs
            program(**{name: EXAMPLES[name]})
    elif name == "rebuild_inputs_alone":
        assert program(**{name: True}) == usual
        assert program(segment_layers=(2,), **{name: True}) != program(segment_layers=(2,))
    elif name == "prefetch_activations":  # without arrays in host memory it has nothing to read
        assert program(**{name: True}) == usual
        assert program(offload_activations=True, **{name: True}) != program(offload_activations=True)
    else:
        assert program(**{name: EXAMPLES[name]}) != usual


def test_a_profile_printed_as_flags_is_parsed_again():
    """What a plan prints, typed on the command line, is the same profile; --memory auto leaves it alone."""
    for changes in ({name: EXAMPLES[name]} for name in SWITCHES):
        profile = Profile(**changes)
        text = describe(Job(MODEL, profile, 1, 128))
        config, given = parse_flags(text.split())
        assert config.profile("xla", "float32") == profile and given >= changes.keys(), text
    untiled = Profile(loss_tile=None, mlp_tile=None)
    assert list(untiled.flags()) == ["--no-tiled-loss", "--no-tiled-mlp"]
    assert parse_flags(list(untiled.flags()))[0].profile("xla", "float32") == untiled
    assert list(Profile(mlp_tile=7).flags(than=Profile(mlp_tile=7, remat=False))) == ["--remat"]


def test_what_memory_auto_chooses():
    assert chosen_fields() == (
        "loss_tile",
        "mlp_tile",
        "offload_activations",
        "offload_weights",
        "offload_optimizer",
        "segment_layers",
        "keep_attention_on_device",
        "keep_attention_on_host",
        "keep_qkv_on_device",
        "keep_mlp_on_device",
        "share_gradients",
        "prefetch_activations",
        "head_chunks",
        "optimizer_states",
        "master_weights",
    )
    assert marked(TrainConfig, AtLeast).keys() >= {"dp", "steps", "head_chunks", "show_samples"}
    words = [words.text for words in marked(Switches, Words).values()]
    assert len(words) == 16 and Profile().words() == ["tiled loss", "tiled MLP", "remat"]
    assert Profile(head_chunks=4, segment_layers=(2, 1)).words()[3:] == ["segments of 2, 1 layers", "4 head chunks"]


# ------------------------------------------------------------------------------------------------ flags of the training


@pytest.mark.parametrize("name", ["beta1", "beta2", "eps", "weight_decay", "clip_norm", "seed"])
def test_each_flag_of_adamw_reaches_the_optimizer(name, monkeypatch):
    keep = lambda self, model, mesh, profile, optimizer, *_: setattr(self, "optimizer", optimizer)
    monkeypatch.setattr(setup.TrainStep, "__init__", keep)
    value = {"seed": 5, "clip_norm": 0.5}.get(name, 0.25)
    job = Job(MODEL, Profile(), 1, 128, states="int8")
    make = lambda **flags: setup.make_step(TrainConfig(**flags), None, jnp.dtype("float32"), job).optimizer
    changed = [
        field.name
        for field in dataclasses.fields(make())
        if getattr(make(), field.name) != getattr(make(**{name: value}), field.name)
    ]
    assert changed == [name] and getattr(make(**{name: value}), name) == value and make().states == "int8"


@pytest.mark.parametrize(
    "changes", [dict(schedule="constant"), dict(warmup_steps=7), dict(final_learning_rate_ratio=0.5)]
)
def test_each_flag_of_the_schedule_changes_it(changes):
    rates = lambda **flags: [learning_rate_schedule(TrainConfig(**flags), 20, 1.0)(step) for step in range(20)]
    assert rates(**changes) != rates()


def test_help_into_head_prints_no_traceback():
    command = f"{sys.executable} {ROOT / 'train.py'} --help | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stdout.startswith("usage: ") and not done.stderr, done.stderr


def test_the_parser_runs_once(monkeypatch):
    calls, real = [], tyro.cli
    monkeypatch.setattr(tyro, "cli", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    config = train.parse(["--model", "m", "--data", "d", "--random-weights", "--head-chunks", "2"])
    assert len(calls) == 1 and config.typed == ("head_chunks",) and config.export is False
