# pytest tests/unit/test_attention_benchmark.py
"""The table of attention kernels: what it measures, how it counts, and that a failing kernel hides no other."""

import json
import sys

import pytest

from benchmarks import attention


def test_shapes_and_flops():
    assert attention.parse_shape("131072x32x8") == ([131072], 32, 8)
    assert attention.causal_flops([131072], 32) == pytest.approx(1.407e14, rel=1e-3)
    for name in ("docs-8", "docs-64"):
        lengths, *heads = attention.parse_shape(name)
        assert sum(lengths) == 131072 and heads == [32, 8]
    assert attention.causal_flops([2048] * 64, 32) == attention.causal_flops([131072], 32) / 64
    with pytest.raises(SystemExit, match="TOKENSxHEADSxKV_HEADS, or one of docs-8, docs-64"):
        attention.parse_shape("131072")


def test_documents_are_measured_with_kernels_that_serve_them():
    measured = attention.pairs(attention.Options())
    assert [name for shape, name in measured if shape == "131072x4x1"] == ["cudnn", "flash", "flash-deterministic"]
    assert [name for shape, name in measured if shape == "docs-8"] == ["cudnn", "flash", "flash-deterministic"]
    assert attention.pairs(attention.Options(kernels=("xla",), shapes=("64x2x1",))) == [("64x2x1", "xla")]


def test_a_table_with_documents_and_a_kernel_that_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(attention.DOCUMENTS, "docs-8", [40, 24])
    monkeypatch.setattr(attention, "DOCUMENT_HEADS", (2, 1))
    path = tmp_path / "table.json"
    arguments = ["--kernels", "xla", "cudnn", "--shapes", "64x2x1", "docs-8", "--repeats", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["attention", *arguments])
    attention.main()
    table = json.loads(path.read_text())
    rows = {(row["shape"], row["kernel"]): row for row in table["rows"]}
    assert set(rows) == {("64x2x1", "xla"), ("64x2x1", "cudnn"), ("docs-8", "xla"), ("docs-8", "cudnn")}
    assert rows["docs-8", "xla"]["backward_ms"] > 0 and rows["docs-8", "xla"]["error"] is None
    assert rows["64x2x1", "cudnn"]["error"].startswith("failed: ")
    assert "docs-8       xla" in capsys.readouterr().out
