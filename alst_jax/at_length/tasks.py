"""Generated tasks: a text of a given length, the answer at its end. No decoding: the loss of the answer, and whether
each of its tokens has the largest logit after the ones before it (teacher-forced exact match).

needle     a sentence with a number, at a given depth of the haystack; the answer is the number
variables  VAR A = 12345, VAR B = VAR A, ..., between other such chains; the answer is the value of the last one
copy       a passage of the haystack between two marks; after the mark is repeated, the answer is the passage
words      a list of words, one far more common than the others; the answer is this word

Needle, variables and words are after RULER (arXiv 2404.06654), in the form of a text that goes on: no chat template.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from alst_jax.config import IGNORED, UserError
from alst_jax.data.pieces import Sequence

TASKS = ("needle", "variables", "copy", "words")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a needle: 0 is the beginning of the text
PARTS = (8, 4, 2, 1)  # lengths of the texts, as parts of a sequence
HOPS, CHAINS = 3, 2  # variables after the first of a chain; chains (the question asks for one of them)
COPIED = 32  # tokens of a passage at most
COMMON = 0.3  # part of the words that are the common one
OTHERS = 50  # other words
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]

Insert = tuple[float, list[int]]  # depth, tokens


@dataclasses.dataclass(frozen=True)
class Case:
    """A text with a question, int32 tokens. Its last `answer` tokens are the answer. depth: of a needle."""

    task: str
    length: int
    depth: float | None
    tokens: np.ndarray
    answer: int

    @property
    def sequence(self) -> Sequence:
        """With labels for the answer alone."""
        labels = np.full(self.tokens.size, IGNORED, np.int32)
        first = self.tokens.size - self.answer
        labels[first - 1 : -1] = self.tokens[first:]
        return Sequence(self.tokens, labels)


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes cases. begin: the tokens at the beginning of a text. haystack: tokens of a text, without special ones."""

    tokenizer: Any
    begin: list[int]
    haystack: np.ndarray

    @staticmethod
    def of(tokenizer: Any, text: np.ndarray) -> "Writer":
        """text: tokens of documents."""
        bos, first = tokenizer.bos_token_id, tokenizer("a")["input_ids"][:1]
        begin = [bos] if bos is not None and list(first) == [bos] else []
        return Writer(tokenizer, begin, text[~np.isin(text, tokenizer.all_special_ids)])

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def case(self, task: str, length: int, rng: np.random.Generator, depth: float | None = None) -> Case | None:
        """A case of `length` tokens; None if its own words would fill more than half of it."""
        write = {"needle": self._needle, "variables": self._variables, "copy": self._copy, "words": self._words}[task]
        made = write(length, rng, depth)
        if made is None:
            return None
        inserts, question, answer = made
        room = length - len(self.begin) - len(question) - len(answer) - sum(len(tokens) for _, tokens in inserts)
        if task != "words" and room * 2 < length:
            return None
        tokens = [*self.begin, *_with(self._hay(room, rng), inserts), *question, *answer]
        return Case(task, length, depth, np.asarray(tokens, np.int32), len(answer))

    def _hay(self, count: int, rng: np.random.Generator) -> list[int]:
        """`count` tokens of the haystack from a drawn place on, which begins again at its end."""
        start = int(rng.integers(self.haystack.size))
        return np.take(self.haystack, np.arange(start, start + count), mode="wrap").tolist()

    def _needle(self, length, rng, depth):
        name, number = _word(rng), str(rng.integers(10**6, 10**7))
        asked, answer = self.encode(f"\nThe special magic number for {name} is"), self.encode(f" {number}")
        return [(depth, [*asked, *answer, *self.encode(".\n")])], asked, answer

    def _variables(self, length, rng, depth):
        names = ["".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 5)) for _ in range(CHAINS * (HOPS + 1))]
        values = rng.choice(90000, CHAINS, replace=False) + 10000
        lines = []
        for chain, value in enumerate(values.tolist()):
            own = names[chain::CHAINS]
            lines.append([f"\nVAR {own[0]} = {value}\n", *(f"\nVAR {b} = VAR {a}\n" for a, b in zip(own, own[1:]))])
        inserts = [
            ((hop * CHAINS + chain + 1) / (CHAINS * (HOPS + 1) + 1), self.encode(lines[chain][hop]))
            for hop in range(HOPS + 1)
            for chain in range(CHAINS)
        ]
        return inserts, self.encode(f"\nThe value of VAR {names[-CHAINS]} is"), self.encode(f" {values[0]}")

    def _copy(self, length, rng, depth):
        mark = self.encode(f"\n<passage {rng.integers(1000, 10000)}>\n")
        count = min(COPIED, max(1, length // 16))
        drawn = (self._hay(count, rng) for _ in range(20))  # not a line of dashes
        passage = next((tokens for tokens in drawn if len(set(tokens)) * 2 > count), self._hay(count, rng))
        return [(rng.uniform(0.1, 0.5), [*mark, *passage, *self.encode("\n</passage>\n")])], mark, passage

    def _words(self, length, rng, depth):
        common, *others = list(dict.fromkeys(_word(rng) for _ in range(4 * OTHERS)))[: OTHERS + 1]
        begin = self.encode("\nA list of words:")
        question, answer = self.encode("\nThe most common word in the list is"), self.encode(f" {common}")
        room = length - len(self.begin) - len(question) - len(answer) - len(begin)
        rare = [self.encode(f" {word}") for word in others]
        listed: list[int] = []
        while len(listed) < room:
            listed += answer if rng.random() < COMMON else rare[int(rng.integers(len(rare)))]
        return None if room * 2 < length else ([(0.0, [*begin, *listed[:room]])], question, answer)


def _word(rng: np.random.Generator) -> str:
    return "".join(SYLLABLES[int(i)] for i in rng.integers(len(SYLLABLES), size=3))


def _with(hay: list[int], inserts: list[Insert]) -> list[int]:
    """The haystack with each insert at its depth."""
    out, at = [], 0
    for depth, tokens in sorted(inserts, key=lambda insert: insert[0]):
        place = round(depth * len(hay))
        out += [*hay[at:place], *tokens]
        at = place
    return out + hay[at:]


def cells(length: int) -> Iterator[tuple[str, int, float | None]]:
    """(task, length, depth) of each cell of the grid, of sequences of `length` tokens."""
    for task in TASKS:
        for part in PARTS:
            for depth in DEPTHS if task == "needle" else (None,):
                yield task, length // part, depth


def make_cases(writer: Writer, length: int, samples: int, seed: int) -> list[Case]:
    """`samples` cases for each cell: the same for the same seed, text and tokenizer. Lengths that a task's own words
    would fill are left out. UserError if that is all of them."""
    cases = []
    for number, (task, size, depth) in enumerate(cells(length)):
        for sample in range(samples):
            rng = np.random.default_rng([seed, number, sample])
            cases.append(writer.case(task, size, rng, depth))
    made = [case for case in cases if case is not None]
    missing = [task for task in TASKS if not any(case.task == task for case in made)] if samples else []
    if missing:
        raise UserError(
            f"--eval-long: {length:,} tokens (--seq-len) are too few for the task {missing[0]}: its own "
            "words would fill more than half of them; use longer sequences, or --eval-long-samples 0"
        )
    return made


@dataclasses.dataclass(frozen=True)
class Cell:
    """The mean results of the cases of one cell. loss: nats a token of the answer. exact: the part of the cases whose
    answers are right in every token."""

    task: str
    length: int
    depth: float | None
    cases: int
    loss: float
    exact: float


def judge(cases: list[Case], results: list[tuple[np.ndarray, np.ndarray]]) -> list[Cell]:
    """The cells of cases, from the losses and hits of their tokens."""
    groups: dict[tuple, list[tuple[float, bool]]] = {}
    for case, (losses, hits) in zip(cases, results, strict=True):
        answer = case.sequence.labels != IGNORED
        score = float(losses[answer].mean(dtype=np.float64)), bool(hits[answer].all())
        groups.setdefault((case.task, case.length, case.depth), []).append(score)
    mean: Callable = lambda scores, i: float(np.mean([score[i] for score in scores]))
    return [Cell(*key, len(scores), mean(scores, 0), mean(scores, 1)) for key, scores in groups.items()]
