"""`--check-numerics`: every check at the run's own shapes and devices, and the table of their errors and limits."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from alst_jax.config import UserError
from alst_jax.planning.job import Job
from alst_jax.preflight.attention import check_attention
from alst_jax.preflight.collectives import check_collectives
from alst_jax.preflight.ends import check_batch, check_data, check_ends, check_rope
from alst_jax.preflight.limits import Row
from alst_jax.preflight.subject import Subject
from alst_jax.preflight.tokenwise import check_tokenwise
from alst_jax.preflight.update import check_in_backward, check_update
from alst_jax.preflight.whole import check_short, check_tiles
from alst_jax.step import TrainStep

Say = Callable[[str], None]


def check_numerics(
    step: TrainStep, job: Job, multiple: int, first_batch: dict[str, np.ndarray] | None, seq_len: int, say: Say = print
) -> list[Row]:
    """Run all checks and print a line for each. UserError if one fails.

    multiple: of tokens, that a sequence must have. first_batch: arrays [accumulation, B, S] of the run's own data;
    None: their labels are not checked.
    """
    started, rows = time.perf_counter(), []
    say(
        f"checks  at {job.length:,} tokens, dp {job.dp} x sp {job.sp}, {job.profile.compute_dtype}, attention "
        f"{job.profile.attention if isinstance(job.profile.attention, str) else job.profile.attention.name}"
    )
    say(f"{'':5}{'error':>9}{'limit':>10}  check: reason of the limit")
    for row in run_checks(Subject(step, job.rows, job.length, job.documents), multiple, first_batch, seq_len):
        rows.append(row)
        say(f"{'ok' if row.passed else 'FAIL':5}{row.error:9.1e}{row.limit:10.1e}  {row.name}: {row.reason}")
    seconds, failed = time.perf_counter() - started, [row for row in rows if not row.passed]
    if failed:
        found = "; ".join(f"{row.name} is off by {row.error:.1e}, allowed {row.limit:.1e}" for row in failed)
        raise UserError(
            f"--check-numerics: {len(failed)} of {len(rows)} checks failed, so that the run does not start:"
            f" {found}. {advice(failed)}"
        )
    say(f"checks  {len(rows)} of {len(rows)} passed in {seconds:.0f} s")
    return rows


def run_checks(
    subject: Subject, multiple: int, first_batch: dict[str, np.ndarray] | None, seq_len: int
) -> Iterator[Row]:
    """Row by row."""
    checks: list[Callable[[], list[Row]]] = [
        lambda: [] if first_batch is None else check_data(first_batch, seq_len),
        *(
            lambda check=check: check(subject)
            for check in (check_batch, check_rope, check_collectives, check_attention, check_tokenwise, check_ends)
        ),
        lambda: check_short(subject, multiple),
        lambda: _without_copies(subject, check_tiles),
        lambda: check_in_backward(subject),
        lambda: check_update(subject),
    ]
    for check in checks:
        yield from check()


def _without_copies(subject: Subject, check: Callable[[Subject], list[Row]]) -> list[Row]:
    """Frees the float32 copy of the weights before a step at the run's length."""
    subject.__dict__.pop("weights", None)
    return check(subject)


def advice(failed: list[Row]) -> str:
    """The flags that avoid the part that failed."""
    found: dict[str, Any] = {
        "attention": "another --attention kernel or more --head-chunks",
        "rope": "a shorter --seq-len",
        "all-to-all": "--sp 1",
        "gather": "another jax or driver",
        "reduce-scatter": "--reduce-dtype float32",
        "batch": "a report to the project",
        "labels": "--show-samples, to see what is learned",
        "sums": "--reduce-dtype float32 or another --mlp-tile",
        "update": "--optimizer-states float32 --master-weights float32",
    }
    words = dict.fromkeys(word for row in failed for start, word in found.items() if row.name.startswith(start))
    words = ", ".join(words) or "other tiles (--loss-tile, --mlp-tile) or --head-chunks"
    return f"Try {words}; docs/preflight.md says what each line means"
