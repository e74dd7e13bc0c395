# pytest tests/unit/test_fuzz.py; all examples: pytest -m slow tests/unit/test_fuzz.py, a part of them: -k 'part3'
"""Made-up configs and files of weights are read, or refused with a UserError. No other error, and no hang."""

import functools
import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from alst_jax.config import UserError
from alst_jax.models import hf_weights
from alst_jax.models.families import FAMILIES
from alst_jax.models.hf_config import hf_config_dict, model_config, parse_config
from alst_jax.models.hf_weights import model_tensors
from alst_jax.models.text_config import TEXT, WRAPPERS
from alst_jax.models.weight_files import INDEX, SINGLE, find_tensors, read_stored

SHAPE = dict(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
SHARED = [
    *SHAPE,
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "architectures",
    "auto_map",
    "hidden_act",
    "max_position_embeddings",
    "quantization_config",
    "layer_types",
    "num_experts",
    "tie_word_embeddings",
    "partial_rotary_factor",
    "initializer_range",
    "model_type",
    "attention_dropout",
    TEXT,
    "a_new_field",
    "original_max_position_embeddings",
]
WORDS = [
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "default",
    "yarn",
    "llama3",
    "longrope",
    "dynamic",
    "linear",
    "silu",
    "rope_type",
    "type",
    "factor",
    "short_factor",
    "long_factor",
    "rope_theta",
    "beta_fast",
    "attention_factor",
    "",
]
NUMBERS = st.one_of(st.integers(-3, 12), st.integers(), st.floats(), st.sampled_from([10**40, 2**63, 1e308, -0.0]))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(WORDS), st.text(max_size=5))
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=5))
JSON = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=8
)
# The default suite runs part 0; each part has other examples. 10 parts of 1,000 examples of each kind are slow.
SLOW = [pytest.param(i, 1000, marks=pytest.mark.slow, id=f"part{i}") for i in range(1, 11)]
PARTS = [pytest.param(0, 200, id="default"), *SLOW]


def run(strategy, check, seed, examples):
    """`check` of examples. 20 seconds for one are a hang."""
    settings = hypothesis.settings(
        max_examples=examples, deadline=20_000, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    hypothesis.seed(seed)(settings(hypothesis.given(strategy)(check)))()


@st.composite
def configs(draw):
    """A right config.json of some family, of which some fields are replaced."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    fields = st.dictionaries(st.sampled_from(SHARED + sorted(FAMILIES[family].implemented)), JSON, max_size=3)
    raw = SHAPE | dict(model_type=family, architectures=[FAMILIES[family].architecture]) | draw(fields)
    if draw(st.integers(0, 4)):
        return raw
    kind = draw(st.sampled_from(sorted(WRAPPERS)))
    return {"model_type": kind, "architectures": [WRAPPERS[kind].architecture], TEXT: raw} | draw(fields)


@pytest.mark.parametrize("seed,examples", PARTS)
def test_configs(seed, examples):
    read = []

    def check(raw):
        try:
            config = parse_config(raw, "config.json")
        except UserError as error:
            assert str(error).strip()
            return
        read.append(config)
        assert parse_config(json.loads(json.dumps(hf_config_dict(config))), "config.json") == config

    run(configs(), check, seed, examples)
    assert len(read) > examples / 20  # not all are refused


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\ufeff{}", "{", "[]", "\x00", '"\\ud800"'], ids=range(8)
)
def test_texts_that_are_no_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError):
        model_config(tmp_path)
    (tmp_path / INDEX).write_text(text, encoding="utf-8")
    with pytest.raises(UserError):
        find_tensors(tmp_path)


CONFIG = parse_config(SHAPE | dict(model_type="llama", tie_word_embeddings=True), "config.json")
NAMES = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.qweight",
    "model.layers.0.self_attn.k_scale",
    "module.model.norm.weight",
    "",
]
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "F64": 8, "BOOL": 1, "F8_E4M3": 1}


@st.composite
def files(draw):
    """The bytes of a safetensors file. Its header is right or not; some bytes are changed."""
    header, end = {}, 0
    for name in draw(st.lists(st.one_of(st.sampled_from(NAMES), st.text(max_size=4)), max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(SIZES))), draw(st.lists(st.integers(0, 9), max_size=3))
        start, end = end, end + int(np.prod(shape)) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    lies = draw(st.integers(0, 2)) == 0
    if lies and header:
        entry = header[draw(st.sampled_from(sorted(header)))]
        entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))] = draw(
            st.one_of(JSON, st.lists(st.integers(-9, 2**65), max_size=3))
        )
    if draw(st.integers(0, 5)) == 0:
        header["__metadata__"] = draw(JSON)
    text = json.dumps(header).encode()
    if draw(st.integers(0, 9)) == 0:
        text = draw(st.binary(max_size=40))
    length = draw(st.one_of(st.just(len(text)), st.just(len(text)), st.integers(0, 2**64 - 1)))
    content = bytearray(length.to_bytes(8, "little") + text + bytes(min(end, 10_000)))
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.just(len(content)), st.integers(0, len(content))))])


@pytest.mark.parametrize("seed,examples", PARTS)
def test_files_of_weights(tmp_path, monkeypatch, seed, examples):
    whole = []
    # Traced once: the shapes of the model are the same for all files, and took half of the time.
    monkeypatch.setattr(hf_weights, "expected_shapes", functools.cache(hf_weights.expected_shapes))

    def check(content):
        (tmp_path / SINGLE).write_bytes(content)
        try:
            tensors = find_tensors(tmp_path)
            for tensor in tensors.values():
                assert read_stored(tensor).shape == tensor.shape
            whole.append(tensors)
            model_tensors(tmp_path, CONFIG)
        except UserError as error:
            assert str(error).strip()

    (pathlib.Path(tmp_path) / "config.json").write_text(json.dumps(hf_config_dict(CONFIG)))
    run(files(), check, seed, examples)
    # Some are read to the end. How many depends on more than the seed: hypothesis draws constants of imported modules.
    assert whole
