# pytest tests/unit/test_benchmarks.py
"""What benchmarks read of each other."""

import dataclasses

import pytest
import tyro

from benchmarks import ladder, step

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
