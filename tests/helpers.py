"""What tests share: a tiny model, a batch, the comparison of two trees, and a Hugging Face twin."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from alst_jax.config import IGNORED
from alst_jax.data.packing import offsets_of
from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.tree import dotted, names
from alst_jax.optim.adamw import AdamW
from alst_jax.optim.formats import join_float32
from alst_jax.parallel.mesh import make_mesh
from alst_jax.planning.compiled import plan_step
from alst_jax.planning.job import Job
from alst_jax.planning.plan import Plan
from alst_jax.profile import Profile
from alst_jax.stack.batch import count_labels
from alst_jax.step import TrainStep

TINY = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    attention_bias=True,
    mlp_bias=True,
)
PLAIN = Profile(loss_tile=None, mlp_tile=None, remat=False)  # every feature off


def tiny(**changes) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


# Adam turns a gradient that is nothing but rounding into a step of full size; this eps keeps such elements quiet, so
# that updated weights can be compared as strictly as gradients.
QUIET_ADAMW = AdamW(eps=1e-4)


def make_step(
    model=TINY, dp=1, sp=1, profile=PLAIN, optimizer=QUIET_ADAMW, dtype=jnp.float32, freeze=None
) -> TrainStep:
    return TrainStep(model, make_mesh(dp, sp), profile, optimizer, jnp.dtype(dtype), freeze)


def job_of(step: TrainStep, rows: int, length: int, grad_accum: int = 1) -> Job:
    """The job of a step."""
    degrees, states, master = step.mesh.devices.shape, step.optimizer.states, step.optimizer.master
    return Job(step.model, step.profile, rows, length, *degrees, grad_accum, states, master, freeze=step.freeze)


def plan_of(step: TrainStep, rows: int, length: int, grad_accum: int = 1) -> Plan:
    """The compiled plan of a step."""
    return plan_step(step, job_of(step, rows, length, grad_accum))


def random_batch(model=TINY, rows=4, length=64, seed=0, ignored=0.2) -> dict[str, np.ndarray]:
    """int32[rows, length]; a part of the labels is ignored."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.vocab_size, (rows, length), dtype=np.int32)
    labels = np.roll(tokens, -1, axis=1)
    labels[:, -1] = IGNORED
    labels = np.where(rng.random((rows, length)) < ignored, IGNORED, labels).astype(np.int32)
    return {"tokens": tokens, "labels": labels, "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1))}


@functools.cache
def drawn(model, dtype, seed):
    """Weights as `init_params` draws them, by numpy: a program that draws them takes a second to compile."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        match names(path)[-1]:
            case "scale":
                return np.full(leaf.shape, 1 - model.norm_offset, leaf.dtype)
            case "bias" | "lora_B":
                return np.zeros(leaf.shape, leaf.dtype)
            case "lora_A":
                return rng.uniform(-1, 1, leaf.shape).astype(leaf.dtype) * leaf.dtype.type(leaf.shape[-2] ** -0.5)
        return rng.standard_normal(leaf.shape).astype(leaf.dtype) * leaf.dtype.type(model.initializer_range)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model, dtype))


def initial(step: TrainStep, seed=0):
    """Random weights whose numbers depend on model, type and seed alone: drawn once for all meshes and profiles."""
    weights = drawn(step.model, jax.tree.leaves(step.params)[0].dtype, seed)
    return jax.device_put(jax.tree.map(np.copy, weights), step.param_shardings)  # copies: updates are in place


def packed(rows, length, dp):
    """(batch with the documents packed, batch of one document a row)."""
    rng = np.random.default_rng(0)
    make = lambda n: tuple(np.full((n, length), fill, np.int32) for fill in (0, IGNORED, 0))
    together, alone, number = make(len(rows)), make(sum(map(len, rows))), 0
    for row, lengths in enumerate(rows):
        at = 0
        for n in lengths:
            tokens = rng.integers(0, TINY.vocab_size, n + 1)
            one = tokens[:-1], np.where(rng.random(n) < 0.2, IGNORED, tokens[1:]), np.arange(n)
            for place, other, values in zip(together, alone, one):
                place[row, at : at + n] = other[number, :n] = values
            at, number = at + n, number + 1
    names = ("tokens", "labels", "positions")
    documents = offsets_of(rows, length, dp, (max(map(len, rows)) + 1) * len(rows))  # one more a row: its padding
    return dict(zip(names, together)) | {"documents": documents}, dict(zip(names, alone))


def loss_and_grad(step: TrainStep, params, batch):
    """Mean loss over the valid labels, and its gradients as numpy arrays."""
    scale = jnp.float32(1 / count_labels(batch["labels"]))
    loss, gradients = step.loss_and_grad(*step.split(params), step.put_batch(**batch), scale)
    return float(loss), to_numpy(gradients)


def train(step: TrainStep, batch, steps=3, learning_rate=1e-2, seed=0):
    """(losses, gradients of the first step, final weights) of some optimizer steps on one batch."""
    trained, frozen = step.split(initial(step, seed))
    state = step.init_optimizer(trained)
    device_batch, scale = step.put_batch(**batch), jnp.float32(1 / count_labels(batch["labels"]))
    losses, first = [], None
    for _ in range(steps):
        loss, gradients = step.loss_and_grad(trained, frozen, device_batch, scale)
        first = to_numpy(gradients) if first is None else first
        losses.append(float(loss))
        norm = step.gradient_norm(gradients)
        trained, state = step.update(trained, gradients, state, norm, jnp.float32(learning_rate))
    return losses, first, to_numpy(step.join(trained, frozen))


def assert_trains_alike(step: TrainStep, batch, reference, gradients=1e-5, weights=1e-4) -> None:
    """Loss and gradients are those of `reference`, a result of `train`. An update is compiled and compared only where
    the profile changes it, which is where weights or optimizer state are in host memory."""
    if step.profile.offload_weights or step.profile.offload_optimizer:
        losses, first, after = train(step, batch, steps=len(reference[0]))
        assert_trees_close(after, reference[2], weights)
    else:
        loss, first = loss_and_grad(step, initial(step), batch)
        losses = [loss]
    np.testing.assert_allclose(losses, reference[0][: len(losses)], rtol=1e-5)
    assert_trees_close(first, reference[1], gradients)


def float32_masters(master: str, model: ModelConfig, profile: Profile):
    """The float32 weights behind bfloat16 ones after four updates with fixed gradients, however they are kept."""
    step = make_step(model, profile=profile, dtype=jnp.bfloat16, optimizer=AdamW(master=master))
    params = initial(step)
    state = step.init_optimizer(params)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        gradients = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(p.dtype), step.params)
        gradients = jax.device_put(gradients, step.param_shardings)
        params, state = step.update(params, gradients, state, jnp.float32(1), jnp.float32(1e-3))
    whole, kept = (jax.tree.map(jnp.asarray, to_numpy(tree)) for tree in (params, state["master"]))
    return to_numpy(
        kept if master == "float32" else jax.jit(functools.partial(jax.tree.map, join_float32))(whole, kept)
    )


def to_numpy(tree):
    return jax.tree.map(lambda x: np.asarray(x), tree)


def relative_error(a, b) -> float:
    """||a - b|| / ||b||, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def assert_trees_close(a, b, tolerance) -> None:
    """Every leaf within `tolerance` in relative norm; leaves that are zero on both sides are equal."""
    # A key bias shifts all scores of a query alike, so its true gradient is 0 and what is left is rounding: such
    # leaves are measured against the largest leaf instead of themselves.
    floor = 1e-4 * max(np.linalg.norm(np.asarray(x, np.float64)) for x in jax.tree.leaves(b))
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert x.shape == y.shape, name
        difference = np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64))
        scale = max(np.linalg.norm(np.asarray(y, np.float64)), floor)
        assert difference <= tolerance * scale, f"{name}: {difference / scale:.2e}"


def leaves(tree) -> dict:
    """The leaves of a parameter tree, or of one like it, by their dotted names; through dicts and Flax modules."""
    return {dotted(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def leaf(tree, name: str):
    return leaves(tree)[name]


def torch_gradients(model) -> dict[str, np.ndarray]:
    """The gradients of a torch model by our names; kernels are transposed and layers stacked."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("model.").split(".")
        layer = int(parts.pop(1)) if parts[0] == "layers" else None
        last = (
            "scale"
            if "norm" in parts[-2]
            else "embedding"
            if parts[-2] in ("embed_tokens", "lm_head")
            else {"weight": "kernel", "bias": "bias"}[parts[-1]]
        )
        gradient = parameter.grad.numpy().T if last == "kernel" else parameter.grad.numpy()
        found.setdefault(".".join([*parts[:-1], last]), {})[layer] = gradient
    return {
        name: np.stack([rows[i] for i in sorted(rows)]) if None not in rows else rows[None]
        for name, rows in found.items()
    }
