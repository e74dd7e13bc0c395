"""python -m tests.faults.campaign_ranks 40 --results FILE: kill one of two processes of a run, resume, compare.

A trial starts train.py in two processes with two devices each and kills one of them: at a time of the start, or at a
call of a stage (loading, stepping, saving, committing, exporting). The other must end within 60 s with a line that
names it. Then two processes go on to the end; each loss must be that of a run that was never killed. Trials are
numbered: the number is the seed. The results file gets a line a trial; a second call goes on where the first stopped.
"""

import itertools
import pathlib
import random
import sys
import tempfile

import tyro

from tests.faults import trials
from tests.processes.ranks import Bench

WITHIN = 60.0  # seconds
# Calls of a stage, about: a later number is never reached. The first process alone commits a checkpoint.
MOST = {"loading": 15, "stepping": 8, "saving": 40, "committing": 20, "exporting": 20}
SECONDS = 8.0  # of a start, on a quiet machine


def campaign(kills: tyro.conf.Positional[int] = 40, results: pathlib.Path | None = None) -> int:
    """Add trials to the results until they hold so many kills. Exit code 1 if a run was lost or different."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        bench = Bench(pathlib.Path(folder))
        expected = bench.together("2", "2", "4")["losses"]
        numbers = itertools.count(len(trials.read(results)))
        return trials.play(
            lambda trial: one(bench, trial, expected), numbers, results, kills, lambda line: line["killed"], "good"
        )


def one(bench: Bench, trial: int, expected: list[float]) -> dict:
    """A trial."""
    rng = random.Random(trial)
    victim, stage = rng.choice((0, 1)), rng.choice(("seconds", *MOST))
    number = f"{rng.uniform(0.5, SECONDS):.2f}" if stage == "seconds" else str(rng.randint(1, MOST[stage]))
    result = bench.killed(stage, number, str(victim))
    other, killed = 1 - victim, result["codes"][victim] == -9
    line = {
        "trial": trial,
        "stage": stage,
        "number": number,
        "victim": victim,
        "killed": killed,
        "codes": result["codes"],
        "seconds": round(result["after"][other], 1),
        "resumed": result["resumed"],
    }
    # Killed before it came, a process has no number yet: the other says that it did not come, or that nobody answers.
    named = f"process {victim} of 2" in result["logs"][other] or "did not" in result["logs"][other]
    line["named"] = named
    ended = not killed or (result["codes"][other] not in (0, -9) and line["seconds"] <= WITHIN and named)
    line["good"] = ended and result["resumed"] == [0, 0] and result["losses"] == expected
    if not line["good"]:
        line["log"] = (result["logs"][other] + result["resumed_log"])[-800:]
    return line


if __name__ == "__main__":
    sys.exit(tyro.cli(campaign))
