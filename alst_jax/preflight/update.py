"""The norm of the gradient and two steps of AdamW, as the run stores and places them, against float64 numpy. The update
during the backward pass against the update behind it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alst_jax.models.tree import dotted
from alst_jax.optim.adamw import AdamW
from alst_jax.preflight.limits import FLOAT32, Row, row, unit
from alst_jax.preflight.subject import Subject
from alst_jax.preflight.values import numbers, values
from alst_jax.preflight.whole import roundings_of
from alst_jax.stack.batch import count_labels

G = 51  # seed
ELEMENTS = 32  # of each parameter
RATE = 2.0**-4  # so large that the rounding of a bfloat16 weight does not hide the step

# The largest error of an update of size one, from moments stored narrow: the gap between two codes of the first moment,
# half of the second moment's gap, which is under a root.
GAPS = {"float32": 0.0, "bfloat16": 2.0**-7 * 1.5, "int8": 2 ** (1 / 6) - 1 + (2 ** (1 / 8) - 1) / 2}


def check_update(subject: Subject) -> list[Row]:
    """Uses up the parameters of `subject`."""
    step = subject.few
    (trained, _), optimizer = step.split(subject.params), step.optimizer
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(trained))
    at = [_sample(leaf.shape, n) for n, leaf in enumerate(leaves)]
    read, square, make = _reader(at), _squares(), _maker(step)
    wanted = [AdamSample(dotted(path), weights) for path, weights in zip(paths, read(leaves), strict=True)]
    state, errors = step.init_optimizer(trained), []
    del leaves, subject.__dict__["params"]
    for number in range(2):
        gradients = make(number)
        norm, own = step.gradient_norm(gradients), square(gradients)
        errors.append(abs(float(norm) - own) / own)
        shrink = min(1.0, optimizer.clip_norm / own) if optimizer.clip_norm > 0 else 1.0
        for sample, gradient in zip(wanted, read(jax.tree.leaves(gradients)), strict=True):
            sample.step(optimizer, gradient * shrink, RATE)
        trained, state = step.update(trained, gradients, state, norm, jnp.float32(RATE))
    masters = _masters(optimizer, trained, state)
    size = max(float(np.max(np.abs(sample.weight))) for sample in wanted)
    far = lambda leaves: (
        max(float(np.max(np.abs(found - sample.weight))) for sample, found in zip(wanted, read(leaves), strict=True))
        / RATE
    )
    # 1 - beta^count in float32 has lost the digits in which beta is one.
    lost = 2 / (1 - optimizer.beta1) + 1 / (1 - optimizer.beta2)
    limit = GAPS[optimizer.states] + (64 + lost + 4 * size / RATE) * FLOAT32
    narrow = unit(subject.weight_dtype) if subject.weight_dtype != "float32" else 0.0
    rows = [row("norm of the gradient", max(errors), "float32", 1, sum(leaf.size for leaf in jax.tree.leaves(trained)))]
    if masters is not None:
        name = "update: float32 weights, in learning rates"
        rows.append(Row(name, far(masters), limit, f"{optimizer.states} moments"))
    # Rounded to the nearest once, or by chance in each of two steps.
    limit += size / RATE * narrow * (1 if masters is not None else 4)
    return [
        *rows,
        Row(
            "update: weights, in learning rates",
            far(jax.tree.leaves(trained)),
            limit,
            f"{optimizer.states} moments, weights rounded to {subject.weight_dtype}",
        ),
    ]


def check_in_backward(subject: Subject) -> list[Row]:
    """Where the run updates during the backward pass: such a step against the gradient and the update behind it, which
    other checks judge. Uses up the parameters of `subject`.

    After one step of Adam an element has moved by about one learning rate, against the sign of its gradient. So weights
    show whether each gradient reached its parameter and layer, and the norm shows the gradients' size.
    """
    step, found = subject.few, []
    if not step.profile.update_in_backward:
        return []
    batch, rate = step.put_batch(**subject.batch), jnp.float32(RATE)
    scale = jnp.float32(1 / max(1, count_labels(subject.batch["labels"])))
    read = _reader([_sample(leaf.shape, n) for n, leaf in enumerate(jax.tree.leaves(step.trained))])
    for in_backward in (True, False):
        trained, frozen = step.split(subject.params)
        state = step.init_optimizer(trained)
        if in_backward:
            loss, norm, _, _, trained, _ = step.update_in_backward(trained, frozen, state, batch, scale, rate)
        else:
            loss, gradients = step.loss_and_grad(trained, frozen, batch, scale)
            norm, signs = step.gradient_norm(gradients), read(jax.tree.leaves(gradients))
            trained, _ = step.update(trained, gradients, state, norm, rate)
        found.append((float(loss), float(norm), read(jax.tree.leaves(trained))))
        del subject.__dict__["params"], trained
    (loss, norm, mine), (own_loss, own_norm, own) = found
    name, roundings = "in the backward pass", roundings_of(subject)
    size = row(
        f"update {name}: loss and norm",
        max(abs(loss / own_loss - 1), abs(norm / own_norm - 1)),
        subject.dtype,
        roundings,
        subject.rows * subject.length,
    )

    sizes = [float(np.sqrt(np.mean(gradient**2))) for gradient in signs]

    def other_way(gradient, typical, ours, theirs):
        """The part of the elements that moved differently, of those whose gradient is far above its error. The gradient
        of a key's bias may be nothing but rounding: see `whole._error`."""
        clear = np.abs(gradient) > 4 * size.limit * max(typical, 1e-2 * max(sizes))
        return np.mean(np.abs(ours - theirs)[clear] > RATE / 2) if clear.any() else 0.0

    parts = map(other_way, signs, sizes, mine, own)
    return [
        size,
        Row(
            f"update {name}: part of the elements that move otherwise",
            float(max(parts)),
            0.01,
            "signs of gradients that are far above their error",
        ),
    ]


class AdamSample:
    """AdamW on some elements of a parameter, in float64."""

    def __init__(self, name: str, weight: np.ndarray):
        self.decays, self.weight, self.count = name.split(".")[-1] not in ("scale", "bias"), weight, 0
        self.first = self.second = np.zeros_like(weight)

    def step(self, adam: AdamW, gradient: np.ndarray, rate: float) -> None:
        self.count += 1
        self.first = adam.beta1 * self.first + (1 - adam.beta1) * gradient
        self.second = adam.beta2 * self.second + (1 - adam.beta2) * gradient**2
        first, second = self.first / (1 - adam.beta1**self.count), self.second / (1 - adam.beta2**self.count)
        decay = adam.weight_decay * self.weight if self.decays else 0.0
        self.weight = self.weight - rate * (first / (np.sqrt(second) + adam.eps) + decay)


def _maker(step):
    """make(number) -> given gradients, where they will live."""
    leaves, treedef = jax.tree.flatten(step.trained)
    places = [leaf.sharding.with_memory_kind("device") for leaf in leaves]
    on_device = jax.jit(
        lambda number: [
            values(G + 2 * n + number, *map(jnp.arange, leaf.shape)).astype(leaf.dtype) for n, leaf in enumerate(leaves)
        ],
        out_shardings=places,
    )
    return lambda number: treedef.unflatten(
        [jax.device_put(x, leaf.sharding) for x, leaf in zip(on_device(jnp.int32(number)), leaves, strict=True)]
    )


def _on_device(leaves):
    return [jax.device_put(x, x.sharding.with_memory_kind("device")) for x in leaves]


def _squares():
    """norm(tree): rows in float32, their sums in float64."""
    sums = jax.jit(lambda leaves: [jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1) for x in leaves])
    total = lambda rows: float(np.sqrt(sum(np.sum(np.asarray(x, np.float64)) for x in rows)))
    return lambda tree: total(sums(_on_device(jax.tree.leaves(tree))))


def _sample(shape, n):
    """Indices of some elements, the first and the last among them."""
    return tuple(
        np.concatenate([[0, size - 1], numbers(60 + 8 * n + dim, size, np.arange(ELEMENTS))])
        for dim, size in enumerate(shape)
    )


def _reader(at):
    """read(leaves) -> float64 values of these elements of each."""
    some = jax.jit(lambda leaves: [x[i].astype(jnp.float32) for x, i in zip(leaves, at, strict=True)])
    return lambda leaves: [np.asarray(x, np.float64) for x in some(_on_device(leaves))]


def _masters(optimizer: AdamW, trained: Any, state: dict[str, Any]) -> list[jax.Array] | None:
    """The float32 weights behind narrow ones; None without narrow ones."""
    if "master" not in state:
        return None
    kept = jax.tree.leaves(state["master"])
    if optimizer.master == "float32":
        return kept
    join = jax.jit(lambda high, low: list(map(_joined, high, low)))
    return join(_on_device(jax.tree.leaves(trained)), _on_device(kept))


def _joined(high, low):
    """float32 from a bfloat16 rounded to the nearest and the 16 bits that it lacks."""
    high = jax.lax.bitcast_convert_type(high, jnp.uint16).astype(jnp.uint32) - (low >= 2**15).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((high << 16) + low.astype(jnp.uint32), jnp.float32)
