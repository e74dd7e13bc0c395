# pytest tests/unit/test_batches.py
"""Batches: their order, their epochs, and where they go on."""

import json

import numpy as np
import pytest

from alst_jax.config import IGNORED
from alst_jax.data.batches import TrainingBatches, evaluation_batches, fingerprint, pad_sequence
from alst_jax.data.documents import Sequence
from tests.unit.documents import PAD


def numbered(n, length=4):
    """Sequences that tell which one they are: the first token is the number."""
    return [Sequence(np.full(length, i, np.int32), np.full(length, i, np.int32)) for i in range(n)]


def training(n=10, rows=2, grad_accum=1, seed=0):
    return TrainingBatches(numbered(n), 6, rows, grad_accum, seed, pad_token=PAD)


def order(batches, count):
    """The numbers of the sequences in the next `count` batches."""
    return [int(number) for _ in range(count) for number in next(batches)["tokens"][..., 0].reshape(-1)]


def test_order_is_a_function_of_the_seed():
    assert order(training(seed=3), 15) == order(training(seed=3), 15)
    assert order(training(seed=3), 5) != order(training(seed=4), 5)
    assert order(training(seed=3), 5) != sorted(order(training(seed=3), 5))
    assert order(training(rows=2, grad_accum=5), 3) == order(training(rows=10), 3) == order(training(rows=1), 30)


@pytest.mark.parametrize("rows, grad_accum", [(2, 1), (3, 1), (2, 2), (3, 5)])
def test_each_epoch_holds_every_sequence_once_in_another_order(rows, grad_accum):
    """Also where a batch holds the end of one epoch and the start of the next, or more than a whole one."""
    seen = order(training(rows=rows, grad_accum=grad_accum), -(-40 // (rows * grad_accum)))
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("done", [0, 1, 3, 4, 7, 20])
def test_resuming_goes_on_exactly_where_it_stopped(done):
    straight = training(n=7, rows=2)  # batches cross epochs
    order(straight, done)
    state = json.loads(json.dumps(straight.get_state()))
    rest = order(straight, 12)
    fresh, advanced = training(n=7, rows=2), training(n=7, rows=2)
    order(advanced, 5)
    for resumed in (fresh, advanced, straight):
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert order(resumed, 12) == rest
    assert order(training(n=7, rows=2), done + 12)[2 * done :] == rest


def test_batches_are_shaped_and_padded():
    batch = next(training(rows=2, grad_accum=3))
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == dict.fromkeys(
        ("tokens", "labels", "positions"), ((3, 2, 6), "int32")
    )
    np.testing.assert_array_equal(batch["positions"], np.broadcast_to(np.arange(6), (3, 2, 6)))
    np.testing.assert_array_equal(batch["tokens"][..., 4:], PAD)
    np.testing.assert_array_equal(batch["labels"][..., 4:], IGNORED)
    np.testing.assert_array_equal(batch["labels"][..., :4], batch["tokens"][..., :4])


def test_a_full_sequence_needs_no_padding():
    tokens, labels = np.arange(6, dtype=np.int32), np.arange(1, 7, dtype=np.int32)
    padded = pad_sequence(Sequence(tokens, labels), 6, PAD)
    np.testing.assert_array_equal(padded["tokens"], tokens)
    np.testing.assert_array_equal(padded["labels"], labels)


@pytest.mark.parametrize("n, rows", [(1, 4), (4, 4), (10, 4), (3, 1)])
def test_evaluation_covers_every_sequence_once(n, rows):
    batches = list(evaluation_batches(numbered(n), 6, rows, PAD))
    assert len(batches) == -(-n // rows)
    assert all(array.shape == (rows, 6) and array.dtype == np.int32 for batch in batches for array in batch.values())
    tokens, labels, positions = (np.concatenate([b[key] for b in batches]) for key in ("tokens", "labels", "positions"))
    assert tokens[:n, 0].tolist() == list(range(n))
    targets = [set(row[row != IGNORED].tolist()) for row in labels]
    assert targets == [{i} for i in range(n)] + [set()] * (len(labels) - n)
    assert (tokens[n:] == PAD).all() and (positions == np.arange(6)).all()


def test_the_fingerprint_tells_other_data():
    sequence = lambda tokens, labels: Sequence(np.array(tokens, np.int32), np.array(labels, np.int32))
    base = [sequence([1, 2, 3, 4], [2, 3, 4, IGNORED])]
    variants = {
        "tokens": [sequence([1, 2, 9, 4], [2, 3, 4, IGNORED])],
        "labels": [sequence([1, 2, 3, 4], [2, 3, IGNORED, IGNORED])],
        "cut": [sequence([1, 2], [2, 3]), sequence([3, 4], [4, IGNORED])],
        "cut elsewhere": [sequence([1], [2]), sequence([2, 3, 4], [3, 4, IGNORED])],
        "order": [sequence([3, 4], [4, IGNORED]), sequence([1, 2], [2, 3])],
        "more": base * 2,
    }
    assert fingerprint(base) == fingerprint([sequence([1, 2, 3, 4], [2, 3, 4, IGNORED])])
    assert len({fingerprint(base), *map(fingerprint, variants.values())}) == 1 + len(variants)
    assert fingerprint([sequence([1, 2], [3, 4])]) != fingerprint([sequence([1], [2]), sequence([3], [4])])
