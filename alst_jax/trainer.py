"""The loop: accumulate, step, log, evaluate, save, stop."""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alst_jax.config import DEFAULT_LEARNING_RATE, TrainConfig, UserError
from alst_jax.data.batches import Arrays, TrainingBatches
from alst_jax.hardware.environment import peak_flops
from alst_jax.metrics import MetricsLog, ProgressDisplay, compilations, peak_memory
from alst_jax.models.tree import dotted, is_stacked, names
from alst_jax.profiling import StepProfile
from alst_jax.step import TrainStep, count_labels


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
    """The batches of a run. evaluation: for each held-out source, by name, what makes an iterator over its batches.
    added: what --add-data added to the run, as run_directory.record_added stores it."""

    training: TrainingBatches
    evaluation: dict[str, Callable[[], Iterable[Arrays]]] = dataclasses.field(default_factory=dict)
    added: tuple[dict[str, Any], ...] = ()


class NotFinite(Exception):
    """Loss or gradient is not a finite number. state: the state to go on from, None if the step was applied in part."""

    def __init__(self, reason: str, state: TrainState | None):
        super().__init__(reason)
        self.state = state


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop after the step in progress; a second one stops at once."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self.began, self.seconds = 0.0, None  # when the step in progress began; seconds of the last one

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for which, handler in self._previous.items():
            signal.signal(which, handler)

    def _handle(self, number, _frame):
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        seconds = max(0.0, self.began + (self.seconds or 0) - time.perf_counter())
        left = "" if self.seconds is None else f", in about {seconds:.0f} s"
        # Not print(): a handler may run in the middle of one.
        os.write(2, f"\n{self.received.name}: saving after this step{left}; once more stops at once\n".encode())


def learning_rate_schedule(config: TrainConfig, steps: int, peak: float) -> Callable[[int], float]:
    """Linear warm-up from 0 to `peak`, then cosine, linear or no decay to the final ratio at `steps`."""
    warmup = config.warmup_steps if config.warmup_steps is not None else steps // 20
    decay_steps = max(1, steps - warmup)
    final = peak * config.final_learning_rate_ratio
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, config.final_learning_rate_ratio),
        "linear": optax.linear_schedule(peak, final, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # Step 0 of a warm-up has rate 0 and would be wasted: count from 1.
    ramp = optax.linear_schedule(0.0, peak, max(1, warmup))
    return lambda step: float(ramp(step + 1) if step < warmup else decay(step - warmup))


def optimizer_step(
    step: TrainStep, state: TrainState, batches: Arrays | list[Arrays], learning_rate: float
) -> tuple[TrainState, dict[str, float]]:
    """One step over `batches`: int32 arrays [accumulation, B, S], or a list of batches [B, S], each with its own S. The
    loss is the mean over all their valid labels.

    Raises NotFinite, with the state to go on from, if the loss or the norm of the gradient is not finite: `state`
    itself, or, where the profile updates in the backward pass and the buffers of `state` are gone, the new state (None
    if the step was applied in part). ValueError for more than one batch there.
    """
    if step.profile.update_in_backward:
        return _step_in_backward(step, state, batches, learning_rate)
    batches = one_by_one(batches)
    labels = sum(count_labels(batch["labels"]) for batch in batches)
    scale = jnp.float32(1 / labels)
    loss, gradients = 0.0, step.zero_gradients() if len(batches) > 1 else None
    for batch in batches:
        part, new = step.loss_and_grad(state.trained, state.frozen, step.put_batch(**batch), scale)
        gradients = new if len(batches) == 1 else step.add_gradients(gradients, new)
        loss += float(part)
    norm = step.gradient_norm(gradients)
    values = {"loss": loss, "grad_norm": float(norm), "labels": labels}
    if not (math.isfinite(loss) and math.isfinite(values["grad_norm"])):
        where = where_not_finite(step, gradients)
        if where is None:
            where = "every gradient finite: only the loss is not" if math.isfinite(values["grad_norm"]) else (
                "every gradient finite: only their norm is not")
        raise NotFinite(f"loss {loss}, gradient norm {values['grad_norm']}, {where}", state)
    trained, optimizer = step.update(state.trained, gradients, state.optimizer, norm, jnp.float32(learning_rate))
    jax.block_until_ready(trained)
    return state.after(trained, optimizer), values


def one_by_one(batches: Arrays | list[Arrays]) -> list[Arrays]:
    """The batches of a step, each of arrays [B, S]."""
    if isinstance(batches, list):
        return batches
    return [{name: array[i] for name, array in batches.items()} for i in range(len(batches["tokens"]))]


def _step_in_backward(step, state, batches, learning_rate):
    batches, layers = one_by_one(batches), step.model.num_layers
    if len(batches) != 1:
        raise ValueError(f"{len(batches)} batches: gradients that are used at once cannot be summed over several")
    labels, batch = count_labels(batches[0]["labels"]), step.put_batch(**batches[0])
    loss, norm, finite, updated, trained, optimizer = step.update_in_backward(
        state.trained, state.frozen, state.optimizer, batch, jnp.float32(1 / labels), jnp.float32(learning_rate))
    values = {"loss": float(loss), "grad_norm": float(norm), "labels": labels}
    if not finite:
        where = "the embedding" if updated == layers else f"layer {layers - 1 - int(updated)} of {layers}"
        where = f"first met in {where}, going back" if updated else "first met in the loss, the head or the last layer"
        raise NotFinite(f"loss {values['loss']}, gradient norm {values['grad_norm']}, {where}",
                        None if updated else state.after(trained, optimizer, steps=0))
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
        raise UserError(f"step {state.step} made weights that are not finite numbers; they are not saved. A smaller "
                        "--learning-rate or --weight-decay may help; go on from an earlier checkpoint with --resume")


def evaluate(step: TrainStep, state: TrainState, batches: Iterable[dict[str, np.ndarray]]) -> tuple[float, int]:
    """Mean loss over all valid labels of held-out batches [B, S], and their number."""
    total, labels = 0.0, 0
    for batch in batches:
        total += float(step.loss(state.trained, state.frozen, step.put_batch(**batch), jnp.float32(1)))
        labels += count_labels(batch["labels"])
    return total / max(labels, 1), labels


def evaluate_sources(
    step: TrainStep, state: TrainState, sources: dict[str, Callable[[], Iterable[dict[str, np.ndarray]]]],
    say: Callable[[str], None],
) -> dict[str, float]:
    """Loss and perplexity over the labels of all held-out sources, and of each by its name if there are several."""
    values, results = {}, {name: evaluate(step, state, batches()) for name, batches in sources.items()}
    labels = sum(count for _, count in results.values())
    loss = sum(loss * count for loss, count in results.values()) / max(labels, 1)
    for name, (value, count) in {"": (loss, labels), **(results if len(results) > 1 else {})}.items():
        values["eval_loss" + f"/{name}" * bool(name)] = value
        values["eval_perplexity" + f"/{name}" * bool(name)] = perplexity = math.exp(value) if value < 700 else math.inf
        say(f"step {state.step}: eval loss {value:.4f} over {count} labels, perplexity {perplexity:.4g}"
            + f" ({name})" * bool(name))
    return values


def train(
    config: TrainConfig, step: TrainStep, state: TrainState, steps: int, data: Data, log: MetricsLog,
    save: Callable[[TrainState], None] | None, stop: StopSignal,
) -> TrainState:
    """Train until `steps` steps are done, or `stop` received a signal; returns the state then.

    `save(state)` is called every --save-every steps, at the end, and before stopping early; None: nothing is saved.
    UserError if the loss, the gradient or the weights are not finite; such weights are never saved.
    """
    schedule = learning_rate_schedule(config, steps, config.learning_rate or DEFAULT_LEARNING_RATE)
    display, profile = ProgressDisplay(state.step, steps), StepProfile.of(config.profile_steps, config.out)
    saved, first = state.step, state.step + 1

    def check_and_save():
        nonlocal saved
        if state.step != saved and save is not None:
            check_weights(step, state)
            save(state)
            saved = state.step

    try:
        while state.step < steps and stop.received is None:
            stop.began = started = time.perf_counter()
            learning_rate, position = schedule(state.step), data.training.get_state()
            batches, compiled = one_by_one(next(data.training)), compilations()
            padding = [batch.pop("padding", None) for batch in batches]
            try:
                with profile.step(state.step + 1, display.say):
                    state, values = optimizer_step(step, state, batches, learning_rate)
            except NotFinite as problem:
                at = state.step
                if problem.state is not None:
                    state = problem.state
                    data.training.set_state(position)  # a resumed run meets the same batch again
                    check_and_save()
                raise UserError(_not_finite(step, at, problem, saved)) from problem
            stop.seconds = seconds = time.perf_counter() - started
            values = {"step": state.step, **values, **_speed(step, batches, padding, seconds),
                      "learning_rate": learning_rate, "compilations": compilations() - compiled}
            if values["compilations"] and state.step > first:
                lengths = " and ".join(map(str, sorted({batch["tokens"].shape[1] for batch in batches})))
                display.say(f"step {state.step}: {values['compilations']} programs compiled, for {lengths} tokens")
            if data.evaluation and (state.step == steps or config.eval_every and state.step % config.eval_every == 0):
                values |= evaluate_sources(step, state, data.evaluation, display.say)
            log.write(values)
            display.show(state.step, _summary(values))
            if config.save_every and state.step % config.save_every == 0:
                check_and_save()
        check_and_save()
        return state
    finally:
        profile.close(display.say)
        display.close()


def _not_finite(step: TrainStep, done: int, problem: NotFinite, saved: int) -> str:
    """The message of a step that met a number that is not finite."""
    if problem.state is None:
        last = f"the last checkpoint, step {saved}, with --resume" if saved else "the beginning: none was saved"
        return (f"step {done + 1}: {problem}. Later layers were updated already (--update-in-backward), so nothing is "
                f"saved; go on from {last}. A smaller --learning-rate, --save-every, or a run without "
                "--update-in-backward, which would not apply such a step, may help")
    kept = "is where the run began" if not done else "is saved" if saved == done else "is not saved"
    return (f"step {done + 1}: {problem}. The step was not applied; the state before it, step {done}, {kept}. A "
            f"smaller --learning-rate{'' if step.profile.update_in_backward else ' or --clip-norm'}, or --dtype float32, "
            "may help.")


def _speed(
    step: TrainStep, batches: list[Arrays], padding: list[np.ndarray | None], seconds: float
) -> dict[str, Any]:
    """Throughput over all positions that were computed, padding included. padding: for each batch, of its packed rows.
    Then it is over the tokens of documents, whose attention stays inside of them."""
    tokens, flops, packed = 0, 0, {}
    work = lambda lengths, counts: sum(
        n * step.model.flops_per_sequence(length) for length, n in zip(lengths.tolist(), counts.tolist()))
    for batch, of_rows in zip(batches, padding):
        rows, length = batch["tokens"].shape
        tokens += rows * length
        if of_rows is None:
            flops += rows * step.model.flops_per_sequence(length)
            continue
        packed["padding"] = packed.get("padding", 0) + int(of_rows.sum())
        flops += work(*np.unique(np.diff(batch["documents"]), return_counts=True))
        flops -= work(*np.unique(of_rows, return_counts=True))
    tokens -= packed.get("padding", 0)
    peak, (place, gibibytes) = peak_flops(step.mesh.devices.flat[0].device_kind), peak_memory()
    return {"tokens": tokens, **packed, "seconds": seconds, "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / (peak * step.mesh.size) if peak else None,
            f"peak_{place.lower()}_gib": gibibytes}


def _summary(values: dict[str, Any]) -> str:
    memory = next(f"{k.split('_')[1].upper()} {v:.1f} GiB" for k, v in values.items() if k.startswith("peak_"))
    mfu = f"  MFU {values['mfu']:.0%}" if values["mfu"] is not None else ""
    return (f"loss {values['loss']:.4f}  grad {values['grad_norm']:.3f}  lr {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tok/s{mfu}  {memory}")
