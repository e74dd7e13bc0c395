# pytest tests/unit/test_packing.py
"""Packing lengths: nothing lost, nothing doubled, order from the seed, full packs, offsets of documents."""

import time

import numpy as np
import pytest

from alst_jax.data.documents import Sequence
from alst_jax.data.packing import Fullness, Groups, Packs, offsets_of, pack, pieces_of, room_for


def web_like(count, seed=0):
    """Lengths of which half are below 700 tokens and a few beyond 100,000, cut at 131,072."""
    lengths = np.random.default_rng(seed).lognormal(6.5, 1.5, count).astype(int) + 1
    return np.minimum(lengths, 131072)


@pytest.mark.parametrize("seed", range(20))
def test_each_document_is_in_one_pack_and_no_pack_is_too_long(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 500))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(0, 300)))
    packs = pack(lengths, capacity, seed).lists()
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= capacity for members in packs)
    # No two packs would fit into one: best fit never opens a pack while another has room.
    sums = sorted(sum(lengths[i] for i in members) for members in packs)
    assert len(sums) < 2 or sums[0] + sums[1] > capacity


def test_the_seed_and_nothing_else_decides():
    lengths = web_like(2000)
    assert pack(lengths, 131072, 1).lists() == pack(lengths, 131072, 1).lists() != pack(lengths, 131072, 2).lists()


def test_best_fit_takes_the_fullest_pack_that_has_room():
    assert pack(np.array([6, 5, 4, 3, 2]), 10, 0).lists() == [[0, 2], [1, 3, 4]]
    assert pack(np.array([7, 6, 3]), 10, 0).lists() == [[0, 2], [1]]  # 3 fits both


def test_a_document_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="a document of 11 tokens and packs of 10"):
        pack(np.array([3, 11]), 10, 0)


def test_web_like_data_fill_packs_by_99_percent_and_a_million_documents_take_seconds():
    lengths = web_like(100_000)
    started = time.process_time()
    packs = pack(lengths, 131072, 0)
    assert time.process_time() - started < 5  # 0.3 s measured; a million 2 s
    assert lengths.sum() / (len(packs) * 131072) > 0.99


def groups(*lists):
    return Groups(np.concatenate(lists), np.cumsum([len(part) for part in lists]))


def pieces(lengths):
    return [Sequence(np.full(n, i, np.int32), np.full(n, 100 + i, np.int32)) for i, n in enumerate(lengths)]


def test_a_pack_is_its_documents_one_behind_the_other():
    packs = Packs(pieces([2, 3, 1]), groups([1, 2], [0]))
    assert (
        len(packs) == 2 and packs[0].tokens.tolist() == [1, 1, 1, 2] and packs[0].labels.tolist() == [101] * 3 + [102]
    )
    assert packs[0].lengths == (3, 1) and packs[1].lengths == (2,)
    assert Packs(pieces([2, 3, 1]), groups([1, 2], [0]), together=True)[0].lengths is None
    assert pieces_of(packs[0], 8) == [3, 1, 4] and pieces_of(packs[0], 4) == [3, 1]
    assert pieces_of(Packs(pieces([2, 3, 1]), groups([1, 2], [0]), together=True)[0], 8) == [4, 4]


def test_offsets_of_each_replica():
    rows = [[3, 2], [8], [1, 1], [2, 3, 3]]
    np.testing.assert_array_equal(offsets_of(rows, 8, 2, 6), [[0, 3, 5, 8, 16, 16, 16], [0, 1, 2, 8, 10, 13, 16]])
    np.testing.assert_array_equal(offsets_of([[8]], 8, 1, 2), [[0, 8, 8]])
    with pytest.raises(ValueError, match="6 documents in the 2 sequences of a replica, and at most 5"):
        offsets_of(rows, 8, 2, 5)


def test_room_is_a_power_of_two():
    assert [room_for(most, rows) for most, rows in ((1, 1), (8, 1), (9, 1), (5, 4), (257, 1))] == [8, 8, 16, 32, 512]


def test_the_report_counts_documents_and_tokens():
    full = Fullness.of(50, np.array([10, 10, 20, 40]), groups([3, 0], [1, 2]))
    assert full.part == 0.8 and full.tokens.tolist() == [50, 30] and full.counts.tolist() == [2, 2]
    assert full.most_documents(50) == 3 and full.plus(full).packs == 4
    lines = full.summary().split("\n")
    assert lines[0] == "4 documents in 2 packs of 50, 80.0% full; at most 2 in a pack"
    assert [line.split()[0] for line in lines[1:]] == ["0", "16", "32"] and "2 documents, 25% of the tokens" in lines[1]


def test_groups():
    some = groups([3, 1], [0], [2, 4, 5])
    assert len(some) == 3 and some.lists() == [[3, 1], [0], [2, 4, 5]] and some[-1].tolist() == [2, 4, 5]
    assert some[1:].lists() == [[0], [2, 4, 5]] and some[:0].lists() == [] and some[1:2].lists() == [[0]]
    assert some.sums(np.arange(10, 16)).tolist() == [24, 10, 41]
    assert Groups.joined([some, groups([0])], [0, 6]).lists() == [*some.lists(), [6]]
    assert Groups.joined([], []).lists() == pack(np.zeros(0, int), 5, 0).lists() == []
    with pytest.raises(IndexError):
        some[3]
