"""The loop: accumulate, step, log, evaluate, save, stop."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alst_jax.config import DEFAULT_LEARNING_RATE, TrainConfig, UserError
from alst_jax.data.batches import Arrays, TrainingBatches, one_by_one
from alst_jax.metrics import MetricsLog, ProgressDisplay, compilations, compiled, speed, summary, teller
from alst_jax.models.tree import dotted, is_stacked, names
from alst_jax.optim.schedule import learning_rate_schedule
from alst_jax.processes.hang import Turns
from alst_jax.processes.stop import StopSignal
from alst_jax.profiling import StepProfile
from alst_jax.refused import NotFinite, Refused, Spike, not_applied
from alst_jax.stack.batch import count_all_labels, labels_of_rows
from alst_jax.step import TrainStep
from alst_jax.watch import Watch, limits_of


@dataclasses.dataclass
class TrainState:
    """The arrays that an optimizer step changes, the frozen parameters, and `step`, the number of steps done.

    trained, frozen: two trees of all parameters, each with None for the parameters of the other.
    """

    trained: Any
    frozen: Any
    optimizer: Any
    step: int

    @staticmethod
    def begin(step: TrainStep, params: Any) -> "TrainState":
        """The state before the first step."""
        trained, frozen = step.split(params)
        return TrainState(trained, frozen, step.init_optimizer(trained), 0)

    def after(self, trained: Any, optimizer: Any, steps: int = 1) -> "TrainState":
        """The state after an update."""
        return TrainState(trained, self.frozen, optimizer, self.step + steps)


@dataclasses.dataclass(frozen=True)
class Data:
    """The batches of a run. evaluation: for each held-out source, by name, a function that gives an iterator over its
    batches. added: the additions of --add-data, as run_directory.record_added stores them. long: of --eval-long."""

    training: TrainingBatches
    evaluation: dict[str, Callable[[], Iterable[Arrays]]] = dataclasses.field(default_factory=dict)
    added: tuple[dict[str, Any], ...] = ()
    long: Callable[[TrainStep, TrainState, Callable[[str], None]], dict[str, float]] | None = None


def optimizer_step(
    step: TrainStep,
    state: TrainState,
    batches: Arrays | list[Arrays],
    learning_rate: float,
    judge: Callable[[dict[str, float]], str | None] = lambda values: None,
) -> tuple[TrainState, dict[str, float]]:
    """One step over `batches`: int32 arrays [accumulation, B, S], or a list of batches [B, S], each with its own S. The
    loss is the mean over all their valid labels.

    Raises NotFinite, with the state to go on from, if the loss or the norm of the gradient is not finite: `state`
    itself, or, where the profile updates in the backward pass and the buffers of `state` are gone, the new state (None
    if the step was applied in part). ValueError for more than one batch there. Raises Spike where judge(values) gives a
    reason not to apply the step; where the profile updates in the backward pass, it has been applied.
    """
    if step.profile.update_in_backward:
        return _step_in_backward(step, state, batches, learning_rate, judge)
    batches = one_by_one(batches)
    labels = count_all_labels([count for batch in batches for count in labels_of_rows(batch["labels"])])
    scale = jnp.float32(1 / labels)
    loss, gradients = 0.0, step.zero_gradients() if len(batches) > 1 else None
    for batch in with_draws(step, state, batches):
        inputs = state.trained, state.frozen, step.put_batch(**batch), scale
        if gradients is None:
            part, gradients = step.loss_and_grad(*inputs)
        elif step.profile.sums_in_place:
            part, gradients = step.loss_and_sums(gradients, *inputs)
        else:
            part, new = step.loss_and_grad(*inputs)
            gradients = step.add_gradients(gradients, new)
        loss += float(part)
    norm = step.gradient_norm(gradients)
    values = {"loss": loss, "grad_norm": float(norm), "labels": labels}
    if not (math.isfinite(loss) and math.isfinite(values["grad_norm"])):
        where = where_not_finite(step, gradients)
        if where is None:
            what = "the loss" if math.isfinite(values["grad_norm"]) else "their norm"
            where = f"every gradient finite: only {what} is not"
        raise NotFinite(f"loss {loss}, gradient norm {values['grad_norm']}, {where}", state)
    if cause := judge(values):
        raise Spike(cause, state)
    trained, optimizer = step.update(state.trained, gradients, state.optimizer, norm, jnp.float32(learning_rate))
    jax.block_until_ready(trained)
    return state.after(trained, optimizer), values


def with_draws(step: TrainStep, state: TrainState, batches: list[Arrays]) -> list[Arrays]:
    """The batches of a step with `Batch.draws`, where the adapters have dropout."""
    if not step.model.dropout:
        return batches
    earlier = np.cumsum([0, *(batch["tokens"].size for batch in batches[:-1])])
    return [
        batch | {"draws": np.array([state.step, tokens % 2**32], np.uint32)} for batch, tokens in zip(batches, earlier)
    ]


def _step_in_backward(step, state, batches, learning_rate, judge):
    batches, layers = one_by_one(batches), step.model.num_layers
    if len(batches) != 1:
        raise ValueError(f"{len(batches)} batches: gradients that are used at once cannot be summed over several")
    labels = count_all_labels(labels_of_rows(batches[0]["labels"]))
    batch = step.put_batch(**with_draws(step, state, batches)[0])
    loss, norm, finite, updated, trained, optimizer = step.update_in_backward(
        state.trained, state.frozen, state.optimizer, batch, jnp.float32(1 / labels), jnp.float32(learning_rate)
    )
    values = {"loss": float(loss), "grad_norm": float(norm), "labels": labels}
    if not finite:
        where = "the embedding" if updated == layers else f"layer {layers - 1 - int(updated)} of {layers}"
        where = f"first met in {where}, going back" if updated else "first met in the loss, the head or the last layer"
        raise NotFinite(
            f"loss {values['loss']}, gradient norm {values['grad_norm']}, {where}",
            None if updated else state.after(trained, optimizer, steps=0),
        )
    if cause := judge(values):
        raise Spike(cause, None)
    jax.block_until_ready(trained)
    return state.after(trained, optimizer), values


def where_not_finite(step: TrainStep, gradients: Any) -> str | None:
    """Words for the layers and the parameters whose gradients are not finite; None if all are finite."""
    layers, found = set(), []
    for path, counts in jax.tree_util.tree_leaves_with_path(step.count_not_finite(gradients)):
        bad = np.flatnonzero(np.asarray(counts))
        if len(bad):
            layers.update(bad.tolist() if is_stacked(path) else [])
            found.append(dotted(names(path)[1:] if is_stacked(path) else path))
    if not found:
        return None
    where = f"layers {', '.join(map(str, sorted(layers)))} of {step.model.num_layers}" if layers else "no layer"
    return f"gradients not finite in {where} ({', '.join(found[:4])}{', ...' if len(found) > 4 else ''})"


def check_weights(step: TrainStep, state: TrainState) -> None:
    """UserError unless all trained weights are finite."""
    if not math.isfinite(float(step.gradient_norm(state.trained))):
        raise UserError(
            f"step {state.step} made weights that are not finite numbers; they are not saved. A smaller "
            "--learning-rate or --weight-decay may help; go on from an earlier checkpoint with --resume"
        )


def evaluate(step: TrainStep, state: TrainState, batches: Iterable[dict[str, np.ndarray]]) -> tuple[float, int]:
    """Mean loss over all valid labels of held-out batches [B, S], and their number."""
    total, rows, turns = 0.0, [], Turns("a batch of the evaluation")
    for batch in batches:
        with turns.one():
            total += float(step.loss(state.trained, state.frozen, step.put_batch(**batch), jnp.float32(1)))
        rows += labels_of_rows(batch["labels"])
    labels = count_all_labels(rows)
    return total / max(labels, 1), labels


def evaluate_sources(
    step: TrainStep,
    state: TrainState,
    sources: dict[str, Callable[[], Iterable[dict[str, np.ndarray]]]],
    say: Callable[[str], None],
) -> dict[str, float]:
    """Loss and perplexity over the labels of all held-out sources, and of each of several by its name."""
    values, results = {}, {name: evaluate(step, state, batches()) for name, batches in sources.items()}
    labels = sum(count for _, count in results.values())
    loss = sum(loss * count for loss, count in results.values()) / max(labels, 1)
    for name, (value, count) in {"": (loss, labels), **(results if len(results) > 1 else {})}.items():
        values["eval_loss" + f"/{name}" * bool(name)] = value
        values["eval_perplexity" + f"/{name}" * bool(name)] = perplexity = math.exp(value) if value < 700 else math.inf
        say(
            f"step {state.step}: eval loss {value:.4f} over {count} labels, perplexity {perplexity:.4g}"
            + f" ({name})" * bool(name)
        )
    return values


def _evaluations(step, state, data, say):
    values = evaluate_sources(step, state, data.evaluation, say) if data.evaluation else {}
    return values | (data.long(step, state, say) if data.long is not None else {})


def train(
    config: TrainConfig,
    step: TrainStep,
    state: TrainState,
    steps: int,
    data: Data,
    log: MetricsLog,
    save: Callable[[TrainState], None] | None,
    stop: StopSignal,
) -> TrainState:
    """Train until `steps` steps are done, or `stop` received a signal; returns the state then.

    `save(state)` is called every --save-every steps, at the end, and before stopping early; `Saves` can also go back;
    None: nothing is saved. UserError if a step is refused and the flags say stop, or the weights are not finite; such
    weights are never saved.
    """
    schedule = learning_rate_schedule(config, steps, config.learning_rate or DEFAULT_LEARNING_RATE)
    display, profile = ProgressDisplay(state.step, steps), StepProfile.of(config.profile_steps, config.out)
    first, saver, tell = state.step + 1, _Saver(step, save, state.step), teller(display, log)
    limits = limits_of(stop.seconds, bool(config.lengths))
    refused, watch = Refused(config, save, tell), Watch(config, tell, jax.default_backend() == "gpu", limits=limits)
    try:
        watch.start()
        while state.step < steps and not stop.shared():
            stop.began = started = time.perf_counter()
            learning_rate, position = schedule(state.step), data.training.get_state()
            batches, before = one_by_one(next(data.training)), compilations()
            if position in refused.left_out:
                continue
            padding = [batch.pop("padding", None) for batch in batches]
            with profile.step(state.step + 1, display.say):
                state, values, problem = attempt(step, state, batches, learning_rate, watch)
            if problem is not None:
                state = _go_on(refused, saver, problem, step, state, data, position)
                watch.rewind(state.step)
                log.rewind(state.step)
                continue
            stop.seconds = seconds = time.perf_counter() - started
            values = {"step": state.step, **values, **speed(step, batches, padding, seconds)}
            values |= {"learning_rate": learning_rate, "compilations": compilations() - before}
            watch.end(values)
            if values["compilations"] and state.step > first:
                display.say(compiled(values, batches))
            if state.step == steps or config.eval_every and state.step % config.eval_every == 0:
                values |= _evaluations(step, state, data, display.say)
            log.write(values)
            display.show(state.step, summary(values))
            if config.save_every and state.step % config.save_every == 0:
                saver(state)
        saver(state)
        profile.done(config.profile_steps, display.say)
        return state
    finally:
        watch.close()
        profile.close(display.say)
        display.close()


class _Saver:
    """Saves a state unless it is saved already. saved: the step of the newest checkpoint."""

    def __init__(self, step: TrainStep, save: Callable[[TrainState], None] | None, saved: int):
        self._step, self._save, self.saved = step, save, saved

    def __call__(self, state: TrainState) -> None:
        if state.step != self.saved and self._save is not None:
            check_weights(self._step, state)
            self._save(state)
            self.saved = state.step


def attempt(step, state, batches, learning_rate, watch):
    """(the next state, its values, None), or (`state`, {}, why the step was refused)."""
    watch.begin(state.step + 1)
    try:
        judge = functools.partial(watch.judge, state.step + 1)
        return *optimizer_step(step, state, batches, learning_rate, judge), None
    except (NotFinite, Spike) as error:
        return state, {}, error.with_traceback(None)  # the frames of a traceback hold arrays
    finally:
        watch.rest()


def _go_on(refused, saver, problem, step, state, data, position):
    """The state to go on from after a refused step. UserError if the run ends; it is saved first, if it can be."""
    back = refused.go_on(problem, state, position)
    if back is not None:
        return back
    if problem.state is not None:
        data.training.set_state(position)  # a resumed run meets the same batch again
        saver(problem.state)
    raise UserError(not_applied(step.profile, state.step, problem, saver.saved)) from problem
