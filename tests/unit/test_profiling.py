# pytest tests/unit/test_profiling.py
"""Traces of steps: every named scope of the code is in them, and the table adds up."""

import jax
import jax.numpy as jnp
import pytest

from alst_jax import profiling
from alst_jax.config import UserError, parse_steps
from alst_jax.optim.adamw import AdamW
from alst_jax.profile import Profile
from alst_jax.profiling import StepProfile
from alst_jax.trainer import TrainState, optimizer_step
from alst_jax.xla import host, scopes
from tests.helpers import initial, make_step, random_batch, tiny

# A CPU has one memory: its compiler removes copies to host memory and back.
COPIES = {scopes.TO_DEVICE, scopes.TO_HOST}


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(the trace's directory, what was printed) of step 2 of 3, on two devices."""
    step = make_step(tiny(num_layers=2), 1, 2, Profile(loss_tile=None, mlp_tile=None), AdamW())
    state = TrainState.begin(step, initial(step))
    batch = {name: array[None] for name, array in random_batch(rows=1, length=128).items()}
    directory, lines = tmp_path_factory.mktemp("run"), []
    profile = StepProfile.of("2", directory)
    for number in (1, 2, 3):
        with profile.step(number, lines.append):
            state, _ = optimizer_step(step, state, batch, 1e-3)
    profile.close(lines.append)
    return directory / "profile", lines


def test_the_trace_contains_every_named_scope(traced):
    seconds = profiling.read(profiling.newest(traced[0]))
    assert set(scopes.SCOPES) - COPIES <= set(seconds)
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds[scope] for scope in scopes.SCOPES if scope in seconds) > 0.5 * sum(seconds.values())


@pytest.mark.parametrize("copy,scope", [(host.to_device, scopes.TO_DEVICE), (host.to_host, scopes.TO_HOST)])
def test_copies_are_named(copy, scope):
    (eqn,) = jax.make_jaxpr(copy)(jnp.ones(3)).eqns
    assert str(eqn.source_info.name_stack) == scope


def test_the_table_is_printed_once_and_is_of_one_step(traced):
    _, (table,) = traced
    head, *rows, where = table.splitlines()
    assert head.endswith("in 1 steps") and where == f"the trace is in {traced[0]}"
    shares = [float(row[30:38].strip().rstrip("%")) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(rows)) and shares == sorted(shares, reverse=True)


def test_a_run_without_such_a_step_is_warned_of(tmp_path):
    said = []
    for flag, traced in (("5:6", 0), ("5:6", 2), (None, 0)):
        profile = StepProfile.of(flag, tmp_path)
        profile.traced = traced
        profile.done(flag, said.append)
    assert said == ["warning: --profile-steps 5:6: the run made no such step"]


@pytest.mark.parametrize(
    "path,scope",
    [
        ("jit(f)/jvp(layer/mlp)/while/body/dot_general", "layer/mlp"),
        ("jit(f)/transpose(jvp(loss))/exp", "loss"),
        ("jit(f)/layer/attention/all_to_all/all_to_all", "all_to_all"),
        ("jit(f)/lossless/exp", "no scope"),
        ("", "no scope"),
    ],
)
def test_scopes_are_the_innermost(path, scope):
    assert profiling.scope_of(path) == scope


@pytest.mark.parametrize(
    "spans,gaps",
    [([], 0), ([(3, 5)], 0), ([(0, 2), (1, 3), (5, 6), (6, 7), (9, 10)], 4), ([(4, 5), (0, 9), (1, 2)], 0)],
)
def test_idle_time_is_that_of_the_gaps(spans, gaps):
    assert profiling.idle(spans) == gaps


def test_a_trace_without_operations_has_no_rows(tmp_path):
    """As where a GPU's events may not be read. The run goes on."""
    (tmp_path / "empty.xplane.pb").write_bytes(b"")
    assert profiling.read(profiling.newest(tmp_path)) == {}


def test_table_by_hand():
    rows = profiling.table({"loss": 0.006, "no scope": 0.002}, 2).splitlines()
    assert rows[1].split()[:3] == ["loss", "3.00", "75.0%"] and rows[2].split() == ["no", "scope", "1.00", "25.0%"]


def test_steps():
    assert parse_steps("3:5") == (3, 5) and parse_steps("4") == (4, 4)
    for wrong in ("5:3", "0:2", "a", "3:", "-1"):
        with pytest.raises(UserError, match="--profile-steps"):
            parse_steps(wrong)
