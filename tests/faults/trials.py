"""The trials of a campaign, numbered: the number is the seed. The results file gets a line of JSON a trial; a second
call goes on where the first stopped."""

import datetime
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

Line = dict[str, Any]


def read(results: pathlib.Path | None) -> list[Line]:
    """The lines of the trials that were played before."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results and results.exists() else []


def play(
    trial: Callable[[int], Line],
    numbers: Iterable[int],
    results: pathlib.Path | None,
    wanted: int,
    kills: Callable[[Line], int],
    good: str,
    seconds: float = float("inf"),
) -> int:
    """Play trials of these numbers until the results hold so many kills, or so many seconds are over. Exit code 1 if a
    trial of this call is not good. kills: of a line; good: the name of its truth value."""
    count, failed, began = sum(map(kills, read(results))), 0, datetime.datetime.now()
    for number in numbers:
        if count >= wanted or (datetime.datetime.now() - began).total_seconds() >= seconds:
            break
        line = trial(number)
        count, failed = count + kills(line), failed + (not line[good])
        print(json.dumps(line), flush=True)
        if results:
            with results.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
    print(f"{count} kills, {failed} runs of this call lost or different")
    return 1 if failed else 0
