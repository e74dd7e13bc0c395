"""From flags to the evaluation at length, and a run's lines about its positions before the first step."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from alst_jax.at_length.evaluation import Evaluation, Shape, choose_texts
from alst_jax.at_length.positions import doublings
from alst_jax.at_length.tasks import Writer, make_cases
from alst_jax.at_length.words import short
from alst_jax.config import IGNORED, TrainConfig, UserError
from alst_jax.data.batches import one_by_one
from alst_jax.data.documents import Cutting
from alst_jax.data.pieces import Sequence
from alst_jax.data.prepare import cut_sources
from alst_jax.extend_flags import REFERENCE
from alst_jax.metrics import MetricsLog
from alst_jax.models.config import TINY_LLAMA, ModelConfig
from alst_jax.models.extend import is_extended
from alst_jax.models.hf_config import model_config
from alst_jax.ops.attention import find_kernel, refusal
from alst_jax.planning.job import Job
from alst_jax.processes.link import link
from alst_jax.run_data import cache_of, labels_of, pad_token, reading_of
from alst_jax.step import TrainStep
from alst_jax.storage.source import ModelSource
from alst_jax.trainer import Data, TrainState

HAYSTACK = 64  # sequences of tokens that a haystack has at most
WORSE = 0.5  # nats: a loss so far above the unscaled one is told


def with_evaluation(config: TrainConfig, source: ModelSource, job: Job, data: Data) -> Data:
    """The data with the evaluation of --eval-long. UserError if its text is too short."""
    if config.eval_long is None:
        return data
    for kind in job.model.kinds:
        if reason := refusal(find_kernel(job.profile.attention), job.model.attention_spec(kind), documents=True):
            raise UserError(f"--eval-long puts several texts into one sequence: {reason}")
    texts, hay = held_out_texts(config, source)
    writer = Writer.of(source.tokenizer, hay)
    cases = make_cases(writer, config.seq_len, config.eval_long_samples, config.seed)
    alike = any(rope.needs_length for rope in job.model.ropes)
    shape = Shape(job.rows, job.length, job.dp, pad_token(source.tokenizer), alike)
    return dataclasses.replace(
        data, long=Evaluation.of(texts, cases, config.eval_long_context, shape, pathlib.Path(config.out))
    )


def held_out_texts(config: TrainConfig, source: ModelSource) -> tuple[list[Sequence], np.ndarray]:
    """(sequences of --seq-len tokens of --eval-long, the tokens of its documents). UserError if they are too short."""
    given = () if config.eval_long == REFERENCE else (config.eval_long,)
    cutting = Cutting(
        source.tokenizer, config.seq_len, source.config.vocab_size, labels_of(config), config.skip_bad_records
    )
    reading = reading_of(config, held_out=True)
    ((pieces, stats),) = cut_sources(given, reading, "--eval-long", cutting, cache_of(config)).values()
    flag = f"--eval-long {config.eval_long}"
    texts = choose_texts(pieces, config.seq_len, config.eval_long_sequences, flag, stats.longest)
    return texts, np.asarray(pieces.source.tokens[: HAYSTACK * config.seq_len])


def begin(
    config: TrainConfig, source: ModelSource, step: TrainStep, state: TrainState, data: Data, log: MetricsLog
) -> None:
    """Before the first step: the loss of the first batch with and without the scaling, and the evaluation at length. A
    resumed run does neither."""
    say = lambda text: print(text, flush=True)
    if data.long is not None:
        say(f"long    --eval-long {config.eval_long}: {data.long.summary()}")
    if state.step:
        return
    if is_extended(config) and config.debug_attention_layers is None:
        say(
            "rope    the first batch is compared with and without the flags in one process only"
            if link().several
            else compare_positions(source, step, state, data)
        )
    if data.long is not None:
        values = data.long(step, state, say)
        log.event({"step": 0, "event": "long", **values})
        log.scalars(0, values)


def original(source: ModelSource) -> ModelConfig:
    """The model without the flags of rotary embedding."""
    return TINY_LLAMA if source.files is None else model_config(source.files)


def compare_positions(source: ModelSource, step: TrainStep, state: TrainState, data: Data) -> str:
    """Lines: the loss by position of the first batch with and without the scaling, and their meaning."""
    position = data.training.get_state()
    batch = one_by_one(next(data.training))[0]
    data.training.set_state(position)
    batch.pop("padding", None)
    old = original(source)
    plain = dataclasses.replace(
        step.model,
        rope=old.rope,
        more_ropes=old.more_ropes,
        layer_kinds=old.layer_kinds,
        max_position_embeddings=old.max_position_embeddings,
    )
    dtype = jax.tree.leaves(step.params)[0].dtype
    other = TrainStep(plain, step.mesh, step.profile, step.optimizer, jnp.dtype(dtype), step.freeze)
    arrays = step.put_batch(**batch)
    new_losses, old_losses = (
        np.asarray(each.token_losses(state.trained, state.frozen, arrays).losses) for each in (step, other)
    )
    length, valid = int(batch["positions"].max()) + 1, batch["labels"] != IGNORED
    lines, rows = ["rope    loss of the first batch by position   with the flags   without"], []
    borders = doublings(length)
    for start, stop in zip(borders, borders[1:]):
        chosen = valid & (batch["positions"] >= start) & (batch["positions"] < stop)
        if chosen.any():
            rows.append((stop, float(new_losses[chosen].mean()), float(old_losses[chosen].mean())))
            lines.append(f"        {f'{short(start)} to {short(stop)}':41}{rows[-1][1]:<17.4f}{rows[-1][2]:.4f}")
    return "\n".join(lines + _meaning(rows, old.max_position_embeddings, math.log(step.model.vocab_size)))


def _meaning(rows: list[tuple[int, float, float]], known: int, guess: float) -> list[str]:
    """Sentences about the rows (end of band, loss with the flags, loss without). known: the positions that the model
    was made for. guess: the loss of a model that knows nothing."""
    within = [row for row in rows if row[0] <= known]
    beyond = [row for row in rows if row[0] > known]
    lines = []
    if within and max(new - old for _, new, old in within) > WORSE:
        where, new, old = max(within, key=lambda row: row[1] - row[2])
        lines.append(
            f"warning: below position {where:,} the flags raise the loss from {old:.2f} to {new:.2f}: the "
            "model does not recognise the stretched positions yet and has to learn them. yarn raises it "
            "least, and a smaller --rope-factor raises it less. A loss that stays there after some hundred "
            "steps says that they are too few, or the learning rate too small"
        )
    if beyond and min(new - old for _, new, old in beyond) > -0.01:
        lines.append(
            f"warning: beyond the model's {known:,} positions the flags lower the loss nowhere: they are of "
            "no use for these data yet"
        )
    if rows and min(new for _, new, _ in rows) > 0.9 * guess:
        lines.append(
            f"warning: a loss near {guess:.2f} is that of a model that knows nothing of the text, at any "
            "position: its weights or its tokenizer are not the right ones, or it was not trained; no scaling "
            "mends that"
        )
    return lines or [f"rope    a first loss within {WORSE} of the unscaled one is good: training goes on from there"]
