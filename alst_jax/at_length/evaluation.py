"""The evaluation at length: the sequences that a run reads for it, and the meaning of their losses.

All sequences (held-out text, the short contexts of LongPPL, generated cases) are packed as documents into the shape
of a training batch. So one program, with the run's own profile, computes all losses.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from alst_jax.at_length import longppl, tasks
from alst_jax.at_length.longppl import LongPpl, Window
from alst_jax.at_length.pictures import draw
from alst_jax.at_length.positions import Band, bands, curve, doublings
from alst_jax.at_length.words import table
from alst_jax.config import UserError
from alst_jax.data.batches import evaluation_batches
from alst_jax.data.packing import Groups, Packs, pack, room_for
from alst_jax.data.pieces import Sequence
from alst_jax.processes.hang import Turns
from alst_jax.processes.link import link
from alst_jax.step import TrainStep
from alst_jax.trainer import TrainState

FOLDER = "long"  # of the run directory

Losses = tuple[np.ndarray, np.ndarray]  # float32[n], bool[n]: of each label its loss, and whether it is the likeliest


@dataclasses.dataclass(frozen=True)
class Shape:
    """The batches of a run: sequences on all replicas, their padded length, replicas, the token of padding.

    alike: documents of one batch must have one length (a rotary embedding that depends on it).
    """

    rows: int
    length: int
    dp: int
    pad: int
    alike: bool = False


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences in packs. groups: of their numbers; batches of `shape.rows` packs lie one behind the other."""

    sequences: list[Sequence]
    groups: list[list[int]]
    shape: Shape

    @staticmethod
    def of(sequences: list[Sequence], shape: Shape) -> "Packed":
        """Best fit; where documents must be alike, a batch holds documents of one length."""
        sizes = np.asarray([sequence.tokens.size for sequence in sequences])
        groups: list[list[int]] = []
        for size in np.unique(sizes)[::-1] if shape.alike else (None,):
            members = np.flatnonzero(sizes == size) if shape.alike else np.arange(sizes.size)
            groups += [members[group].tolist() for group in pack(sizes[members], shape.length, 0)]
            groups += [[] for _ in range(-len(groups) % shape.rows)]
        return Packed(sequences, groups, shape)

    @property
    def most(self) -> int:
        """The most documents of a replica that the program is compiled for; the padding of a pack counts as one."""
        return room_for(max(map(len, self.groups)) + 1, self.shape.rows // self.shape.dp)

    def losses(self, step: TrainStep, state: TrainState) -> list[Losses]:
        """Of each sequence, in the order in which they were given."""
        found: dict[int, Losses] = {}
        ends = np.cumsum([len(group) for group in self.groups])
        order = np.concatenate([np.asarray(group, np.int64) for group in self.groups])
        rows, shape = _Rows(Packs(self.sequences, Groups(order, ends)), self.groups), self.shape
        batches = evaluation_batches(rows, shape.length, shape.rows, shape.pad, (shape.dp, self.most))
        turns = Turns("a batch of --eval-long")
        for first, batch in enumerate(batches):
            with turns.one():
                results = step.token_losses(state.trained, state.frozen, step.put_batch(**batch))
                losses, hits = np.asarray(results.losses), np.asarray(results.hits)
            for row, group in enumerate(self.groups[first * shape.rows :][: shape.rows]):
                at = 0
                for number in group:
                    size = self.sequences[number].tokens.size
                    found[number] = losses[row, at : at + size], hits[row, at : at + size]
                    at += size
        return [found[number] for number in range(len(self.sequences))]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The packs as sequences; an empty one has no token."""

    packs: Packs
    groups: list[list[int]]

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray([self[index].tokens.size for index in range(len(self))], np.int64)

    def __getitem__(self, index: int) -> Sequence:
        empty = np.zeros(0, np.int32)
        return self.packs[index] if self.groups[index] else Sequence(empty, empty)


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of one evaluation. fingerprint: of the texts and cases that it read."""

    step: int
    seconds: float
    bands: list[Band]
    curve: list[Band]
    long_ppl: LongPpl | None
    cells: list[tasks.Cell]
    fingerprint: str = ""

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl and TensorBoard."""
        values = {f"long_loss/{band.name}": band.loss for band in self.bands if band.loss is not None}
        if self.long_ppl is not None:
            values |= {"long_ppl": self.long_ppl.value, "long_key_tokens": self.long_ppl.keys}
        for task in dict.fromkeys(cell.task for cell in self.cells):
            own = [cell for cell in self.cells if cell.task == task]
            values[f"long_{task}_loss"] = float(np.mean([cell.loss for cell in own]))
            values[f"long_{task}_exact"] = float(np.mean([cell.exact for cell in own]))
        return values | {"long_seconds": self.seconds}

    def as_json(self) -> dict[str, Any]:
        found = self.long_ppl
        long_ppl = found and {
            "long_ppl": found.value,
            "keys": found.keys,
            "perplexity": found.usual,
            "judged": found.judged,
        }
        return {
            "step": self.step,
            "seconds": self.seconds,
            "fingerprint": self.fingerprint,
            "bands": [band._asdict() for band in self.bands],
            "curve": [band._asdict() for band in self.curve],
            "long_ppl": long_ppl,
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of a run. texts: sequences of held-out text, all of one length; context: LongPPL's short one."""

    texts: list[Sequence]
    windows: list[Window]
    cases: list[tasks.Case]
    context: int
    packed: Packed
    out: pathlib.Path

    @staticmethod
    def of(
        texts: list[Sequence], cases: list[tasks.Case], context: int, shape: Shape, out: pathlib.Path
    ) -> "Evaluation":
        windows = longppl.windows(texts[0].tokens.size, context)
        short = [longppl.cut(text, window) for text in texts for window in windows]
        packed = Packed.of([*texts, *short, *(case.sequence for case in cases)], shape)
        return Evaluation(texts, windows, cases, context, packed, out)

    def summary(self) -> str:
        """The texts, windows and cases, and the sequences of the run's length that they fill."""
        short_contexts = len(self.windows) * len(self.texts)
        return (
            f"{len(self.texts)} texts of {self.texts[0].tokens.size:,} tokens, {short_contexts:,} short contexts "
            f"of LongPPL, {len(self.cases)} generated cases: {len(self.packed.groups)} sequences an evaluation"
        )

    @property
    def fingerprint(self) -> str:
        """Of the short context and all sequences. Two evaluations may be compared if it is the same."""
        found = hashlib.sha256(str(self.context).encode())
        for sequence in (*self.texts, *(case.sequence for case in self.cases)):
            found.update(str(sequence.tokens.size).encode())
            found.update(np.ascontiguousarray(sequence.tokens).tobytes())
            found.update(np.ascontiguousarray(sequence.labels).tobytes())
        return found.hexdigest()[:16]

    def __call__(self, step: TrainStep, state: TrainState, say: Callable[[str], None]) -> dict[str, float]:
        """Judge the model: say a table, write OUT/long/step-N.json and the pictures. Returns the metrics.

        The table also has the results of the run's first evaluation of the same texts and cases.
        """
        results = self.judge(step, state)
        if not link().first:  # all have computed it; process 0 writes and says it
            return results.metrics()
        folder = self.out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        earlier = [json.loads(file.read_text()) for file in sorted(folder.glob("step-*.json"))]
        earlier = [one for one in earlier if one["step"] < results.step]
        before = next((one for one in earlier if one.get("fingerprint") == results.fingerprint), None)
        if earlier and before is None:
            say("long    the texts or tasks of --eval-long changed: the results are not compared with earlier ones")
        partial = folder / ".partial"
        partial.write_text(json.dumps(results.as_json(), indent=1))
        partial.replace(folder / f"step-{results.step:08d}.json")
        draw(folder, results.as_json(), before)
        say(table(results.as_json(), before, self.context))
        return results.metrics()

    def judge(self, step: TrainStep, state: TrainState) -> Results:
        """Compute all losses and the results that follow from them."""
        started = time.perf_counter()
        found = self.packed.losses(step, state)
        count, per_text = len(self.texts), len(self.windows)
        losses, labels = [loss for loss, _ in found[:count]], [text.labels for text in self.texts]
        length, long_ppl = self.texts[0].tokens.size, None
        for number, (long, label) in enumerate(zip(losses, labels)) if self.windows else ():
            of_windows = [loss for loss, _ in found[count + number * per_text :][:per_text]]
            short = longppl.short_losses(length, list(zip(self.windows, of_windows)))
            long_ppl = LongPpl.of(long, short, label).plus(long_ppl or LongPpl())
        cells = tasks.judge(self.cases, found[count + count * per_text :])
        return Results(
            state.step,
            time.perf_counter() - started,
            bands(losses, labels, doublings(length)),
            curve(losses, labels, length),
            long_ppl,
            cells,
            self.fingerprint,
        )


def choose_texts(pieces: Any, length: int, count: int, flag: str, longest: int) -> list[Sequence]:
    """`count` sequences of `length` tokens, chosen evenly among all of this length; fewer if the data have fewer.

    longest: the tokens of the longest document. UserError if no document is long enough.
    """
    whole = np.flatnonzero(pieces.lengths == length)
    if not whole.size:
        raise UserError(
            f"{flag}: its longest document has {longest:,} tokens, and a loss at {length:,} (--seq-len) "
            "needs a document as long; use longer documents or a shorter --seq-len"
        )
    return [pieces[int(i)] for i in whole[np.unique(np.linspace(0, whole.size - 1, count).round().astype(int))]]
