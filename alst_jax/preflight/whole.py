"""Loss and gradient of a few layers: at a short length against the independent model, at the run's length against the
same step with other tiles and chunks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from alst_jax.config import UserError
from alst_jax.models.tiles import usual_tiles
from alst_jax.parallel.mesh import SEQ
from alst_jax.parallel.ulysses import Ulysses
from alst_jax.preflight import reference
from alst_jax.preflight.limits import Row, row
from alst_jax.preflight.subject import Subject
from alst_jax.preflight.tokenwise import DEEP, flat, rotations
from alst_jax.profile import Profile
from alst_jax.stack.batch import count_labels
from alst_jax.step import TrainStep

SHORT = 512  # tokens, rounded up to a multiple for mesh and kernel
LAYER = 2 * DEEP + 4  # roundings, forward and backward, attention included


def check_short(subject: Subject, multiple: int) -> list[Row]:
    """multiple: of tokens, that a sequence must have."""
    length = min(subject.length, -(-SHORT // multiple) * multiple)
    short = subject if length == subject.length else dataclasses.replace(subject, length=length)
    if short is not subject:
        short.__dict__["few"], short.__dict__["params"] = subject.few, subject.params
    trained, frozen = short.few.split(short.params)
    scale = jnp.float32(1 / max(1, count_labels(short.batch["labels"])))
    loss, gradients = short.few.loss_and_grad(trained, frozen, short.few.put_batch(**short.batch), scale)
    mine = flat(gradients)
    own_loss, own = reference.independent(functools.partial(_own, short))(subject.weights)
    loss_error = abs(float(loss) - float(own_loss * scale)) / abs(float(own_loss * scale))
    theirs = jax.jit(lambda own: {name: leaf * scale for name, leaf in flat(own).items() if name in mine})(own)
    return [
        _row(subject, f"loss of {_layers(subject)} at {length:,} tokens", loss_error, length),
        _row(subject, f"gradient of {_layers(subject)} at {length:,} tokens", _error(mine, theirs), length),
    ]


def check_tiles(subject: Subject) -> list[Row]:
    """The run's step against the same with other tiles, groups of heads and nothing kept."""
    step, batch = subject.few, subject.batch
    other = other_tiles(step.profile, subject)
    twin = TrainStep(step.model, step.mesh, other, step.optimizer, subject.weight_dtype, step.freeze)
    trained, frozen = step.split(subject.params)
    scale = jnp.float32(1 / max(1, count_labels(batch["labels"])))
    results = [s.loss_and_grad(trained, frozen, s.put_batch(**batch), scale) for s in (step, twin)]
    (loss, mine), (own_loss, theirs) = results
    name = (
        f"{_layers(subject)} at {subject.length:,} tokens, loss tile {other.loss_tile}, MLP tile {other.mlp_tile}, "
        f"{other.head_chunks} head chunks"
    )
    error = abs(float(loss) - float(own_loss)) / abs(float(own_loss))
    error = max(error, _error(flat(mine), flat(theirs)))
    return [_row(subject, f"loss and gradient of {name}", error, subject.length)]


def other_tiles(profile: Profile, subject: Subject) -> Profile:
    """Smaller tiles and more groups of heads, where the model has them; so no more memory."""
    model, sp, usual = subject.config, subject.mesh.shape[SEQ], usual_tiles(subject.config)
    local = subject.rows * subject.length // subject.mesh.size
    smaller = lambda tile: max(1, min(tile, local) * 5 // 8)
    more = [chunks for chunks in range(profile.head_chunks + 1, model.num_heads + 1) if _divides(model, sp, chunks)]
    return dataclasses.replace(
        profile,
        loss_tile=smaller(profile.loss_tile or usual.loss),
        mlp_tile=smaller(profile.mlp_tile or usual.mlp),
        head_chunks=(more or [profile.head_chunks])[0],
        segment_layers=(1,),
        keep_attention_on_device=0,
        keep_attention_on_host=0,
        keep_qkv_on_device=0,
        keep_mlp_on_device=0,
    )


def _divides(model, sp, chunks):
    try:
        Ulysses.check(model, sp, chunks)
    except UserError:
        return False
    return True


def _layers(subject):
    return f"{subject.config.num_layers} layers"


def roundings_of(subject: Subject) -> int:
    """Roundings in a row, forward and backward, of the layers and the ends."""
    return LAYER * subject.config.num_layers + 6


def _row(subject, name, error, length):
    return row(name, error, subject.dtype, roundings_of(subject), subject.rows * length)


def _error(mine, theirs):
    """The largest error of a parameter's gradient, relative to its norm. A gradient that is only rounding (of a
    key's bias, which shifts all scores alike) is measured against the largest norm."""
    device = lambda tree: {name: jax.device_put(x, x.sharding.with_memory_kind("device")) for name, x in tree.items()}
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
    wide = lambda tree: {name: x.astype(jnp.float32) for name, x in tree.items()}

    @jax.jit
    def sizes_and_errors(mine, theirs):
        mine, theirs = wide(mine), wide(theirs)
        return {name: (norm(x), norm(mine[name] - x)) for name, x in theirs.items()}

    found = sizes_and_errors(device(mine), device(theirs))
    floor = 1e-2 * max(float(size) for size, _ in found.values())
    return max(float(error) / max(float(size), floor) for size, error in found.values())


def _own(subject, weights):
    """(summed loss, its gradient), a sequence at a time."""
    turns = rotations(subject)
    batch = subject.batch

    def add(sums, row):
        tokens, labels, positions, start = row
        turned = tuple(tuple(jnp.asarray(x)[positions] for x in pair) for pair in turns)
        found = jax.value_and_grad(lambda w: reference.loss(subject.config, w, tokens, labels, start, turned))(weights)
        return jax.tree.map(jnp.add, sums, found), None

    rows = tuple(jnp.asarray(x) for x in (batch["tokens"], batch["labels"], batch["positions"], subject.starts))
    return jax.lax.scan(add, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights)), rows)[0]
