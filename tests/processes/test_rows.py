# pytest tests/processes/test_rows.py
"""A process reads the tokens of its own rows; it knows the sizes and the labels of all."""

import types

import numpy as np
import pytest

from alst_jax.config import IGNORED
from alst_jax.data.batches import Layout, TrainingBatches
from alst_jax.data.documents import Sequence
from alst_jax.data.packing import Packs, pack
from alst_jax.data.pieces import Joined


class Counted(list):
    """Sequences as of a source: their lengths are known; what is read is counted."""

    read: list
    lengths = property(lambda self: np.asarray([s.tokens.size for s in list.__iter__(self)], np.int64))

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("lengths", [8, (4, 8)])
def test_a_process_reads_its_own_rows_alone(lengths):
    """Its rows, and the sizes of all rows, are those of a process that reads all."""
    sizes, steps = [5, 3, 8, 1, 2, 7, 6, 4, 3, 1], 6
    documents = [Sequence(np.full(n, i + 1, np.int32), np.full(n, i + 1, np.int32)) for i, n in enumerate(sizes)]
    groups_of = pack(np.asarray(sizes), 8, 0)

    def steps_of(mine):
        source = Counted(documents)
        source.read = []
        made = TrainingBatches(Joined([Packs(source, groups_of)]), lengths, 2, 2, 0, 0, None, Layout((2, 8), mine))
        found = [next(made) for _ in range(steps)]
        return [
            one
            for step in found
            for one in (step if isinstance(step, list) else [{k: v[i] for k, v in step.items()} for i in (0, 1)])
        ], source.read

    whole, all_read = steps_of(None)
    halves = [steps_of(frozenset([row])) for row in (0, 1)]
    assert sorted(halves[0][1] + halves[1][1]) == sorted(all_read) and halves[0][1] and halves[1][1]
    for row, (half, _) in enumerate(halves):
        for ours, theirs in zip(half, whole, strict=True):
            for name in ("tokens", "labels", "positions"):
                np.testing.assert_array_equal(ours[name][row], theirs[name][row])
                assert ours[name].shape == theirs[name].shape
            assert (ours["labels"][1 - row] == IGNORED).all() and (ours["tokens"][1 - row] == 0).all()
            for name in ("documents", "padding"):
                np.testing.assert_array_equal(ours[name], theirs[name])


def test_the_labels_of_all_rows_are_counted_once(monkeypatch):
    """Processes 0 and 1 share row 0, and process 2 has row 1."""
    from alst_jax.stack import batch

    given = [[5, 0], [5, 0], [0, 3]]
    monkeypatch.setattr(batch, "link", lambda: types.SimpleNamespace(exchange=lambda name, value: given))
    assert batch.count_all_labels([5, 0]) == 8
    assert batch.labels_of_rows(np.array([[IGNORED, 1, 2], [IGNORED] * 3])) == [2, 0]
