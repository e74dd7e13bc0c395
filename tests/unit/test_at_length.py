# pytest tests/unit/test_at_length.py
"""The evaluation at length by hand: windows and key tokens of LongPPL, each generated task, loss by position,
pictures."""

import collections
import dataclasses
import math
import pathlib
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from alst_jax.at_length import longppl, pictures, tasks, words
from alst_jax.at_length.costs import documents
from alst_jax.at_length.evaluation import Evaluation, Packed, Results, Shape, choose_texts
from alst_jax.at_length.longppl import LongPpl, Window
from alst_jax.at_length.positions import bands, curve, doublings
from alst_jax.config import IGNORED, TrainConfig, UserError
from alst_jax.data.pieces import Pieces, Sequence, Tokenised
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.flag_checks import check_run
from alst_jax.hardware.machines import parse_cluster
from alst_jax.planning.job import Job
from alst_jax.planning.report import evaluation_line
from alst_jax.planning.seconds import forward_seconds
from alst_jax.profile import Profile
from tests.helpers import tiny

# ------------------------------------------------------------------------------------------------------------- LongPPL


def test_windows():
    """Context 8, so a step of 2: the first window judges tokens 8 and 9, whose labels stand at 7 and 8."""
    assert longppl.windows(13, 8) == [Window(0, 10, 7), Window(2, 12, 9), Window(4, 13, 11)]
    assert longppl.windows(8, 8) == [] and longppl.windows(9, 8) == [Window(0, 9, 7)]
    (first, *_) = longppl.windows(65536, 4096)
    assert first == Window(0, 5120, 4095) and len(longppl.windows(65536, 4096)) == 60
    sequence = Sequence(np.arange(13, dtype=np.int32), np.arange(1, 14, dtype=np.int32))
    piece = longppl.cut(sequence, Window(4, 13, 11))
    assert piece.tokens.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 12] and piece.labels[0] == 5


def test_each_label_has_the_loss_of_one_window():
    found = [
        (window, np.arange(window.start, window.stop, dtype=np.float32) + 100 * n)
        for n, window in enumerate(longppl.windows(13, 8))
    ]
    short = longppl.short_losses(13, found)
    assert np.isnan(short[:7]).all() and short[7:12].tolist() == [7, 8, 109, 110, 211] and np.isnan(short[12])


def test_key_tokens_and_longppl():
    """Of six labels: no short context; gained 2.5 and likely; gained 1.9; gained 3 but unlikely (2.1 nats); gained 2.2
    with 1.9 nats; gained 5, but no label."""
    long = np.float32([0.1, 0.5, 0.1, 2.1, 1.9, 0.0])
    short = np.float32([np.nan, 3.0, 2.0, 5.1, 4.1, 5.0])
    labels = np.int32([1, 1, 1, 1, 1, IGNORED])
    assert longppl.key_tokens(long, short, labels).tolist() == [False, True, False, False, True, False]
    found = LongPpl.of(long, short, labels)
    assert (found.keys, found.judged) == (2, 4) and found.value == pytest.approx(math.exp((0.5 + 1.9) / 2))
    assert found.usual == pytest.approx(math.exp((0.5 + 0.1 + 2.1 + 1.9) / 4))
    both = found.plus(LongPpl.of(np.float32([0.3]), np.float32([9.0]), np.int32([1])))
    assert both.value == pytest.approx(math.exp((0.5 + 1.9 + 0.3) / 3)) and LongPpl().value is None


# --------------------------------------------------------------------------------------------------------------- tasks

TEXT = "It was a dark night and it rained on the roof of the house. " * 60


@pytest.fixture(scope="module")
def writer():
    tokenizer = byte_tokenizer()
    return tasks.Writer.of(tokenizer, np.asarray(tokenizer(TEXT)["input_ids"], np.int32))


def written(writer, task, length=1024, depth=None, seed=0):
    """(the case, the text before the answer, the answer)."""
    case = writer.case(task, length, np.random.default_rng(seed), depth)
    assert case.tokens.size == length and case.tokens.dtype == np.int32
    labels = case.sequence.labels
    answer = case.tokens[-case.answer :]
    assert np.flatnonzero(labels != IGNORED).tolist() == list(range(length - case.answer - 1, length - 1))
    assert labels[labels != IGNORED].tolist() == answer.tolist()
    decode = lambda tokens: writer.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return case, decode(case.tokens[: -case.answer]), decode(answer)


@pytest.mark.parametrize("depth", tasks.DEPTHS)
def test_a_needle(depth, writer):
    case, text, answer = written(writer, "needle", depth=depth)
    ((name, number),) = re.findall(r"\nThe special magic number for (\w+) is (\d{7})\.\n", text)
    assert text.endswith(f"\nThe special magic number for {name} is") and answer == f" {number}"
    before = text.index("\nThe special magic number")
    after = len(text) - len(f"\nThe special magic number for {name} is" * 2) - len(f" {number}.\n") - before
    assert before / (before + after) == pytest.approx(depth, abs=2 / 1024)
    assert set(re.sub(r"\nThe special.*\n?", "", text)) <= set(TEXT)


def test_variables(writer):
    _, text, answer = written(writer, "variables")
    values = {}
    for name, value in re.findall(r"\nVAR ([A-Z]{5}) = (?:VAR )?(\w+)\n", text):
        values[name] = values.get(value, value)
    asked = re.search(r"\nThe value of VAR ([A-Z]{5}) is$", text)[1]
    assert len(values) == 8 and answer == f" {values[asked]}" and len(set(values.values())) == 2
    assert f"VAR {asked} = VAR" in text, "the last of its chain"


def test_copy(writer):
    _, text, answer = written(writer, "copy")
    mark = re.search(r"\n<passage \d{4}>\n$", text)[0]
    assert text.count(mark) == 2 and text.split(mark)[1].startswith(answer + "\n</passage>\n")
    assert len(answer) == 32 and answer in TEXT


def test_words(writer):
    _, text, answer = written(writer, "words", length=2048)
    listed = text.removeprefix("\nA list of words:").split("\n")[0].split()
    counts = sorted(((listed.count(word), word) for word in set(listed)), reverse=True)
    assert answer == f" {counts[0][1]}" and counts[0][0] > 3 * counts[1][0]
    assert text.endswith("\nThe most common word in the list is")


def test_cases_depend_on_the_seed_alone(writer):
    made = tasks.make_cases(writer, 2048, 1, 7)
    again = tasks.make_cases(writer, 2048, 1, 7)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(made, again, strict=True))
    assert not np.array_equal(made[0].tokens, tasks.make_cases(writer, 2048, 1, 8)[0].tokens)
    needles = [(case.length, case.depth) for case in made if case.task == "needle"]
    assert needles == [(n, d) for n in (256, 512, 1024, 2048) for d in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert len(tasks.make_cases(writer, 2048, 3, 7)) == 3 * len(made) and not tasks.make_cases(writer, 2048, 0, 7)
    with pytest.raises(UserError, match=r"64 tokens \(--seq-len\) are too few for the task needle"):
        tasks.make_cases(writer, 64, 1, 0)


def test_scores():
    """Two cases of one cell: an answer of two tokens, right in both; one of two with one of them wrong."""
    case = tasks.Case("needle", 4, 0.5, np.int32([5, 6, 7, 8]), 2)
    results = [
        (np.float32([9, 0.5, 1.5, 9]), np.array([False, True, True, False])),
        (np.float32([9, 0, 0, 9]), np.array([True, True, False, True])),
    ]
    (cell,) = tasks.judge([case, case], results)
    assert cell == tasks.Cell("needle", 4, 0.5, 2, 0.5, 0.5)


# ------------------------------------------------------------------------------------------------- positions, pictures


def test_loss_by_position():
    assert doublings(65536) == [0, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
    assert doublings(100) == [0, 25, 50, 100]
    losses = [np.float32([1, 2, 3, 4]), np.float32([5, 6, 7, 8])]
    labels = [np.int32([1, IGNORED, 1, 1]), np.int32([1] * 4)]
    low, high, none = bands(losses, labels, [0, 2, 4, 4])
    assert (low.loss, low.labels, low.name) == ((1 + 5 + 6) / 3, 3, "0-2")
    assert (high.loss, high.labels) == (5.5, 4) and (none.loss, none.labels) == (None, 0)
    assert [band.labels for band in curve(losses, labels, 4)] == [2, 1, 2, 2]


def results(step, shift):
    found = bands([np.float32(range(8)) + shift], [np.int32([1] * 8)], [0, 4, 8])
    cells = [tasks.Cell("needle", n, d, 1, 1.5, float(d > 0)) for n in (1024, 2048) for d in (0.0, 1.0)]
    return Results(step, 2.0, found, found, LongPpl(2.0, 1, 3.0, 4), cells)


def test_pictures_and_table(tmp_path):
    before, after = results(0, 1.0).as_json(), results(5, 0.0).as_json()
    pictures.draw(tmp_path, after, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss-by-position.svg", "needle-00000005.svg", "needle.svg"]
    heat = xml.etree.ElementTree.parse(tmp_path / "needle.svg").getroot()
    fills = [node.get("fill") for node in heat.iter() if node.tag.endswith("rect")][1:]
    assert len(fills) == 4 and len(set(fills)) == 2, "a cell each, right ones in another colour"
    lines = [
        node
        for node in xml.etree.ElementTree.parse(tmp_path / "loss-by-position.svg").iter()
        if node.tag.endswith("polyline")
    ]
    assert len(lines) == 2
    text = words.table(after, before, 4096)
    assert re.search(r"\n +4 to 8 +5.5000 +6.5000\n", text) and "LongPPL 7.389 over 1 key tokens of 4" in text
    assert re.search(r"\n +depth 100% +100% +1.50 +100% +1.50", text)
    assert results(5, 0.0).metrics() == {
        "long_loss/0-4": 1.5,
        "long_loss/4-8": 5.5,
        "long_ppl": math.exp(2),
        "long_key_tokens": 1,
        "long_needle_loss": 1.5,
        "long_needle_exact": 0.5,
        "long_seconds": 2.0,
    }


# --------------------------------------------------------------------------------------------- what is read, refusals


def test_texts_are_spread_over_all_that_are_long_enough():
    source = Tokenised(np.arange(40, dtype=np.int32), np.ones(40, bool), np.asarray([40]), [])
    starts = np.asarray([0, 8, 12, 20, 28, 36])
    pieces = Pieces(source, np.stack([starts, np.minimum(starts + np.asarray([8, 4, 8, 8, 8, 4]), 40), starts + 8]))
    chosen = choose_texts(pieces, 8, 3, "--eval-long f", 40)
    assert [text.tokens[0] for text in chosen] == [0, 20, 28]
    assert len(choose_texts(pieces, 8, 9, "--eval-long f", 40)) == 4
    with pytest.raises(UserError, match="^--eval-long f: its longest document has 40 tokens, and a loss at 64"):
        choose_texts(pieces, 64, 3, "--eval-long f", 40)


def test_batches_of_documents_alike():
    sizes = (8, 8, 8, 4, 4, 2, 2, 2)
    sequences = [Sequence(np.zeros(n, np.int32), np.zeros(n, np.int32)) for n in sizes]
    alike = Packed.of(sequences, Shape(2, 8, 1, 0, alike=True)).groups
    of_batch = lambda at: {sizes[i] for group in alike[at : at + 2] for i in group}
    assert len(alike) == 8 and all(len(of_batch(at)) == 1 for at in (0, 2, 4, 6))
    mixed = Packed.of(sequences, Shape(2, 8, 1, 0)).groups
    assert sorted(sum(mixed, [])) == list(range(8)) and len(mixed) == 6


def test_the_plan_counts_what_is_read(writer):
    config = TrainConfig(eval_long="f", eval_long_sequences=3, eval_long_samples=2, eval_long_context=512)
    texts = [Sequence(np.zeros(2048, np.int32), np.zeros(2048, np.int32))] * 3
    read = Evaluation.of(texts, tasks.make_cases(writer, 2048, 2, 0), 512, Shape(1, 2048, 1, 0), pathlib.Path())
    planned = documents(config, 2048)
    sizes = collections.Counter(sequence.tokens.size for sequence in read.packed.sequences)
    assert planned - sizes == {256: 2}, "the variables have no room in 256 tokens"
    assert not sizes - planned and sizes[2048] == 3 + 2 * (5 + 3) and sizes[640] == 3 * 12

    job, cluster = Job(tiny(), Profile(attention="flash", compute_dtype="bfloat16"), 1, 2048), parse_cluster("H100-80")
    once, twice = (
        forward_seconds(job, cluster, documents(dataclasses.replace(config, eval_long_samples=n), 2048)) for n in (0, 2)
    )
    assert 0 < once < twice
    assert "before the first step and at the end" in evaluation_line(config, job, cluster)


def test_only_the_same_texts_and_cases_are_compared(writer, tmp_path, monkeypatch):
    texts, said = [Sequence(np.zeros(2048, np.int32), np.ones(2048, np.int32))], []

    def evaluate(step, samples=1, context=512, seed=0):
        cases = tasks.make_cases(writer, 2048, samples, seed)
        judge = lambda self, *_: dataclasses.replace(results(step, 0.0), fingerprint=self.fingerprint)
        monkeypatch.setattr(Evaluation, "judge", judge)
        said.clear()
        Evaluation.of(texts, cases, context, Shape(1, 2048, 1, 0), tmp_path)(None, None, said.append)
        return "\n".join(said)

    assert "step 0:" in evaluate(0) and "step 0" in evaluate(2).splitlines()[1]
    for step, changes in enumerate((dict(samples=2), dict(context=256), dict(seed=1)), start=3):
        text = evaluate(step, **changes)
        assert "changed: the results are not compared with earlier ones" in text and "step 0" not in text
    assert "step 0" in evaluate(9) and "step 3" in evaluate(10, samples=2), "the first one of the same"


@pytest.mark.parametrize(
    "flags,message",
    [
        (dict(rope_scaling="yarn"), "add --rope-factor"),
        (dict(rope_factor=2.0), "no meaning without --rope-scaling"),
        (dict(rope_scaling="yarn", rope_factor=1.0), "must be above 1"),
        (dict(rope_scaling="yarn", rope_factor=2.0, rope_theta=1e6), "stretch the same positions twice"),
        (dict(rope_theta=0.5), "must be above 1"),
        (dict(eval_long=""), "name a file or a directory"),
        (dict(eval_long_samples=2), "name its file"),
        (dict(eval_long="f", debug_attention_layers=1), "judges a model"),
        (dict(eval_long="f", eval_long_context=64), "give fewer tokens than --seq-len 64"),
    ],
)
def test_contradictory_flags(flags, message):
    with pytest.raises(UserError, match=message) as refused:
        check_run(TrainConfig(model="m", data=("d",), seq_len=64, out="o", **flags))
    assert "\n" not in str(refused.value)
