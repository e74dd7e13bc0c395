"""The two ends of a model: rotary tables, the batch on the devices, embedding and loss, with their gradients.

The loss and the gradient of the hidden state are compared at the run's length. The gradients of the tables are compared
at sampled words of the vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from alst_jax.config import IGNORED
from alst_jax.models.tree import combine
from alst_jax.ops.rope import inverse_frequencies
from alst_jax.preflight import reference, rope64
from alst_jax.preflight.limits import FLOAT32, Row, exact, row
from alst_jax.preflight.subject import Subject
from alst_jax.preflight.values import numbers, values
from alst_jax.stack.batch import BATCH_SPEC, Batch, count_labels

H, DH = 31, 32  # seeds
WORDS = 64  # sampled rows of the tables
TWO_PARTS = 4096  # positions: angles of multiples of this and of the rest are separate float32 products


# ----------------------------------------------------------------------------------------------------------------- rope


def check_rope(subject: Subject) -> list[Row]:
    """Frequencies against their definition in float64; cos and sin of the last positions against float64."""
    model, rows = subject.config, []
    longest = int(subject.batch["positions"].max()) + 1
    tables = lambda positions: subject.model.tokens(Batch(positions, positions, positions)).rows
    tokens = lambda positions: tuple(map(subject.pick, tables(positions)))
    cos, sin = (np.asarray(x) for x in subject.on_mesh(tokens, (BATCH_SPEC,), P())(subject.batch["positions"]))
    at = subject.batch["positions"][subject.sampled.b, subject.sampled.t]
    for number, rope in enumerate(model.ropes):
        name = f" {number}" if len(model.ropes) > 1 else ""
        angles, _ = inverse_frequencies(rope, model.head_dim, jnp.int32(longest))
        angles, wanted = np.asarray(angles), rope64.frequencies(rope, model.head_dim, longest)
        # A power has the error of its exponent times the logarithm of its base.
        limit = FLOAT32 * (8 + 4 * float(np.log(rope.theta)))
        rows.append(
            Row(
                f"rope{name}: frequencies",
                float(np.max(np.abs(angles / wanted - 1))),
                limit,
                "a power of theta in float32",
            )
        )
        mine = np.concatenate([cos[:, number], sin[:, number]], axis=-1)
        error = np.max(np.abs(mine - np.concatenate(rope64.cos_sin(rope, angles, at), axis=-1)))
        whole = longest if rope.rope_type == "dynamic" else TWO_PARTS + 4 * np.pi * longest / TWO_PARTS
        rows.append(
            Row(
                f"rope{name}: cos and sin to position {longest - 1:,}",
                float(error),
                rope64.factor(rope) * FLOAT32 * (8 + whole),
                "angles as float32 products, in two parts"
                if rope.rope_type != "dynamic"
                else "angles as float32 products",
            )
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------- batch


def check_batch(subject: Subject) -> list[Row]:
    """The devices hold the arrays that the host gave; labels follow their tokens across borders of shards."""
    given = subject.batch
    batch, wrong = subject.few.put_batch(**given)._asdict(), 0
    for name, array in given.items():
        for shard in batch[name].addressable_shards:
            wrong += int(np.sum(np.asarray(shard.data) != array[shard.index]))
    tokens, labels = (np.asarray(jax.device_get(batch[name])) for name in ("tokens", "labels"))
    return [exact("batch on the devices, elements that differ", wrong + _unshifted(subject, tokens, labels))]


def _unshifted(subject, tokens, labels):
    inside = subject.starts[:, 1:] == subject.starts[:, :-1]
    return int(np.sum(inside & (labels[:, :-1] != IGNORED) & (labels[:, :-1] != tokens[:, 1:])))


def check_data(batches: dict[str, np.ndarray], seq_len: int) -> list[Row]:
    """The run's own first batches [accumulation, B, S]: each label is the token after it, in its document."""
    tokens, labels, positions = (batches[name] for name in ("tokens", "labels", "positions"))
    follows = (positions[..., 1:] == positions[..., :-1] + 1) & (np.arange(1, tokens.shape[-1]) < seq_len)
    wrong = follows & (labels[..., :-1] != IGNORED) & (labels[..., :-1] != tokens[..., 1:])
    return [exact("labels of the first batch that are not the next token", int(np.sum(wrong)))]


# --------------------------------------------------------------------------------------------------- embedding and loss


def check_ends(subject: Subject) -> list[Row]:
    model, tokens, labels = subject.config, subject.batch["tokens"], subject.batch["labels"]
    words = np.unique(
        np.concatenate(
            [
                [0, model.vocab_size - 1],
                tokens[0, :4],
                labels[labels != IGNORED][:8],
                numbers(33, model.vocab_size, np.arange(WORDS)),
            ]
        )
    )
    scale = np.float32(1 / max(1, count_labels(labels)))
    trained, frozen = (subject.model.ends(part) for part in subject.few.split(subject.params))
    h, loss, dh, gradients = _run(subject, frozen)(trained, frozen, tokens, labels, scale)
    own = reference.independent(functools.partial(_own, subject))
    totals, own_dh = own(subject.weights, tokens, labels, words, subject.blocks(model.vocab_size))
    want_loss, want_head, want_embedding = (np.asarray(x, np.float64) * scale for x in totals)
    rows = subject.sampled
    looked_up = np.asarray(subject.weights["embed_tokens"]["embedding"][tokens[rows.b, rows.t]])
    looked_up = looked_up * model.embedding_multiplier
    count, dtype = subject.rows * subject.length, subject.dtype
    result = [
        row("embedding", _relative(h, looked_up), dtype, 2, 1),
        row("loss", abs(float(loss) - want_loss) / abs(want_loss), dtype, 4, count),
        row(
            "loss: gradient of the hidden state",
            _relative(dh, np.asarray(own_dh, np.float64) * scale),
            dtype,
            6,
            model.vocab_size,
        ),
    ]
    for name, wanted in (("embedding", want_embedding / scale), ("head", want_head)):
        if gradients.get(name) is not None:
            mine = np.asarray(jax.jit(lambda x: x[words])(gradients[name]))
            result.append(row(f"{name}: gradient of the table", _frobenius(mine, wanted), dtype, 6, count))
    return result


def _relative(mine, wanted):
    """The largest error of a row, relative to its norm."""
    sizes = np.linalg.norm(wanted, axis=-1)
    errors = np.linalg.norm(np.asarray(mine, np.float64) - wanted, axis=-1)
    return np.max(errors / np.maximum(sizes, 1e-3 * np.max(sizes)))


def _frobenius(mine, wanted):
    return np.linalg.norm(mine - wanted) / np.linalg.norm(wanted)


def _run(subject, frozen):
    """(h at the sampled tokens, loss, its gradient there, gradients of the tables that are trained)."""
    model, size, tied = subject.model, jnp.arange(subject.config.hidden_size), subject.config.tie_word_embeddings

    def local(trained, frozen, tokens, labels, scale):
        made = lambda seed: values(seed, *subject.indices(), size).astype(subject.dtype)
        trained, frozen = model.on_device(trained), model.on_device(frozen)
        table = lambda t: combine(t["embed_tokens"], frozen["embed_tokens"])["embedding"]
        h, back = jax.vjp(lambda t: model.embed(table(t), tokens), trained)
        (of_embedding,) = back(made(DH))
        loss_of = lambda h, t: model.head_loss(h, combine(t, frozen), labels, scale)
        loss, (dh, of_head) = jax.value_and_grad(loss_of, (0, 1))(made(H), trained)
        gradients = {
            "embedding": of_embedding["embed_tokens"]["embedding"],
            "head": of_head["embed_tokens" if tied else "lm_head"]["embedding"],
        }
        return subject.pick(h), loss, subject.pick(dh), gradients

    specs = [model.ends(part) for part in subject.few.split(subject.few.specs)]
    tables = {
        "embedding": specs[0]["embed_tokens"]["embedding"],
        "head": specs[0]["embed_tokens" if tied else "lm_head"]["embedding"],
    }
    return subject.on_mesh(local, (*specs, BATCH_SPEC, BATCH_SPEC, P()), (P(), P(), P(), tables))


def _own(subject, weights, tokens, labels, words, blocks):
    """((summed loss, gradients of head and embedding at some words), gradient of h at the sampled tokens)."""
    model, size, rows = subject.config, jnp.arange(subject.config.hidden_size), subject.sampled
    labels_of = jnp.asarray(labels)

    def add(sums, block):
        b, t = block
        counts, t = t >= 0, jnp.maximum(t, 0)
        label = jnp.where(counts, labels_of[b, t], IGNORED)
        h = values(H, (b, t), size)
        losses = reference.token_losses(model, weights, h, label)
        logits, back = jax.vjp(lambda x: reference.scaled(model, x), reference.products(model, weights, h))
        dlogits = jax.nn.softmax(logits) - (label[:, None] == jnp.arange(model.vocab_size)[None])
        (dlogits,) = back(jnp.where((label != IGNORED)[:, None], dlogits, 0))
        of_head = jnp.einsum("rv,rd->vd", dlogits[:, words], reference.norm(h, weights["norm"], model))
        read = (jnp.asarray(tokens)[b, t][:, None] == words[None]) & counts[:, None]
        dh = values(DH, (b, t), size) * model.embedding_multiplier
        of_embedding = jnp.einsum("rv,rd->vd", read.astype(jnp.float32), dh)
        return jax.tree.map(jnp.add, sums, (jnp.sum(losses), of_head, of_embedding)), None

    zeros = jnp.zeros((len(words), model.hidden_size))
    totals, _ = lax.scan(add, (jnp.zeros(()), zeros, zeros), blocks)
    at = labels_of[rows.b, rows.t]
    dh = jax.grad(lambda h: jnp.sum(reference.token_losses(model, weights, h, at)))(values(H, (rows.b, rows.t), size))
    return totals, dh
