"""The GPU step (bfloat16, cuDNN attention) against a float32 step on the CPU: loss and every gradient, real width.

    python -m benchmarks.cpu_reference --layers 4 --seq-len 512

Both sides get the same bfloat16 weights. The CPU side computes in float32 with the XLA attention, and so does a third
run on the GPU: its difference is the rounding of another order of operations; bfloat16 adds its own.
"""

import dataclasses

import tyro

from alst_jax.hardware import environment
from benchmarks.shapes import llama_8b


@dataclasses.dataclass
class Options:
    layers: int = 4
    seq_len: int = 512


def main():
    options = tyro.cli(Options)
    environment.prepare(None)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from alst_jax.optim.adamw import AdamW
    from alst_jax.parallel.mesh import make_mesh
    from alst_jax.profile import Profile
    from alst_jax.step import TrainStep

    jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32, not TF32
    model, length = llama_8b(options.layers), options.seq_len
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, length), dtype=np.int32)
    labels, positions = np.roll(tokens, -1, 1), np.arange(length, dtype=np.int32)[None]

    def run(device, params, dtype, profile):
        step = TrainStep(model, make_mesh(1, 1, [device]), profile, AdamW(), dtype)
        params = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), params), step.param_shardings)
        batch = step.put_batch(tokens, labels, positions)
        loss, gradients = step.loss_and_grad(*step.split(params), batch, jnp.float32(1 / length))
        return float(loss), jax.tree.map(lambda g: np.asarray(g, np.float32), gradients)

    cpu, gpu = jax.devices("cpu")[0], jax.devices("gpu")[0]
    init = TrainStep(model, make_mesh(1, 1, [cpu]), Profile(), AdamW(), jnp.bfloat16)
    with jax.default_device(cpu):
        params = jax.tree.map(np.asarray, init.init_params(jax.random.key(0), jnp.bfloat16))
    exact_loss, exact = run(cpu, params, jnp.float32, Profile())
    runs = {
        "float32, xla": (jnp.float32, Profile()),
        "bfloat16, cudnn": (jnp.bfloat16, Profile(attention="cudnn", compute_dtype="bfloat16")),
        "bfloat16, cudnn, all offloaded": (
            jnp.bfloat16,
            Profile(attention="cudnn", compute_dtype="bfloat16", offload_weights=True, offload_activations=True),
        ),
    }
    print(f"CPU float32 loss {exact_loss:.6f}")
    for name, (dtype, profile) in runs.items():
        loss, gradients = run(gpu, params, dtype, profile)
        errors = jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), gradients, exact)
        )
        finite = all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
        path, worst = max(errors, key=lambda item: item[1])
        print(
            f"GPU {name}: loss {loss:.6f} ({loss - exact_loss:+.1e}), finite {finite}, gradients' relative error: "
            f"median {sorted(e for _, e in errors)[len(errors) // 2]:.1e}, worst {worst:.1e} "
            f"({jax.tree_util.keystr(path)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
