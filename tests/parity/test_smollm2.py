# pytest -m slow tests/parity/test_smollm2.py
"""The real SmolLM2-135M, read by the loader of train.py, against transformers' torch: logits, loss, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from alst_jax.config import IGNORED
from alst_jax.data.batches import pad_sequence
from alst_jax.data.documents import make_sequences
from alst_jax.data.embedded import python_reference
from alst_jax.data.tokenizer import load_tokenizer
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import load_params
from alst_jax.ops.cross_entropy import cross_entropy
from alst_jax.profile import Profile
from alst_jax.run import padded_length
from tests.helpers import PLAIN, assert_trees_close, make_step, relative_error
from tests.parity.test_hf_parity import torch_gradients
from tests.smollm2 import smollm2_directory

pytestmark = pytest.mark.slow
LOGITS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-4  # 30 layers of float32 rounding: measured 1.2e-6, 4e-9 and 2.1e-5
LENGTH = 512
FEATURES = Profile(
    loss_tile=100,
    mlp_tile=64,
    remat=True,
    offload_activations=True,
    offload_weights=True,
    segment_layers=(12, 12, 5, 1),
    keep_attention_on_host=10,
    keep_attention_on_device=3,
    prefetch_activations=True,
    head_chunks=3,
)


@pytest.fixture(scope="module")
def directory():
    return smollm2_directory()


@pytest.fixture(scope="module")
def sequence(directory):
    """512 tokens of real text and what follows each, made by the data pipeline with the model's own tokenizer."""
    sequences, _ = make_sequences(python_reference(), load_tokenizer(directory), LENGTH, 49152)
    assert sequences[0].tokens.size == LENGTH and (sequences[0].labels != IGNORED).all()
    return sequences[0]


@pytest.fixture(scope="module")
def theirs(directory, sequence):
    """(logits, loss, gradients in our tree) of torch in float32.

    The loss over the 49152 logits is taken in float64: torch's float32 one is off by 3e-6 and its gradients by up to
    4.4e-4, measured against the whole model in float64, from which our float32 gradients differ by 3.5e-5.
    """
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    assert model.config.tie_word_embeddings and sum(p.numel() for p in model.parameters()) == 134_515_008
    out = model(torch.tensor(sequence.tokens)[None].long()).logits[0]
    loss = torch.nn.functional.cross_entropy(out.double(), torch.tensor(sequence.labels).long())
    loss.backward()
    return out.detach().numpy(), loss.item(), torch_gradients(model, model_config(directory))


def test_the_text_means_something_to_it(theirs):
    """Weights that were read wrongly, the same way twice, would know nothing: ln 49152 is 10.8."""
    assert theirs[1] < 3.5


def test_logits(directory, sequence, theirs, monkeypatch):
    """Those of the training step itself, told on their way into the loss."""
    told = []

    def loss_that_tells(h_TD, table, labels_T):
        jax.debug.callback(lambda logits: told.append(np.asarray(logits)), h_TD @ table.T)
        return cross_entropy(h_TD, table, labels_T)

    monkeypatch.setattr("alst_jax.stack.ends.cross_entropy", loss_that_tells)
    config = model_config(directory)
    assert config.num_params == 134_515_008 and config.tie_word_embeddings
    step = make_step(config)
    params = load_params(directory, config, step.params)
    row = pad_sequence(sequence, LENGTH, pad_token=2)
    batch = step.put_batch(**{name: array[None] for name, array in row.items()})
    loss = step.loss(*step.split(params), batch, jnp.float32(1 / LENGTH))
    jax.effects_barrier()
    (ours,) = told
    assert relative_error(ours, theirs[0]) < LOGITS
    assert (ours.argmax(-1) == theirs[0].argmax(-1)).mean() > 0.99
    assert abs(float(loss) - theirs[1]) < LOSS * theirs[1]


@pytest.mark.parametrize("sp, profile", [(1, PLAIN), (3, FEATURES)], ids=["one device", "3 devices, every feature"])
def test_loss_and_every_gradient(directory, sequence, theirs, sp, profile):
    config = model_config(directory)
    step = make_step(config, sp=sp, profile=profile)
    params = load_params(directory, config, step.params)
    row = pad_sequence(sequence, padded_length(LENGTH, sp, profile), pad_token=2)
    batch = step.put_batch(**{name: array[None] for name, array in row.items()})
    loss, gradients = step.loss_and_grad(*step.split(params), batch, jnp.float32(1 / LENGTH))
    assert abs(float(loss) - theirs[1]) < LOSS * theirs[1]
    assert_trees_close(jax.tree.map(np.asarray, gradients), theirs[2], GRADIENTS)
