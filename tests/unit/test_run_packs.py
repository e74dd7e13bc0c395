# pytest tests/unit/test_run_packs.py
"""What a plan and the metrics know of packs: padding, and the parts of attention, by hand."""

import dataclasses

import numpy as np
import pytest

from alst_jax import metrics, run_packs
from alst_jax.config import TrainConfig
from alst_jax.data.batches import pad_sequence
from alst_jax.data.documents import Cutting, Sequence, Stats, cut
from alst_jax.data.packing import Fullness, Groups
from alst_jax.data.pieces import Tokenised
from alst_jax.data.report import SourceReport
from alst_jax.models.config import TINY_LLAMA
from alst_jax.models.sizes import needed_flops
from alst_jax.planning.estimate import estimate
from alst_jax.planning.job import Job
from alst_jax.profile import Profile

LENGTHS = np.array([600, 100, 200, 1000])  # in packs of 1,024: 600 + 100 + 200 (124 left) and 1,000 (24 left)
PAIRS = lambda *lengths: TINY_LLAMA.num_layers * sum(n * n / 2 for n in lengths)


def packs(packing):
    groups = Groups(np.arange(4), np.array([3, 4]))
    return Stats(fullness=Fullness.of(1024, LENGTHS, groups), packing=packing)


def job_of(packing, **profile):
    return run_packs.with_packs(Job(TINY_LLAMA, Profile(**profile), 1, 1024), packs(packing))


def flops(*lengths):
    return sum(needed_flops(TINY_LLAMA, None, n) for n in lengths)


def test_the_model_counts_pairs_as_this_page_does():
    assert TINY_LLAMA.causal_pairs(1024) == PAIRS(1024)


def test_a_plan_counts_documents_and_not_their_padding():
    job = job_of((1, 8))
    assert job.documents == 8
    assert job.padding == pytest.approx((124 + 24) / 2048)
    assert job.attention_share == pytest.approx(PAIRS(600, 100, 200, 1000, 124, 24) / PAIRS(1024, 1024))
    assert job.padding_share == pytest.approx(PAIRS(124, 24) / PAIRS(1024, 1024))
    assert job.flops == pytest.approx(flops(*LENGTHS) / 2)  # one of two packs a step
    assert estimate(job).tokens == job.step_tokens == 950
    assert dataclasses.replace(job, grad_accum=4).step_tokens == 3800


def test_a_plan_of_packs_that_are_one_text():
    job = job_of((1, None))
    assert job.documents == 0 and job.attention_share == 1
    assert job.flops == pytest.approx(flops(900, 1000) / 2) and job.step_tokens == 950
    alone = Job(TINY_LLAMA, Profile(), 1, 1024)
    assert run_packs.with_packs(alone, Stats()) == alone and alone.flops == flops(1024) and alone.step_tokens == 1024


@pytest.mark.parametrize("packing", ["documents", "across"])
def test_metrics_count_documents_and_not_their_padding(packing, monkeypatch):
    class Mesh:
        devices, size = np.array([type("Device", (), {"device_kind": "made up"})]), 1

    step = type("Step", (), {"model": TINY_LLAMA, "freeze": None, "mesh": Mesh})
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e9)
    batch = {"tokens": np.zeros((2, 1024), np.int32)}
    if packing == "documents":
        batch["documents"] = np.array([[0, 600, 700, 900, 1024, 2024, 2048, 2048]])
    values = metrics.speed(step, [batch], [np.array([124, 24])], 2.0)
    assert values["tokens"] == 1900 and values["padding"] == 148 and values["tokens_per_second"] == 950
    expected = flops(*LENGTHS) if packing == "documents" else flops(900, 1000)
    assert values["mfu"] == pytest.approx(expected / 2e9)


def test_positions_of_packed_documents_start_at_0():
    tokens = np.arange(7, dtype=np.int32)
    row = pad_sequence(Sequence(tokens, tokens, lengths=(3, 1, 3)), 10, 0, most=6)
    assert row["positions"].tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 0, 0] and row["lengths"].tolist() == [3, 1, 3, 3, 0, 0]
    assert pad_sequence(Sequence(tokens, tokens), 10, 0)["positions"].tolist() == list(range(10))


def test_slices_that_cost_much_are_said(capsys):
    """Slices of 512 for 100, 200 and the padding of both packs, of 768 for 600, of 1,024 for 1,000."""
    job_of((1, 8), attention="cudnn")
    share = (4 * 512 * 513 + 768 * 769 + 1024 * 1025) / (2 * 1024 * 1025)
    line = capsys.readouterr().err
    assert f"{share:.0%} of the attention of whole sequences" in line and "--attention flash" in line
    job_of((1, 8), attention="flash")
    long = Stats(fullness=Fullness.of(65536, np.full(32, 2048), Groups(np.arange(32), np.array([32]))), packing=(1, 32))
    run_packs.with_packs(Job(TINY_LLAMA, Profile(attention="cudnn"), 1, 65536), long)
    assert not capsys.readouterr().err


def test_packing_of_a_run():
    job = Job(TINY_LLAMA, Profile(), 2, 1024)
    of = lambda **flags: run_packs.packing_of(TrainConfig(seq_len=1024, **flags), packs(None), job)
    assert of(pack=True) == (1, 8) and of(pack=True, pack_attention="across") == (1, None) and of() is None


def test_documents_of_no_token_are_counted():
    report = SourceReport("made up")
    source = Tokenised(np.arange(5, dtype=np.int32), np.ones(5, bool), np.array([3, 0, 2]), [])
    pieces, stats = cut(source, Cutting(None, 4, 10), report)
    assert [piece.tokens.tolist() for piece in pieces] == [[0, 1, 2], [3, 4]] and stats.documents == 3
    assert "; pieces left out: 1 of no token" in next(report.lines())
