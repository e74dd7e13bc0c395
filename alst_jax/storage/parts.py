"""The parts of a save. Saving, restoring, `--explain-run` and `convert.verify` all read this table.

    DIR/checkpoints/STEP/params/         arrays: all weights, frozen ones too; with adapters the trained ones alone
                         optimizer/      arrays: moments, master weights, the count of updates; not in a conversion
                         loop/           JSON: the fields of `Loop`
                         about.json      versions, git revision, flags, devices, plan, kernels (about.py)
                         checksums.json  of each file of the step, of run.json and of model/ (checksums.py)

Random numbers have no stored state: they follow from the seed, the count of updates and the position in the data.
The watch's usual values are not saved: a resumed run learns them from its first steps.
"""

import dataclasses
import pathlib
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Part:
    """A directory or file of a step. needed: a checkpoint without it is damaged."""

    name: str
    kind: Literal["arrays", "json", "file"]
    holds: str
    needed: bool = False


PARAMS = Part("params", "arrays", "weights", needed=True)
OPTIMIZER = Part("optimizer", "arrays", "moments, master weights, count of updates")
LOOP = Part("loop", "json", "step, position in the data, seed, settings", needed=True)
ABOUT = Part("about.json", "file", "versions, flags, devices, plan")
CHECKSUMS = Part("checksums.json", "file", "checksums of all files")
PARTS = (PARAMS, OPTIMIZER, LOOP, ABOUT, CHECKSUMS)
CHECKED = {"checksums": True}  # in `loop`: without its checksums the checkpoint is damaged
# Written by orbax after the checksums, or changed then. They hold times, and no number of the run.
LATE = ("commit_success.txt", "_CHECKPOINT_METADATA")


@dataclasses.dataclass(frozen=True)
class Loop:
    """The JSON part of a training run's checkpoint. data: the state of its batches. geometry: the settings that a
    resumed run must share."""

    step: int
    data: dict[str, Any]
    seed: int
    geometry: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Fields of `Loop` without which no run can go on -> their types.
RESUMED = {"step": int, "data": dict, "geometry": dict}


def lacking(loop: dict[str, Any]) -> list[str]:
    """The fields that a run needs and the JSON part of a checkpoint does not have."""
    return [name for name, kind in RESUMED.items() if not isinstance(loop.get(name), kind)]


def missing(folder: pathlib.Path) -> list[str]:
    """Needed parts that are not in a step's folder."""
    return [part.name for part in PARTS if part.needed and not (folder / part.name).is_dir()]


def present(folder: pathlib.Path) -> list[Part]:
    """The parts in a step's folder."""
    return [part for part in PARTS if (folder / part.name).exists()]
