# pytest tests/unit/test_packing_properties.py
"""On drawn data: no document is lost or met twice by packing, by lengths or by additions; the order is the seed's."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alst_jax.data.batches import Layout, TrainingBatches
from alst_jax.data.documents import Sequence
from alst_jax.data.order import Extended, Stages
from alst_jax.data.packing import Packs, pack

SEEDS = st.integers(0, 2**32 - 1)
DRAWN = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def documents(draw):
    """(lengths, capacity), with no document longer than the capacity."""
    capacity = draw(st.integers(1, 300))
    return np.array(draw(st.lists(st.integers(1, capacity), max_size=80)), np.int64), capacity


@DRAWN
@given(documents(), SEEDS)
def test_packing_loses_and_doubles_nothing(data, seed):
    lengths, capacity = data
    packs = pack(lengths, capacity, seed)
    assert sorted(packs.members.tolist()) == list(range(lengths.size))
    sums = [int(lengths[members].sum()) for members in packs]
    assert sums == packs.sums(lengths).tolist() and all(0 < n <= capacity for n in sums)
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > capacity  # no two packs would fit into one
    for members in packs:  # the longest first
        assert (np.diff(lengths[members]) <= 0).all()


@DRAWN
@given(documents(), SEEDS)
def test_the_order_of_packs_is_the_seeds(data, seed):
    lengths, capacity = data
    assert pack(lengths, capacity, seed).lists() == pack(lengths.copy(), capacity, seed).lists()
    alike = np.full(40, 3)
    assert pack(alike, 9, seed).lists() != pack(alike, 9, seed ^ 1).lists()


def numbered(lengths):
    """Documents; the tokens of number i are i + 1."""
    return [Sequence(np.full(n, i + 1, np.int32), np.full(n, i + 1, np.int32)) for i, n in enumerate(lengths)]


class Lengthy(list):
    """A list of sequences, as the pieces of a source are."""

    lengths = property(lambda self: np.array([sequence.tokens.size for sequence in self], np.int64))


@settings(DRAWN, max_examples=25)
@given(documents(), SEEDS, st.lists(st.integers(1, 300), max_size=3), st.integers(1, 2), st.integers(1, 3))
def test_a_step_in_lengths_holds_the_tokens_of_the_step_without(data, seed, shorter, rows, accumulation):
    lengths, capacity = data
    if lengths.size < rows * accumulation:
        return
    packs = Packs(Lengthy(numbered(lengths)), pack(lengths, capacity, seed))
    choices = (*sorted({n for n in shorter if n < capacity}), capacity)
    make = lambda lengths: TrainingBatches(packs, lengths, rows, accumulation, seed, 0, None, Layout((1, 400)))
    plain, several = make(capacity), make(choices)
    for _ in range(3):
        whole, parts = next(plain), next(several)
        parts = parts if isinstance(parts, list) else [{k: v[i] for k, v in parts.items()} for i in range(accumulation)]
        counts = collections.Counter(whole["tokens"].ravel().tolist())
        found = sum((collections.Counter(part["tokens"].ravel().tolist()) for part in parts), collections.Counter())
        assert {k: n for k, n in found.items() if k} == {k: n for k, n in counts.items() if k}
        assert len(parts) == accumulation
        for part in parts:
            length = part["tokens"].shape[1]
            used = int((part["tokens"] != 0).sum(1).max())
            assert length == min(n for n in choices if n >= used)
            np.testing.assert_array_equal(part["padding"], (part["tokens"] == 0).sum(1))
            assert part["documents"].shape == (1, 401) and part["documents"][0, -1] == rows * length
            # each document, and each padding, is between two offsets
            flat, offsets = part["tokens"].ravel(), np.unique(part["documents"][0])
            assert all(len(set(flat[a:b].tolist())) == 1 for a, b in zip(offsets, offsets[1:]))
            assert (part["positions"] < length).all()


@settings(DRAWN, max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 40)), min_size=1, max_size=4), SEEDS)
def test_additions_lose_and_double_nothing(parts, seed):
    """Until an addition as without it; then what the epoch had left and all that was added; then epochs over all."""
    counts, starts = tuple(count for count, _ in parts), [0]
    for _, after in parts[1:]:
        starts.append(starts[-1] + after)
    total, extended = sum(counts), Extended(range(sum(counts)), Stages(counts, tuple(starts)), seed)
    seen = [extended[i] for i in range(starts[-1] + 3 * total)]
    if len(parts) > 1:
        before = Extended(range(total), Stages(counts[:-1], tuple(starts[:-1])), seed)
        assert seen[: starts[-1]] == [before[i] for i in range(starts[-1])]
    times, known = collections.Counter(), 0
    for position, number in enumerate(seen):
        while known < len(counts) and starts[known] <= position:
            known += 1
        assert number < sum(counts[:known])  # nothing before it was added
        times[number] += 1
    # Data of one part are met equally often, but for the epoch in progress.
    for begin, end in zip(np.cumsum((0, *counts)), np.cumsum(counts)):
        of_part = [times[i] for i in range(begin, end)]
        assert max(of_part) - min(of_part) <= 1


def test_an_addition_by_hand():
    """Of 4 sequences 1 was met; 2 are added: 5 in the rest of the epoch, then 6 each."""
    extended = Extended(range(6), Stages((4, 2), (0, 1)), 7)
    seen = [extended[i] for i in range(18)]
    assert sorted(seen[:6]) == sorted(seen[6:12]) == sorted(seen[12:]) == list(range(6))
    assert seen[0] < 4 and seen[6:12] != seen[12:]
    at_an_end = Extended(range(6), Stages((4, 2), (0, 8)), 7)
    assert sorted(at_an_end[i] for i in (8, 9)) == [4, 5] and sorted(at_an_end[i] for i in range(10, 16)) == list(
        range(6)
    )
    assert [Extended(range(6), Stages((4, 2), (0, 1)), seed)[1] for seed in range(12)].count(extended[1]) < 12


def test_a_run_with_an_addition_resumes():
    make = lambda: TrainingBatches(numbered([4] * 9), 4, 2, 1, 3, 0, Stages((6, 3), (0, 4)))
    straight, first = make(), TrainingBatches(numbered([4] * 6), 4, 2, 1, 3, 0)
    tokens = lambda batches, count: [next(batches)["tokens"][0, :, 0].tolist() for _ in range(count)]
    wanted = tokens(straight, 12)
    assert tokens(first, 2) == wanted[:2]
    extended = make()
    extended.set_state(json.loads(json.dumps(first.get_state())))  # the state of the run before the addition
    assert tokens(extended, 3) == wanted[2:5]
    again = make()
    again.set_state(json.loads(json.dumps(extended.get_state())))
    assert tokens(again, 7) == wanted[5:]
    assert sorted(sum(wanted[:4], []) + wanted[4][:1]) == list(range(1, 10))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_part_keeps_its_order(seed):
    alone = TrainingBatches(numbered([1] * 12), 1, 1, 1, seed, 0)
    extended = TrainingBatches(numbered([1] * 15), 1, 1, 1, seed, 0, Stages((12, 3), (0, 12)))
    for _ in range(12):
        np.testing.assert_array_equal(next(alone)["tokens"], next(extended)["tokens"])
