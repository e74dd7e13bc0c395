# pytest tests/unit/test_benchmarks.py
"""What benchmarks read: of each other, of traces, of the results of two meshes."""

import dataclasses
import weakref

import numpy as np
import pytest
import tyro

from alst_jax.config import UserError
from alst_jax.stack.check import check_profile
from benchmarks import ladder, levels, parity, relative_errors, scaling, step

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
        assert (parsed.profile, parsed.layers) == (profile, layers)
        assert (parsed.optimizer_states, parsed.master_weights) == ("int8", "none")
    assert len(set(profiles)) == len(ladder.Options().rungs) and sum(profiles[-1].segment_layers) == layers


def test_shares_of_a_trace():
    """Two collectives of 2 and 1 s, one of them half beside a kernel; the copy is neither."""
    events = [
        ("ncclDevKernel_SendRecv(args)", 0.0, 2.0),
        ("gemm", 1.0, 4.0),
        ("ncclDevKernel_AllGather_RING_LL", 5.0, 6.0),
        ("MemcpyH2D", 4.0, 9.0),
        ("gemm", 8.0, 10.0),
        ("attention", 8.5, 9.5),
    ]
    shares = scaling.shares_of(events)
    assert shares == scaling.Shares(10.0, 5.0, 3.0, 2.0, {"all-to-all": 2.0, "all-gather": 1.0})
    idle = scaling.shares_of([])
    assert scaling.describe([shares, idle], 1) == "50.0% | 30.0% | 20.0% | all-gather 10.0%, all-to-all 20.0%"
    assert "0 of 1 GPUs" in scaling.describe([idle], 1) and "1 of 2 GPUs" in scaling.describe([shares, idle], 2)


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


@pytest.mark.parametrize(
    "devices,changes",
    [
        (1, {}),
        (2, dict(layers=1)),
        (2, dict(seq_len=4097)),
        (2, dict(seq_len=1024)),
        (4, dict(seq_len=2050, dtype="float32")),
    ],
)
def test_comparisons_that_would_say_nothing_are_refused(devices, changes):
    with pytest.raises(UserError):
        parity.check(parity.Options(**changes), devices)


def test_only_must_name_a_case():
    names = lambda *only, **changes: [case.name for case in parity.cases(parity.Options(only=only, **changes), 4)]
    with pytest.raises(UserError, match='"tensor parallel".*"one device".*"wrong positions"'):
        names("sequence parallel", "tensor parallel")
    assert names("wrong") == [parity.PLAIN, parity.CONTROL_NAME, parity.WRONG]
    assert names("data", "sequence parallel with", dtype="float32") == [
        parity.PLAIN,
        parity.UNTILED,
        parity.DATA_PARALLEL,
        parity.ALL,
    ]


def errors_of(value=1e-6, **changes):
    return dict.fromkeys(parity.PARTS, value) | changes


PLAIN = parity.Case("sequence parallel", 1, 2, None)
CONTROL = parity.Case(parity.CONTROL_NAME, 1, 1, None, rounding=True)
UNTILED = parity.Case(parity.UNTILED, 1, 1, None, rounding=True)
DATA_PARALLEL = parity.Case(parity.DATA_PARALLEL, 2, 1, None, like=parity.UNTILED)
ALL = parity.Case(parity.ALL, 1, 2, None, beside=parity.DATA_PARALLEL)
WRONG = parity.Case(parity.WRONG, 1, 2, None, wrong=True)
MEASURED = {  # benchmarks/results/2026-11-26-two-h100.md; the worst of moments 1.25 times the moments, as on a CPU
    parity.CONTROL_NAME: dict(zip(parity.PARTS, (3.5e-6, 1.4e-4, 1.9e-2, 2.4e-2, 2.0e-2, 3.3e-2), strict=True)),
    parity.UNTILED: dict(zip(parity.PARTS, (8.8e-6, 4.5e-4, 2.2e-2, 2.8e-2, 3.2e-2, 4.7e-2), strict=True)),
}


def test_verdicts():
    rounding = {parity.CONTROL_NAME: {"loss": 4e-6, "moments": 1.9e-2}}
    narrow, exact = (
        parity.limits(PLAIN, parity.PLAIN, rounding, "bfloat16"),
        parity.limits(PLAIN, parity.PLAIN, {}, "float32"),
    )
    errors = errors_of(loss=9e-6, moments=1.8e-2)
    assert parity.judge(PLAIN, errors, narrow) == "ok"
    assert parity.judge(PLAIN, errors | {"moments": 3e-2}, narrow) == "MORE THAN ALLOWED: moments"
    assert parity.judge(PLAIN, errors | {"loss": 3e-5}, narrow) == "MORE THAN ALLOWED: loss"
    assert parity.judge(PLAIN, errors_of(loss=2e-4), exact) == "MORE THAN ALLOWED: loss"
    assert parity.judge(CONTROL, errors_of(loss=2e-4), exact).startswith("MORE THAN ALLOWED: loss")
    assert parity.judge(WRONG, errors, narrow) == "NOT NOTICED"
    assert parity.judge(WRONG, errors | {"moments": 0.5}, narrow) == "ok: refused for moments"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [PLAIN, CONTROL, UNTILED, WRONG], ids=lambda case: case.name)
def test_no_case_passes_with_what_is_not_finite(case, value, dtype):
    for part in parity.PARTS:
        verdict = parity.judge(
            case,
            errors_of(0.5 if case.wrong else 0.0) | {part: value},
            parity.limits(case, parity.PLAIN, MEASURED, dtype),
        )
        assert verdict == f"NOT FINITE: {part}"


@pytest.mark.parametrize("case", [CONTROL, UNTILED], ids=lambda case: case.name)
def test_what_says_how_much_is_rounding_can_fail(case):
    """At most 6 times what was measured; and limits made of all of it refuse wrong positions, as they were measured."""
    ceilings = parity.limits(case, parity.PLAIN, {}, "bfloat16")
    for part, measured in MEASURED[case.name].items():
        assert parity.judge(case, MEASURED[case.name], ceilings) == "ok: what rounding does"
        assert 4 * measured < ceilings[part] < 6 * measured
        assert "MORE" in parity.judge(case, MEASURED[case.name] | {part: 6 * measured}, ceilings)
    wrong = dict(zip(parity.PARTS, (2.4e-4, 6.1e-3, 0.83, 1.1, 0.92, 1.1), strict=True))
    for other in (parity.PLAIN, parity.DATA_PARALLEL):
        widest = parity.limits(ALL, other, parity.CEILINGS, "bfloat16")
        assert all(error > widest[part] for part, error in wrong.items())


def test_limits_of_data_parallel_beside_sequence_parallel():
    """float32: those of each. bfloat16: those that the control makes and those that one device without tiles makes."""
    assert set(parity.limits(ALL, parity.DATA_PARALLEL, {}, "float32").values()) == {parity.EXACT}
    found = parity.limits(ALL, parity.DATA_PARALLEL, MEASURED, "bfloat16")
    assert found["loss"] == pytest.approx(2e-5 + 2e-5) and found["norm"] == pytest.approx(5e-4 + 1.5 * 4.5e-4)
    assert found["updates"] == pytest.approx(1.5 * (2.0e-2 + 3.2e-2))
    assert parity.limits(ALL, parity.PLAIN, MEASURED, "bfloat16")["updates"] == pytest.approx(1.5 * 2.0e-2)


def results(off=0.0, worst=1.0):
    """Of a run whose errors beside results() are all off, and worst times that for one of two parameters."""
    return {
        "losses": [2.0, 2.0 * (1 + off)],
        "norms": [1.0 + off, 1.0],
        **{name: [np.full(100, 1 + off, np.float64), np.full(1, 1 + off * worst)] for name in ("moments", "updates")},
    }


CHOSEN = [parity.Case(parity.PLAIN, 1, 1, None), CONTROL, UNTILED, PLAIN, DATA_PARALLEL, ALL, WRONG]


def failures(dtype, offs, chosen=CHOSEN):
    return parity.run(chosen, dtype, lambda case: results(offs.get(case.name, 0.0)))


def test_the_two_of_the_experiment_are_compared_with_each_other(capsys):
    """Each within the limit of its own reference, and not of the other."""
    assert failures("float32", {parity.DATA_PARALLEL: 7e-5, parity.ALL: 9e-5, parity.WRONG: 0.1}) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ok" and lines[-2].endswith(f"ok: refused for {', '.join(parity.PARTS)}")
    [line] = [line for line in lines if f"beside {parity.DATA_PARALLEL}" in line]
    assert "loss 2.0e-05, norm 2.0e-05, moments 2.0e-05" in line and line.endswith("ok")
    assert failures("float32", {parity.DATA_PARALLEL: -7e-5, parity.ALL: 9e-5, parity.WRONG: 0.1}) == [
        f"{parity.ALL} beside {parity.DATA_PARALLEL}"
    ]
    assert capsys.readouterr().out.splitlines()[-1] == f"FAILED: {parity.ALL} beside {parity.DATA_PARALLEL}"


@pytest.mark.parametrize("broken", [1e-3, 3.0, float("nan"), float("inf")])
def test_a_broken_control_fails_and_widens_no_limit(broken, capsys):
    """A mesh wrong by 1e-3 in its losses would pass beside a control that is wrong by as much."""
    offs = {parity.CONTROL_NAME: broken, PLAIN.name: 1e-3, parity.WRONG: 0.5}
    failed = failures("bfloat16", offs)
    assert f"{parity.CONTROL_NAME} beside {parity.PLAIN}" in failed and f"{PLAIN.name} beside {parity.PLAIN}" in failed
    assert failures("bfloat16", {parity.WRONG: 0.5}) == []
    capsys.readouterr()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [case.name for case in CHOSEN])
@pytest.mark.parametrize("part", ["losses", "norms"])
def test_a_run_without_a_number_fails(part, name, dtype, capsys):
    trained = lambda case: (
        results(0.5 if case.wrong else 0.0) | ({part: [2.0, float("nan")]} if case.name == name else {})
    )
    failed = parity.run(CHOSEN, dtype, trained)
    assert any(one.startswith(name) for one in failed) and "NOT FINITE" in capsys.readouterr().out


def test_the_last_line_says_what_was_not_asked(capsys):
    assert failures("float32", {}, [CHOSEN[0], ALL]) == []
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last.startswith("ok; NOT RUN: ") and f'"{parity.WRONG}"' in last and f'beside "{parity.DATA_PARALLEL}"' in last
    )
    assert failures("float32", {}, CHOSEN) == [f"{parity.WRONG} beside {parity.PLAIN}"]  # ran, and was not noticed
    assert "NOT RUN" not in capsys.readouterr().out


def test_results_are_kept_as_long_as_something_is_compared_with_them(capsys):
    """Two beside the one that trains: tens of GB at the real width."""
    made, counts = [], []

    def trained(case):
        counts.append(sum(array() is not None for array in made))
        result = results(0.5 if case.wrong else 0.0)
        made.append(weakref.ref(result["updates"][0]))
        return result

    parity.run(CHOSEN, "float32", trained)
    assert counts == [0, 1, 1, 2, 2, 2, 1]
    capsys.readouterr()


def test_errors_of_a_mesh():
    reference = {
        "losses": [2.0, 1.0],
        "norms": [4.0, 4.0],
        "moments": [np.ones(4), np.ones(12)],
        "updates": [np.full(4, 2.0), np.zeros(2) + 1],
    }
    assert max(relative_errors.compare(reference, reference).values()) == 0
    other = reference | {"losses": [2.0, 1.1], "moments": [np.ones(4), np.full(12, 1.5)]}
    errors = relative_errors.compare(other, reference)
    assert errors["loss"] == pytest.approx(0.1) and errors["norm"] == errors["updates"] == 0
    assert errors["moments"] == pytest.approx(0.5 * (12 / 16) ** 0.5) and errors["worst of moments"] == pytest.approx(
        0.5
    )


@pytest.mark.parametrize("part", ["losses", "norms", "moments", "updates"])
def test_runs_of_other_lengths_or_shapes_are_not_compared(part):
    whole = results()
    with pytest.raises(ValueError, match=f"{part}: 1 of .* beside 2 of"):
        relative_errors.compare(whole | {part: whole[part][:1]}, whole)
    with pytest.raises(ValueError, match=f"{part}: 2 of .* beside 1 of"):
        relative_errors.compare(whole, whole | {part: whole[part][:1]})
    with pytest.raises(ValueError, match=part):
        relative_errors.compare(whole | {part: [np.ones((3, 1)), *whole[part][1:]]}, whole)


def test_parameters_are_compared_in_pieces(monkeypatch):
    """The same errors, whatever is left over, and no temporary larger than a piece."""
    numbers = np.random.default_rng(0)
    make = lambda: results() | {"updates": [numbers.normal(size=(7, 9)), numbers.normal(size=(5,)), np.array(3.0)]}
    here, there = make(), make()
    whole = relative_errors.compare(here, there)
    largest, norm = [], np.linalg.norm
    monkeypatch.setattr(relative_errors, "PIECE", 4)
    monkeypatch.setattr(np.linalg, "norm", lambda x: largest.append(x.size) or norm(x))
    assert relative_errors.compare(here, there) == pytest.approx(whole, rel=1e-12) and max(largest) <= 4
    assert whole["updates"] == pytest.approx(
        np.sqrt(
            sum(norm(a - b) ** 2 for a, b in zip(here["updates"], there["updates"], strict=True))
            / sum(norm(b) ** 2 for b in there["updates"])
        )
    )


def test_the_ladder_of_save_levels():
    """GiB a layer at 131,072 tokens: 4096 columns, the same and 32 log-sum-exps, 6144, 28672; the first spares most."""
    cells = [row for _, row in levels.rows(levels.Options())]
    assert [row[1] for row in cells] == ["1.000", "1.016", "1.016", "1.500", "7.000"]
    in_host, on_device, qkv, gated = (float(row[3]) for row in cells[1:])
    assert on_device > in_host > 20 * qkv > 0 and qkv == gated  # the products of a column each
