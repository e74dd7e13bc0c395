# pytest tests/parity/test_text_config.py
"""Checkpoints of text and images: their language model is trained, and the other weights are copied unchanged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import train
from alst_jax.config import IGNORED, TrainConfig, UserError
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.models.hf_config import model_config, record_vocabulary
from alst_jax.models.hf_saving import save_params
from alst_jax.models.hf_weights import load_params
from alst_jax.models.other_weights import FILE
from alst_jax.storage.run_directory import start_run_directory
from alst_jax.storage.source import find_model
from convert.from_hf import from_hf
from convert.to_hf import to_hf
from tests.helpers import assert_trees_close, leaves, make_step, torch_gradients

TEXT = dict(
    vocab_size=101,
    hidden_size=60,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    max_position_embeddings=256,
    sliding_window=7,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


def gemma3(**changes):
    text = transformers.Gemma3TextConfig(**TEXT | changes, layer_types=["sliding_attention", "full_attention"])
    vision = transformers.SiglipVisionConfig(**VISION)
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=100)
    )


def mistral3(**changes):
    text, vision = transformers.MistralConfig(**TEXT | changes), transformers.PixtralVisionConfig(**VISION, head_dim=8)
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


MODELS = {"gemma3": gemma3, "mistral3": mistral3}


@pytest.fixture(scope="module", params=MODELS)
def twins(request, tmp_path_factory):
    """A random torch model and its directory."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1) * 0.5
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def test_the_loss_and_every_gradient_of_the_language_model(twins):
    model, directory = twins
    config = model_config(directory)
    parameters = [*model.model.language_model.parameters(), model.lm_head.weight]  # the last may be the embedding
    assert config.num_params == sum(x.numel() for x in {id(x): x for x in parameters}.values())
    assert config.family == {"gemma3": "gemma3_text", "mistral3": "mistral"}[model.config.model_type]
    tokens = np.random.default_rng(1).integers(0, 100, (2, 33), dtype=np.int32)
    out = model(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long(), use_cache=False)
    model.zero_grad()
    out.loss.backward()
    labels = np.concatenate([tokens[:, 1:], np.full((2, 1), IGNORED, np.int32)], axis=1)
    step = make_step(config)
    batch = step.put_batch(tokens, labels, np.tile(np.arange(33, dtype=np.int32), (2, 1)))
    loss, gradients = step.loss_and_grad(
        *step.split(load_params(directory, config, step.params)), batch, jnp.float32(1 / 64)
    )
    assert abs(float(loss) - out.loss.item()) < 1e-4 * out.loss.item()
    language = torch.nn.Module()  # with the names of a language model alone
    language.model, language.lm_head = model.model.language_model, model.lm_head
    expected = torch_gradients(language)
    assert expected.keys() == leaves(gradients).keys()
    assert_trees_close(gradients, expected, 1e-4)


def renamed(name):
    """The name in checkpoints whose language model is inside of `model.`."""
    for old, new in (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head.")):
        name = new + name.removeprefix(old) if name.startswith(old) else name
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


@pytest.mark.parametrize("inside", [False, True])
def test_there_and_back_bit_for_bit(twins, tmp_path, inside):
    """All tensors, under their names. Then with other weights of the language model: the others stay."""
    directory = twins[1]
    if inside:
        before = load_file(directory / "model.safetensors")
        directory = tmp_path / "inside"
        directory.mkdir()
        save_file({renamed(name): x for name, x in before.items()}, directory / "model.safetensors")
        (directory / "config.json").write_bytes((twins[1] / "config.json").read_bytes())
    sizes = from_hf(directory, tmp_path / "run")
    assert to_hf(tmp_path / "run", tmp_path / "back", verify=not inside) == sizes
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "back"))
    assert before.keys() == after.keys() and len(before) == sizes[0]
    assert all(np.array_equal(before[name].view(np.int32), after[name].view(np.int32)) for name in before)
    assert (tmp_path / "back" / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    assert not (tmp_path / "back" / FILE).exists()

    config = model_config(tmp_path / "run" / "model")
    params = jax.tree.map(lambda x: x + 1, load_params(directory, config, make_step(config).params))
    save_params(
        jax.tree_util.tree_leaves_with_path(params),
        config,
        tmp_path / "trained",
        20_000,
        model_dir=tmp_path / "run" / "model",
    )
    assert len(list((tmp_path / "trained").glob("model-*.safetensors"))) > 3
    after = {name: x for file in (tmp_path / "trained").glob("*.safetensors") for name, x in load_file(file).items()}
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "language_model" in name or "lm_head" in name}


def test_a_run_keeps_the_other_weights(twins, tmp_path):
    """From a Hugging Face directory, and from the run that was made so."""
    directory = twins[1]
    config = model_config(directory)
    for source, run in ((directory, tmp_path / "one"), (tmp_path / "one" / "model", tmp_path / "two")):
        (source / "tokenizer.json").write_text("{}")
        start_run_directory(run, TrainConfig(), config, None, source)
        (source / "tokenizer.json").unlink()
    names = load_file(directory / "model.safetensors").keys()
    assert load_file(tmp_path / "two" / "model" / FILE).keys() == {
        name for name in names if not name.startswith("language_model.")
    }
    record_vocabulary(tmp_path / "two" / "model", 128)
    assert model_config(tmp_path / "two" / "model").vocab_size == 128


@pytest.mark.parametrize("kind", ["gemma3", pytest.param("mistral3", marks=pytest.mark.slow)])
def test_train_py_from_end_to_end(kind, tmp_path):
    """train.py --model on such a directory: the language model moves, the export has all other weights unchanged."""
    MODELS[kind](vocab_size=264).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A long time ago. " * 20)
    assert (
        train.run(
            TrainConfig(
                model=str(tmp_path / "model"),
                data=(str(tmp_path / "text.txt"),),
                seq_len=32,
                steps=1,
                out=str(tmp_path / "run"),
                dp=1,
                sp=1,
                learning_rate=0.1,
            )
        )
        == 0
    )
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "model", tmp_path / "run" / "hf"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    language = {name for name in before if "language_model" in name or "lm_head" in name}
    assert {name for name in language if "proj" in name} <= moved <= language < before.keys()


@pytest.fixture
def raw():
    return json.loads(gemma3().config.to_json_string()) | {"architectures": ["Gemma3ForConditionalGeneration"]}


def test_what_is_refused(raw, tmp_path):
    def refuse(message, fields, **flags):
        (tmp_path / "config.json").write_text(json.dumps(raw | fields))
        with pytest.raises(UserError, match=message):
            find_model(TrainConfig(model=str(tmp_path), **flags), tokenizer=False) if flags else model_config(tmp_path)

    refuse(
        "config.json: text_config: this checkpoint .model_type 'llava'.*inside of Gemma3ForConditionalGeneration "
        r"\(model_type 'gemma3'\).*save the language model alone",
        dict(model_type="llava"),
    )
    refuse("holds more than a language model", dict(architectures=["Gemma3ForSequenceClassification"]))
    refuse("not implemented beside text_config: quantization_config=", dict(quantization_config={"bits": 4}))
    refuse("model_type 'ministral3'.*not supported", dict(text_config=dict(model_type="ministral3")))
    refuse(
        "config.json: not implemented: attention_dropout=0.5",
        dict(text_config=raw["text_config"] | {"attention_dropout": 0.5}),
    )
    refuse("--random-weights --export: .* more than a language model", {}, random_weights=True, export=True)
    save_file({"vision_tower.x": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="F64; weights must be"):
        from_hf(tmp_path, tmp_path / "run")
    save_file({"vision_tower.x": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no tensor's name begins with language_model.model. or model.language_model."):
        from_hf(tmp_path, tmp_path / "run")
    with pytest.raises(UserError, match=f"{FILE} is missing"):
        save_params([], model_config(tmp_path), tmp_path / "out", model_dir=tmp_path)


def test_published_fields_are_filled_up_as_by_transformers(tmp_path):
    """Gemma 3's config.json gives few fields of its language model."""
    text = dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
    )
    fields = dict(
        architectures=["Gemma3ForConditionalGeneration"],
        boi_token_index=255999,
        eoi_token_index=256000,
        eos_token_id=[1, 106],
        image_token_index=262144,
        initializer_range=0.02,
        mm_tokens_per_image=256,
        model_type="gemma3",
        text_config=text,
        torch_dtype="bfloat16",
        transformers_version="4.50.0.dev0",
        vision_config=dict(hidden_size=1152, model_type="siglip_vision_model"),
    )
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours, theirs = model_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path).text_config
    assert (ours.vocab_size, ours.num_heads, ours.num_kv_heads, ours.head_dim, ours.tie_word_embeddings) == (
        theirs.vocab_size,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
        True,
    )
    assert [kind.window for kind in ours.layer_kinds] == [
        1024 if kind == "sliding_attention" else None for kind in theirs.layer_types
    ]
    assert ours.ropes[ours.layer_kinds[5].table].factor == theirs.rope_parameters["full_attention"]["factor"] == 8
