"""Forward and backward, one GPU: ours beside Hugging Face transformers + Liger + cuDNN SDPA on the same shapes.

    python -m benchmarks.hf_liger --layers 4 --seq-lens 65536 131072

Each side runs in a process of its own, one after the other, with gradient checkpointing per layer, bf16 weights and
batch 1; the median of the steps after the first two is reported. "ours" keeps the attention outputs on the device,
"ours, all recomputed" runs every attention forward twice, as the other side does. Needs a CUDA GPU, torch,
liger-kernel.
"""

import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from typing import Literal

import tyro

from alst_jax.hardware import environment
from alst_jax.profile import MemoryFlags
from benchmarks.shapes import llama_8b


@dataclasses.dataclass
class Options:
    layers: int = 4
    seq_lens: tuple[int, ...] = (65536,)
    steps: int = 6
    sides: tuple[str, ...] = ("ours", "ours, all recomputed", "hf+liger")
    attention: Literal["cudnn", "flash"] = "flash"
    """Kernel of our sides."""
    memory: tyro.conf.OmitArgPrefixes[MemoryFlags] = MemoryFlags()
    """Of our sides; --keep-attention-on-device is set by each side."""
    side: str | None = None
    """Run one side in this process and print JSON (what the parent process does for each)."""


def main():
    options = tyro.cli(Options)
    if options.side is not None:
        measure = {
            "ours": functools.partial(ours, keep=options.layers),
            "ours, all recomputed": functools.partial(ours, keep=0),
            "hf+liger": hf_liger,
        }[options.side]
        print("RESULT " + json.dumps(measure(options, options.seq_lens[0])))
        return
    print(f"{'side':20} {'tokens':>8} {'seconds':>8} {'spread':>7} {'tok/s':>8} {'MFU':>6} {'peak GiB':>9} {'loss':>8}")
    for seq_len in options.seq_lens:
        speeds = {}
        for side in options.sides:
            command = [
                sys.executable,
                "-m",
                "benchmarks.hf_liger",
                "--side",
                side,
                "--layers",
                str(options.layers),
                "--seq-lens",
                str(seq_len),
                "--steps",
                str(options.steps),
                "--attention",
                options.attention,
                *" ".join(options.memory.profile("", "").flags()).split(),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                print(f"{side:20} {seq_len:8} failed: {(done.stderr or done.stdout).strip()[-600:]}")
                continue
            result = json.loads(line.removeprefix("RESULT "))
            median, spread = statistics.median(result["seconds"]), max(result["seconds"]) - min(result["seconds"])
            speeds[side] = seq_len / median
            mfu = llama_8b(options.layers).flops_per_sequence(seq_len) / median / (result["peak_flops"] or float("nan"))
            print(
                f"{side:20} {seq_len:8} {median:8.3f} {spread:7.3f} {speeds[side]:8.0f} {mfu:6.1%} "
                f"{result['peak_gib']:9.2f} {result['loss']:8.4f}   {result['versions']}",
                flush=True,
            )
        for side in speeds:
            if side != "hf+liger" and "hf+liger" in speeds:
                print(f"ratio {side} / hf+liger at {seq_len}: {speeds[side] / speeds['hf+liger']:.3f}", flush=True)


def ours(options: Options, seq_len: int, keep: int) -> dict:
    environment.prepare(None)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from alst_jax.optim.adamw import AdamW
    from alst_jax.parallel.mesh import make_mesh
    from alst_jax.step import TrainStep

    profile = dataclasses.replace(options.memory.profile(options.attention, "bfloat16"), keep_attention_on_device=keep)
    step = TrainStep(llama_8b(options.layers), make_mesh(1, 1), profile, AdamW(), jnp.bfloat16)
    params = step.init_params(jax.random.key(0), jnp.bfloat16)
    tokens = np.random.default_rng(0).integers(0, 128256, (1, seq_len), dtype=np.int32)
    batch = step.put_batch(tokens, np.roll(tokens, -1, 1), np.arange(seq_len, dtype=np.int32)[None])
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        done = step.loss_and_grad(*step.split(params), batch, jnp.float32(1 / seq_len))
        loss, gradients = jax.block_until_ready(done)
        seconds.append(time.perf_counter() - started)
        del gradients
    device = jax.devices()[0]
    return {
        "seconds": seconds[2:],
        "loss": float(loss),
        "peak_flops": environment.peak_flops(device.device_kind),
        "peak_gib": device.memory_stats()["peak_bytes_in_use"] / 2**30,
        "versions": f"jax {jax.__version__}",
    }


def hf_liger(options: Options, seq_len: int) -> dict:
    import torch
    import transformers
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from alst_jax.models.hf_config import hf_config_dict

    apply_liger_kernel_to_llama(rope=True, swiglu=True, rms_norm=True, fused_linear_cross_entropy=True)
    config = transformers.LlamaConfig(**hf_config_dict(llama_8b(options.layers)), attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, config.vocab_size, (1, seq_len), device="cuda")
    positions = torch.arange(seq_len, device="cuda")[None]
    seconds = []
    for _ in range(options.steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            loss = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
            loss.backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    return {
        "seconds": seconds[2:],
        "loss": loss.item(),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_flops": environment.peak_flops(torch.cuda.get_device_name()),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


if __name__ == "__main__":
    main()
