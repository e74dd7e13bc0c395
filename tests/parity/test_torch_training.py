# pytest tests/parity/test_torch_training.py
"""Twenty steps of training on real text against transformers' Llama under torch's AdamW: every loss, final weights."""

import math

import jax
import numpy as np
import pytest
import torch
import transformers

from alst_jax import trainer
from alst_jax.config import IGNORED, TrainConfig
from alst_jax.data.batches import TrainingBatches
from alst_jax.data.documents import make_sequences
from alst_jax.data.embedded import python_reference
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import load_params
from alst_jax.optim.adamw import AdamW
from alst_jax.optim.schedule import learning_rate_schedule
from alst_jax.profile import Profile
from tests.helpers import PLAIN, make_step, relative_error

# Two float32 programs differ by rounding in every sum, about 1e-7, and hand that on from step to step: 2e-6 in the
# losses and 6e-6 in the weights, as measured after 20 steps. The bounds leave room for other CPUs and BLAS libraries;
# small mistakes, such as those tried below, go beyond them. Adam's eps is the usual 1e-8: no gradient here is mere
# rounding (rotation gives even the key biases one), so that a larger eps is not needed.
LOSS, WEIGHTS = 2e-5, 1e-4
STEPS, WARMUP, PEAK, FINAL, DECAY = 20, 5, 3e-3, 0.1, 0.1
SEQ_LEN, ROWS, ACCUMULATION = 256, 2, 2
FEATURES = Profile(
    loss_tile=48,
    mlp_tile=24,
    remat=True,
    offload_activations=True,
    offload_weights=True,
    offload_optimizer=True,
    segment_layers=(2,),
    keep_attention_on_host=1,
    head_chunks=2,
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Where the initial and the finally trained torch model are."""
    return tmp_path_factory.mktemp("initial"), tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def batches():
    """The batches of our own pipeline: int32[accumulation, rows, length] each, some with padding."""
    tokenizer = byte_tokenizer()
    sequences, _ = make_sequences(python_reference(), tokenizer, SEQ_LEN, len(tokenizer))
    data = TrainingBatches(sequences, SEQ_LEN, ROWS, ACCUMULATION, 0, tokenizer.pad_token_id)
    drawn = [next(data) for _ in range(STEPS)]
    assert any((batch["labels"][..., -1] == IGNORED).any() for batch in drawn)
    return drawn


@pytest.fixture(scope="module")
def theirs(directories, batches):
    """(losses, gradient norms) of torch; leaves the initial and the final model in `directories`."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=261,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            attention_bias=True,
            mlp_bias=True,
            attn_implementation="eager",
        )
    )
    for parameter in model.parameters():  # zero biases and unit norms hide mistakes
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directories[0])
    spared = [p for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name]
    decayed = [p for name, p in model.named_parameters() if not (name.endswith("bias") or "norm" in name)]
    assert len(spared) == 2 * (2 + 7) + 1 and len(decayed) == 2 * 7 + 2
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY}, {"params": spared, "weight_decay": 0.0}])
    losses, norms = [], []
    for i, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(i)
        tokens, labels = (torch.tensor(batch[name].reshape(-1, SEQ_LEN)).long() for name in ("tokens", "labels"))
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(directories[1])
    return losses, norms


def rate(step):
    """The schedule, written out once more."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    cosine = (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
    return PEAK * (FINAL + (1 - FINAL) * cosine)


def train(directory, batches, dp=1, sp=1, profile=PLAIN, **changes):
    """(losses, gradient norms, final weights) of our training, from the weights in `directory`."""
    config = TrainConfig(warmup_steps=WARMUP, final_learning_rate_ratio=FINAL)
    optimizer = AdamW(**dict(weight_decay=DECAY, clip_norm=1.0) | changes)
    schedule = learning_rate_schedule(config, STEPS, PEAK)
    step = make_step(model_config(directory), dp, sp, profile, optimizer)
    params = load_params(directory, step.model, step.params)
    state = trainer.TrainState.begin(step, params)
    losses, norms = [], []
    for batch in batches:
        state, values = trainer.optimizer_step(step, state, batch, schedule(state.step))
        losses.append(values["loss"])
        norms.append(values["grad_norm"])
    return losses, norms, step.join(state.trained, state.frozen)


def weight_errors(params, directory):
    """Relative error of each weight, one for each layer of a stacked one, against those in `directory`."""
    expected = load_params(directory, model_config(directory), make_step(model_config(directory)).params)
    errors = {}
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        rows = zip(x, y, strict=True) if path[0].key == "layers" else [(x, y)]
        errors |= {f"{jax.tree_util.keystr(path)} {i}": relative_error(a, b) for i, (a, b) in enumerate(rows)}
    return errors


def test_the_comparison_covers_what_it_should(theirs):
    """Clipped steps and unclipped ones, and a model that learns."""
    losses, norms = theirs
    assert max(norms) > 1.5 and min(norms) < 0.95
    assert losses[0] > 5 and losses[-1] < losses[0] - 1.5


@pytest.mark.parametrize("dp, sp, profile", [(1, 1, PLAIN), (2, 4, FEATURES)], ids=["one device", "2x4, every feature"])
def test_training_is_that_of_torch(theirs, directories, batches, dp, sp, profile):
    losses, norms, params = train(directories[0], batches, dp, sp, profile)
    np.testing.assert_allclose(losses, theirs[0], rtol=LOSS)
    np.testing.assert_allclose(norms, theirs[1], rtol=1e-3)
    errors = weight_errors(params, directories[1])
    assert len(errors) == 2 * (2 + 14) + 3
    assert max(errors.values()) < WEIGHTS, {k: v for k, v in errors.items() if v >= WEIGHTS}


@pytest.mark.parametrize("mistake", [dict(weight_decay=0.08), dict(clip_norm=1.05)], ids=str)
def test_a_small_mistake_would_show(theirs, directories, batches, mistake):
    _, _, params = train(directories[0], batches, **mistake)
    assert max(weight_errors(params, directories[1]).values()) > 4 * WEIGHTS
