"""Does narrow optimizer state train like float32 AdamW? The same tiny Llama, text, seed and bfloat16 weights for each.

    python -m benchmarks.optimizers --steps 300 --out benchmarks/results/optimizers

Prints the mean loss of the last tenth of the steps and the held-out loss; writes OUT.json and OUT.png.
"""

import dataclasses
import json
import pathlib
import statistics

import tyro

from alst_jax.config import TrainConfig
from alst_jax.hardware import environment

VARIANTS = {
    "float32 states, float32 master": {},
    "float32 states, low-bits master": dict(master="low-bits"),
    "bfloat16 states, low-bits master": dict(states="bfloat16", master="low-bits"),
    "int8 states, low-bits master": dict(states="int8", master="low-bits"),
    "int8 states, stochastic rounding": dict(states="int8", master="none"),
}


@dataclasses.dataclass
class Options:
    steps: int = 300
    seq_len: int = 2048
    learning_rate: float = 3e-3
    seeds: int = 1
    out: pathlib.Path = pathlib.Path("optimizers")
    plot: bool = True
    """Draw OUT.png; needs matplotlib (the extra `plot`)."""


def main():
    options = tyro.cli(Options)
    environment.prepare(None)
    import jax
    import jax.numpy as jnp

    from alst_jax.data.batches import TrainingBatches, evaluation_batches
    from alst_jax.data.documents import make_sequences
    from alst_jax.data.embedded import python_reference
    from alst_jax.data.tokenizer import byte_tokenizer
    from alst_jax.models.config import TINY_LLAMA
    from alst_jax.optim.adamw import AdamW
    from alst_jax.optim.schedule import learning_rate_schedule
    from alst_jax.parallel.mesh import make_mesh
    from alst_jax.profile import Profile
    from alst_jax.step import TrainStep
    from alst_jax.trainer import TrainState, evaluate, optimizer_step

    tokenizer = byte_tokenizer()
    read = lambda held_out: make_sequences(
        python_reference(held_out), tokenizer, options.seq_len, TINY_LLAMA.vocab_size
    )[0]
    sequences, held_out = read(False), read(True)
    schedule = learning_rate_schedule(TrainConfig(), options.steps, options.learning_rate)
    profile = Profile(compute_dtype="bfloat16", offload_weights=True, offload_optimizer=True)
    curves = {}
    for name, settings in VARIANTS.items():
        for seed in range(options.seeds):
            step = TrainStep(TINY_LLAMA, make_mesh(1, 1), profile, AdamW(**settings), jnp.bfloat16)
            params = step.init_params(jax.random.key(seed), jnp.bfloat16)
            state = TrainState.begin(step, params)
            data, losses = TrainingBatches(sequences, options.seq_len, 1, 1, seed, 0), []
            while state.step < options.steps:
                state, values = optimizer_step(step, state, next(data), schedule(state.step))
                losses.append(values["loss"])
            tested, _ = evaluate(step, state, evaluation_batches(held_out, options.seq_len, 1, 0))
            curves[f"{name}, seed {seed}"] = losses
            print(
                f"{name:34} seed {seed}  training loss {statistics.mean(losses[-options.steps // 10 :]):.4f}  "
                f"held out {tested:.4f}",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(curves))
    if options.plot:
        draw(curves, options.out.with_suffix(".png"))


def draw(curves: dict[str, list[float]], file: pathlib.Path) -> None:
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, losses in curves.items():
        if name.endswith("seed 0"):
            smooth = np.convolve(losses, np.ones(10) / 10, mode="valid")
            axes.plot(np.arange(len(smooth)) + 10, smooth, label=name.removesuffix(", seed 0"), linewidth=1)
    axes.set(xlabel="step", ylabel="training loss, mean of 10 steps", title="AdamW, how its state is stored")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
