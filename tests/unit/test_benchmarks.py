# pytest tests/unit/test_benchmarks.py
"""What benchmarks read: of each other, of traces, of the results of two meshes."""

import dataclasses

import numpy as np
import pytest
import tyro

from alst_jax.config import UserError
from alst_jax.step import check_profile
from benchmarks import ladder, parity, scaling, step

PRINTED = """compiled in 18 s; GiB planned: device temp 45.34 + arguments 0.00 + outputs 0.00 = 45.34
step 1: loss 12.5735 after 42.591 s
step 1: loss 12.5735 norm 0.518  42.591 + 2.049 s  2,936 tok/s  MFU 44.0%  forward+backward alone 3,077 tok/s  \
device peak 45.34 GiB  host peak 90.4 GiB  GPU busy 96%  1577 MHz  654 W
"""


def test_the_ladder_reads_what_a_step_prints(monkeypatch):
    assert ladder.cells_of(PRINTED) == "2,936 | 44.64 | 45.34 | 90.4"
    assert ladder.cells_of("step 1: loss 12.5735 after 42.591 s") is None
    monkeypatch.setattr(ladder.sys, "executable", "false")
    assert ladder.measured(ladder.profiles(8)[0][1], ladder.Options()).startswith("failed")


@pytest.mark.parametrize("layers", [8, 32])
def test_a_rung_reaches_the_step_as_it_is(layers, monkeypatch):
    commands = []
    run = lambda command, **_: commands.append(command) or dataclasses.make_dataclass("Done", ["stdout"])(PRINTED)
    monkeypatch.setattr(ladder.subprocess, "run", run)
    profiles = [profile for _, profile in ladder.profiles(layers)]
    for profile in profiles:
        ladder.measured(profile, ladder.Options(layers=layers))
        parsed = tyro.cli(step.Options, args=commands[-1][3:])
        assert (parsed.profile, parsed.layers, parsed.states, parsed.master) == (profile, layers, "int8", "none")
    assert len(set(profiles)) == len(ladder.Options().rungs) and sum(profiles[-1].segment_layers) == layers


def test_shares_of_a_trace():
    """Two collectives of 2 and 1 s, one of them half beside a kernel; the copy is neither."""
    events = [("ncclDevKernel_SendRecv(args)", 0.0, 2.0), ("gemm", 1.0, 4.0), ("ncclDevKernel_AllGather_RING_LL", 5.0, 6.0),
              ("MemcpyH2D", 4.0, 9.0), ("gemm", 8.0, 10.0), ("attention", 8.5, 9.5)]
    shares = scaling.shares_of(events)
    assert shares == scaling.Shares(10.0, 5.0, 3.0, 2.0, {"all-to-all": 2.0, "all-gather": 1.0})
    assert scaling.describe([shares]) == "50.0% | 30.0% | 20.0% | all-gather 10.0%, all-to-all 20.0%"
    assert "no GPU" in scaling.describe([])


def test_flags_of_the_compiler():
    assert scaling.compiler_option("xla_a=true") == {"xla_a": True}
    assert scaling.compiler_option("xla_b=3") == {"xla_b": 3}
    with pytest.raises(SystemExit, match="name=value"):
        scaling.compiler_option("xla_c")


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_meshes_that_are_compared_use_all_devices(devices):
    options = parity.Options()
    parity.check(options, devices)
    cases = parity.cases(options, devices)
    for case in cases:
        assert case.dp * case.sp == (1 if "one device" in case.name else devices)
        check_profile(case.profile, parity.narrowed(options), case.sp)
    assert {case.sp for case in cases} == {n for n in (1, 2, 4, 8) if n <= devices}


@pytest.mark.parametrize("devices,changes", [
    (1, {}), (2, dict(layers=1)), (2, dict(seq_len=4097)), (2, dict(seq_len=1024)), (4, dict(seq_len=2050, dtype="float32"))])
def test_comparisons_that_would_say_nothing_are_refused(devices, changes):
    with pytest.raises(UserError):
        parity.check(parity.Options(**changes), devices)


def test_verdicts():
    plain, control = parity.Case("sequence parallel", 1, 2, None), parity.Case(parity.CONTROL_NAME, 1, 1, None, rounding=True)
    wrong = parity.Case("wrong positions", 1, 2, None, wrong=True)
    errors, rounding = {"loss": 9e-6, "moments": 1.8e-2}, {"loss": 4e-6, "moments": 1.9e-2}
    assert parity.judge(plain, errors, rounding, "bfloat16") == "ok"
    assert parity.judge(plain, errors | {"moments": 3e-2}, rounding, "bfloat16") == "MORE THAN ALLOWED: moments"
    assert parity.judge(plain, errors | {"loss": 3e-5}, rounding, "bfloat16") == "MORE THAN ALLOWED: loss"
    assert parity.judge(plain, {"loss": float("nan")}, rounding, "bfloat16") == "MORE THAN ALLOWED: loss"
    assert parity.judge(plain, {"loss": 2e-4}, {}, "float32") == "MORE THAN ALLOWED: loss"
    assert parity.judge(control, {"loss": 2e-4}, {}, "float32") == "MORE THAN ALLOWED: loss"
    assert parity.judge(control, errors, errors, "bfloat16") == "ok: what rounding does"
    assert parity.judge(wrong, errors, rounding, "bfloat16") == "NOT NOTICED"
    assert parity.judge(wrong, errors | {"moments": 0.5}, rounding, "bfloat16") == "ok: refused for moments"


def results(off=0.0, worst=1.0):
    """Of a run whose errors beside results() are all off, and worst times that for one of two parameters."""
    return {"losses": [2.0, 2.0 * (1 + off)], "norms": [1.0 + off, 1.0],
            **{name: [np.full(100, 1 + off, np.float64), np.full(1, 1 + off * worst)] for name in ("moments", "updates")}}


def test_errors_of_a_mesh():
    reference = {"losses": [2.0, 1.0], "norms": [4.0, 4.0], "moments": [np.ones(4), np.ones(12)],
                 "updates": [np.full(4, 2.0), np.zeros(2) + 1]}
    assert max(parity.compare(reference, reference).values()) == 0
    other = reference | {"losses": [2.0, 1.1], "moments": [np.ones(4), np.full(12, 1.5)]}
    errors = parity.compare(other, reference)
    assert errors["loss"] == pytest.approx(0.1) and errors["norm"] == errors["updates"] == 0
    assert errors["moments"] == pytest.approx(0.5 * (12 / 16) ** 0.5) and errors["worst of moments"] == pytest.approx(0.5)


@pytest.mark.parametrize("part", ["losses", "norms", "moments", "updates"])
def test_runs_of_other_lengths_or_shapes_are_not_compared(part):
    whole = results()
    with pytest.raises(ValueError, match=f"{part}: 1 of .* beside 2 of"):
        parity.compare(whole | {part: whole[part][:1]}, whole)
    with pytest.raises(ValueError, match=f"{part}: 2 of .* beside 1 of"):
        parity.compare(whole, whole | {part: whole[part][:1]})
    with pytest.raises(ValueError, match=part):
        parity.compare(whole | {part: [np.ones((3, 1)), *whole[part][1:]]}, whole)


def test_parameters_are_compared_in_pieces(monkeypatch):
    """The same errors, whatever is left over, and no temporary larger than a piece."""
    numbers = np.random.default_rng(0)
    make = lambda: results() | {"updates": [numbers.normal(size=(7, 9)), numbers.normal(size=(5,)), np.array(3.0)]}
    here, there = make(), make()
    whole = parity.compare(here, there)
    largest, norm = [], np.linalg.norm
    monkeypatch.setattr(parity, "PIECE", 4)
    monkeypatch.setattr(np.linalg, "norm", lambda x: largest.append(x.size) or norm(x))
    assert parity.compare(here, there) == pytest.approx(whole, rel=1e-12) and max(largest) <= 4
    assert whole["updates"] == pytest.approx(
        np.sqrt(sum(norm(a - b) ** 2 for a, b in zip(here["updates"], there["updates"], strict=True))
                / sum(norm(b) ** 2 for b in there["updates"])))
