# pytest tests/unit/test_buckets.py
"""Packed documents as a loop of dense calls: equal to XLA's documents, and the cost follows the documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.ops.attention import AttentionSpec, attention_backward, attention_forward, buckets
from tests import stand_in
from tests.helpers import relative_error

SPEC, LENGTH, MOST = AttentionSpec(), 144, 258
NAMES = ("o", "lse", "dq", "dk", "dv")
CASES = {  # lengths of documents in 2 x 144 tokens; none crosses a row
    "at the sizes of slices": [31, 32, 33, 48, 49, 63, 31, 1],
    "one token": [1, 142, 1, 1, 1, 142],
    "whole rows": [144, 144],
    "empty ones": [0, 0, 100, 0, 44, 143, 1, 0, 0, 0],
    "257": [1] * 144 + [2] * 31 + [1] * 82,
    "nothing behind the last": [144, 60],
}


def small_slices(patch):
    patch.setattr(buckets, "SMALLEST", 32)
    patch.setattr(buckets, "TOGETHER", 64)


def inputs(size=1.0):
    """q, k, v, do."""
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(size * jax.random.normal(key, (2, LENGTH, n, 8)) for key, n in zip(keys, (4, 2, 2, 4)))


def offsets_of(name):
    """Padded to one number of documents by empty ones: one program serves all cases."""
    ends = np.cumsum([0, *CASES[name]])
    return jnp.asarray(np.pad(ends, (0, MOST + 1 - len(ends)), mode="edge"), jnp.int32)


def both(q, k, v, do, documents, kernel):
    results = attention_forward(q, k, v, SPEC, documents, kernel=kernel)
    return *results, *attention_backward(q, k, v, results, do, SPEC, documents, kernel=kernel)


@pytest.fixture(scope="module")
def kernels():
    """Forward and backward by XLA's documents, the same by the loop over a dense kernel, and the shapes of its calls.

    The dense kernel stands for cuDNN's: its backward pass lives on o and log-sum-exp.
    """
    with pytest.MonkeyPatch.context() as patch:
        small_slices(patch)
        calls, shapes = stand_in.install(patch), jax.eval_shape(lambda: (*inputs(), offsets_of("257")))
        compiled = lambda kernel: jax.jit(functools.partial(both, kernel=kernel)).lower(*shapes).compile()
        exact, looped = compiled("xla"), compiled("cudnn")
    return exact, looped, calls


@pytest.mark.parametrize("name", CASES)
def test_dense_calls_equal_documents(kernels, name):
    """At large scores and many documents, a softmax weight from another document's log-sum-exp would overflow."""
    documents = offsets_of(name)
    inside = int(documents[-1])
    for size in (1.0, 5.0) if name == "257" else (1.0,):
        exact, looped = (run(*inputs(size), documents) for run in kernels[:2])
        for which, one, other in zip(NAMES, looped, exact, strict=True):
            flat = lambda x: np.asarray(jnp.moveaxis(x, 2, 1) if which == "lse" else x).reshape(2 * LENGTH, -1)
            assert relative_error(flat(one)[:inside], flat(other)[:inside]) < 1e-5, (which, size)
            assert not flat(one)[inside:].any(), which


def test_borders_count(kernels):
    """The negative control: other borders, other results."""
    exact, looped, _ = kernels
    for one, other in zip(looped(*inputs(), offsets_of("257")), exact(*inputs(), offsets_of("one token"))):
        assert relative_error(one, other) > 1e-2


def test_no_call_reads_the_packed_tokens_as_one(kernels, monkeypatch):
    """Traced: one shape of q for each size of slices, and one more where several run together."""
    small_slices(monkeypatch)
    expected = {(2, 32), (1, 32), (1, 48), (1, 64), (1, 96), (1, 128), (1, 144)}
    assert set(kernels[2]) == {(*shape, 4, 8) for shape in expected}


def test_sizes_of_slices(monkeypatch):
    assert all(bucket.size % 128 == 0 for bucket in buckets.buckets_of(131072, 64))
    small_slices(monkeypatch)
    assert buckets.buckets_of(200, 1000) == [(32, 2), (48, 1), (64, 1), (96, 1), (128, 1), (192, 1), (200, 1)]
    assert buckets.buckets_of(32, 1) == [(32, 1)] and buckets.buckets_of(8, 9) == [(8, 8)]


def test_cost_follows_the_documents():
    """Calls and pairs by hand."""
    lengths = [1, 512, 0, 300, 7, 9, 8, 7, 6, 513, 5, 3000, 4097, 4096]
    assert buckets.calls_of(lengths, 4200, 64) == {
        (512, 8): 1,
        (512, 1): 1,
        (768, 1): 1,
        (3072, 1): 1,
        (4096, 1): 1,
        (4200, 1): 1,
    }
    assert buckets.calls_of([600] * 13, 4200, 64) == {(768, 5): 2, (768, 1): 3}
    assert buckets.computed_pairs([512, 1], 1024) == 2 * 512 * 513 // 2
    assert buckets.computed_pairs([513, 500, 11], 1024) == 2 * 512 * 513 // 2 + 768 * 769 // 2
    mixed, length = [40000, 30000, 20000, 15000, 10000, 8000, 5000, 3072], 131072
    sizes = [49152, 32768, 24576, 16384, 12288, 8192, 6144, 3072]
    assert buckets.computed_pairs(mixed, length) == sum(n * (n + 1) // 2 for n in sizes)
    useful, full = sum(n * (n + 1) // 2 for n in mixed), length * (length + 1) // 2
    assert 1.39 < buckets.computed_pairs(mixed, length) / useful < 1.40
    assert buckets.computed_pairs(mixed, length) < 0.27 * full
    assert buckets.computed_pairs([2048] * 64, length) == 64 * 2048 * 2049 // 2
    for n in range(512, length, 997):  # compiled for so many documents that small slices run together
        pairs = sum(count * call.pairs for call, count in buckets.calls_of([n], length, 64).items())
        assert pairs == buckets.computed_pairs([n], length) <= 2.25 * n * (n + 1) // 2
