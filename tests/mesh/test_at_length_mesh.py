# pytest tests/mesh/test_at_length_mesh.py
"""The whole evaluation at length: packed on a mesh with every feature equal to one sequence at a time on one device."""

import dataclasses
import json
import types

import numpy as np
import pytest

from alst_jax.at_length.evaluation import Evaluation, Packed, Shape
from alst_jax.at_length.tasks import Writer, make_cases
from alst_jax.config import IGNORED
from alst_jax.data.pieces import Sequence
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.ops.rope import RopeConfig
from alst_jax.profile import Profile
from tests.helpers import initial, make_step, tiny

LENGTH, CONTEXT = 512, 64
FEATURES = Profile(loss_tile=50, mlp_tile=70, remat=True, offload_activations=True, offload_weights=True, head_chunks=2)
ROPES = {"default": RopeConfig(), "dynamic": RopeConfig("dynamic", factor=4.0, max_position_embeddings=100)}


def material():
    tokenizer = byte_tokenizer()
    text = np.asarray(tokenizer("A dark night, and rain on all the roofs of the town. " * 40)["input_ids"], np.int32)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 200, (3, LENGTH + 1)).astype(np.int32)
    texts = [Sequence(row[:-1], np.where(rng.random(LENGTH) < 0.1, IGNORED, row[1:]).astype(np.int32)) for row in drawn]
    return texts, make_cases(Writer.of(tokenizer, text), LENGTH, 1, 0)


def one_by_one(step, params, sequences):
    """(losses, hits) of each sequence in a batch of its own; behind it there is padding at position 0."""
    for sequence in sequences:
        size = sequence.tokens.size
        padded = lambda x, fill: np.pad(x, (0, LENGTH - size), constant_values=fill)[None]
        positions = padded(np.arange(size, dtype=np.int32), 0)
        batch = step.put_batch(padded(sequence.tokens, 0), padded(sequence.labels, IGNORED), positions)
        found = step.token_losses(*params, batch)
        yield np.asarray(found.losses)[0, :size], np.asarray(found.hits)[0, :size]


@pytest.mark.parametrize("rope", [pytest.param("default", marks=pytest.mark.slow), "dynamic"])
def test_packed_on_a_mesh_equals_one_at_a_time(rope, tmp_path):
    model = tiny(vocab_size=264, hidden_size=32, num_layers=2, head_dim=8, rope=ROPES[rope], initializer_range=0.2)
    texts, cases = material()
    shape = Shape(4, LENGTH + 8, 2, 0, alike=rope == "dynamic")
    evaluation = Evaluation.of(texts, cases, CONTEXT, shape, tmp_path)
    step = make_step(model, dp=2, sp=2, profile=FEATURES)
    trained, frozen = step.split(initial(step))
    state = types.SimpleNamespace(trained=trained, frozen=frozen, step=3)
    found = evaluation.packed.losses(step, state)

    alone = make_step(model)
    params = alone.split(initial(alone))
    sequences = evaluation.packed.sequences
    some = [*range(4), 40, *range(len(sequences) - len(cases), len(sequences), 5)]
    for number, (losses, hits) in zip(some, one_by_one(alone, params, [sequences[i] for i in some])):
        np.testing.assert_allclose(found[number][0], losses, rtol=1e-4, atol=1e-4)
        assert (found[number][1] == hits).mean() > 0.99
    if rope == "dynamic":  # beside longer documents, short ones would have their frequencies
        mixed = Packed.of(sequences, dataclasses.replace(shape, alike=False)).losses(step, state)
        assert not all(np.allclose(one[0], two[0], rtol=1e-3) for one, two in zip(mixed, found))

    said = []
    values = evaluation(step, state, said.append)
    assert values["long_loss/256-512"] == pytest.approx(
        np.mean(np.concatenate([loss[256:][text.labels[256:] != IGNORED] for text, (loss, _) in zip(texts, found)])),
        rel=1e-5,
    )
    judged = sum(np.count_nonzero(text.labels[CONTEXT - 1 : -1] != IGNORED) for text in texts)
    assert f"key tokens of {judged:,}, whose perplexity" in said[0]
    assert {"long_needle_exact", "long_copy_loss", "long_words_exact", "long_variables_loss"} <= values.keys()
    saved = json.loads((tmp_path / "long" / "step-00000003.json").read_text())
    assert saved["fingerprint"] == evaluation.fingerprint and (tmp_path / "long" / "needle.svg").is_file()
