# pytest tests/parity/test_extend_parity.py
"""Each --rope-scaling: config.json as it is exported gives transformers the logits of ours, beyond the old length."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch  # in the test extra: parity must fail, not skip, without it
import transformers

from alst_jax.config import TrainConfig, UserError
from alst_jax.models.extend import extend, extended, longest, record_extension
from alst_jax.models.hf_config import model_config, parse_config
from alst_jax.models.hf_weights import load_params
from tests.helpers import make_step, relative_error
from tests.parity.test_families_parity import logits as logits_of_kinds
from tests.parity.test_hf_parity import logits

OLD, NEW, MODEL = 32, 128, 1e-4
SHAPE = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=OLD,
)
FLAGS = {name: dict(rope_scaling=name, rope_factor=4.0) for name in ("yarn", "linear", "llama3", "dynamic")}
FLAGS["theta"] = dict(rope_theta=8e4)


def twin(directory):
    return transformers.LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory of a model of 32 positions, whose config.json has the form of transformers 4."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("old")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(directory)
    fields = json.loads((directory / "config.json").read_text())
    del fields["rope_parameters"]
    (directory / "config.json").write_text(json.dumps(fields | {"rope_theta": 1e4, "rope_scaling": None}))
    return directory


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_transformers_reads_the_export(flags, trained, tmp_path):
    config = TrainConfig(**flags, seq_len=NEW)
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    record_extension(tmp_path, config)
    ours = extend(model_config(trained), trained, config)
    assert ours == model_config(tmp_path) and longest(ours) == NEW
    tokens = np.random.default_rng(1).integers(0, 99, (1, NEW), dtype=np.int32)
    with torch.no_grad():
        theirs = twin(tmp_path)(torch.tensor(tokens).long()).logits.numpy()
        before = twin(trained)(torch.tensor(tokens).long()).logits.numpy()
    found = np.asarray(logits(ours, load_params(tmp_path, ours, make_step(ours).params), tokens))
    assert relative_error(found[:, OLD:], theirs[:, OLD:]) < MODEL
    assert relative_error(before[:, OLD:], theirs[:, OLD:]) > 100 * MODEL


@pytest.mark.parametrize(
    "family,fields",
    [
        ("gemma3_text", dict(rope_theta=1e6, rope_local_base_freq=1e4)),
        ("gemma3_text", {}),
        ("olmo3", dict(rope_theta=5e5)),
    ],
)
def test_the_rope_of_sliding_windows_stays(family, fields):
    raw = SHAPE | dict(model_type=family, num_hidden_layers=6, head_dim=8) | fields
    old = parse_config(raw, "old")
    new = extended(raw, TrainConfig(rope_scaling="yarn", rope_factor=4.0, seq_len=NEW))
    theirs = transformers.AutoConfig.for_model(family).from_dict(copy.deepcopy(new))
    older = {name: value for name, value in copy.deepcopy(new).items() if name != "rope_parameters"}
    assert transformers.AutoConfig.for_model(family).from_dict(older).rope_parameters == theirs.rope_parameters
    assert parse_config({**older}, "old form").ropes == parse_config(new, "new").ropes
    full, sliding = (theirs.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    assert full["rope_type"] == "yarn" and full["factor"] == 4 and sliding["rope_type"] == "default"
    assert theirs.max_position_embeddings == NEW
    of_types = lambda model: {rope.rope_type: rope.theta for rope in model.ropes}
    ours = parse_config(new, "new")
    assert of_types(ours) == {"yarn": full["rope_theta"], "default": sliding["rope_theta"]}
    assert {old.ropes[kind.table].theta for kind in old.kinds if kind.window is None} == {full["rope_theta"]}
    assert {old.ropes[kind.table].theta for kind in old.kinds if kind.window} == {sliding["rope_theta"]}


def test_windows_of_olmo3_have_no_older_form_of_another_base():
    """There `rope_theta` is of both types of layers, and only full attention's base changes."""
    new = extended(SHAPE | dict(model_type="olmo3", rope_theta=5e5), TrainConfig(rope_theta=8e6, seq_len=NEW))
    assert not {"rope_theta", "rope_scaling"} & new.keys()
    bases = {kind: settings["rope_theta"] for kind, settings in new["rope_parameters"].items()}
    assert bases == {"full_attention": 8e6, "sliding_attention": 5e5}


@pytest.mark.parametrize(
    "flags", [FLAGS["yarn"], pytest.param(FLAGS["theta"], marks=pytest.mark.slow)], ids=["yarn", "theta"]
)
def test_transformers_reads_windows_and_stretched_layers(flags, tmp_path):
    """Gemma 3: a rotary embedding for each type of layer, whichever form of the settings is read."""
    torch.manual_seed(0)
    fields = SHAPE | dict(
        head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    )
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**fields))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path)
    load = lambda: transformers.Gemma3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = np.random.default_rng(1).integers(1, 99, (1, NEW), dtype=np.int32)
    before = load()(torch.tensor(tokens).long()).logits.detach().numpy()
    record_extension(tmp_path, TrainConfig(**flags, seq_len=NEW))
    ours = model_config(tmp_path)
    found = np.asarray(logits_of_kinds(ours, load_params(tmp_path, ours, make_step(ours).params), tokens))
    written = json.loads((tmp_path / "config.json").read_text())
    for form in ({"rope_parameters"}, {"rope_theta", "rope_scaling", "rope_local_base_freq"}):  # each without the other
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k not in form}))
        theirs = load()(torch.tensor(tokens).long()).logits.detach().numpy()
        assert relative_error(found[:, OLD:], theirs[:, OLD:]) < MODEL
    assert relative_error(before[:, OLD:], theirs[:, OLD:]) > 100 * MODEL


def test_theta_keeps_the_scaling():
    scaled = SHAPE | dict(model_type="llama", rope_theta=1e4, rope_scaling=dict(type="linear", factor=2.0))
    new = parse_config(extended(scaled, TrainConfig(rope_theta=9e4, seq_len=NEW)), "new")
    assert (new.rope.rope_type, new.rope.factor, new.rope.theta) == ("linear", 2.0, 9e4)
    assert new.max_position_embeddings == NEW
    for scaling, at_most in (("yarn", NEW), ("dynamic", OLD)):  # computed from the old length, given or not
        raw = SHAPE | dict(model_type="llama", rope_theta=1e4, rope_scaling=dict(type=scaling, factor=2.0))
        before = parse_config(raw, "old")
        after = parse_config(extended(raw, TrainConfig(rope_theta=9e4, seq_len=NEW)), "new")
        assert after.rope == dataclasses.replace(before.rope, theta=9e4) and after.max_position_embeddings == at_most


@pytest.mark.parametrize(
    "changes,flags,message",
    [
        (
            {},
            dict(rope_scaling="yarn", rope_factor=2.0, seq_len=65),
            "32 positions become 64, and --seq-len 65 is beyond; use --rope-factor 3",
        ),
        (
            dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
            dict(rope_scaling="yarn", rope_factor=2.0),
            "scaled already",
        ),
        (dict(model_type="phi3"), dict(rope_scaling="linear", rope_factor=2.0), "Phi-3 has no such scaling"),
    ],
)
def test_what_contradicts_is_refused(changes, flags, message):
    with pytest.raises(UserError, match=message) as refused:
        extended(SHAPE | dict(model_type="llama") | changes, TrainConfig(**flags))
    assert "\n" not in str(refused.value)
