"""The longest sequences that fit by plan, beside the lengths that ALST publishes (arXiv 2506.13996 and its recipes).

    python -m benchmarks.longest --compiled 1 8

Full fine-tuning, batch 1, bfloat16, H100 80 GB. `--compiled`: numbers of GPUs for which the compiler confirms (it needs
the extra cuda12 or cuda13, and no GPU); the other cells are the cost model's, with 5% of each memory left free for its
error.
"""

import dataclasses
import functools
import itertools
from typing import Literal

import tyro

from alst_jax.hardware import environment
from benchmarks.shapes import LLAMA_8B, LLAMA_70B, QWEN3_32B

MODELS = {"Llama-8B": LLAMA_8B, "Llama-70B": LLAMA_70B, "Qwen3-32B": QWEN3_32B}
CLUSTERS = {1: "H100-80", 8: "8xH100-80", 32: "4x8xH100-80"}
ALST = {
    ("Llama-8B", 1): "500K",
    ("Llama-8B", 8): "3.7M",
    ("Llama-8B", 32): "15M",
    ("Llama-70B", 8): "200K",
    ("Llama-70B", 32): "4.0M",
    ("Qwen3-32B", 1): "230K",
    ("Qwen3-32B", 8): "1.55M",
    ("Qwen3-32B", 32): "7.0M",
}


@dataclasses.dataclass
class Options:
    models: tuple[Literal["Llama-8B", "Llama-70B", "Qwen3-32B"], ...] = ("Llama-8B", "Llama-70B", "Qwen3-32B")
    gpus: tuple[Literal[1, 8, 32], ...] = (1, 8, 32)
    compiled: tuple[Literal[1, 8, 32], ...] = ()
    """Numbers of GPUs whose cells the compiler confirms."""
    host_memory: float | None = None
    """GiB for each GPU. Default: 221, an eighth of the 1.9 TB nodes of ALST's runs."""
    formats: tuple[Literal["float32", "int8"], ...] = ("float32", "int8")
    """Of the optimizer: float32 moments and master, or 8-bit moments and no master."""


def main():
    options = tyro.cli(Options)
    environment.prepare(None, absent_devices=True)
    import jax.numpy as jnp

    from alst_jax.config import TrainConfig, UserError
    from alst_jax.hardware.machines import parse_cluster
    from alst_jax.planning.job import Job, describe
    from alst_jax.planning.planner import Planner
    from alst_jax.planning.process import with_room
    from alst_jax.profile import Profile
    from alst_jax.run import make_step

    print("| model | GPUs | optimizer | longest | | host GiB a GPU | profile | ALST |\n|" + "---|" * 8)
    for name, gpus in itertools.product(options.models, options.gpus):
        model, machine = MODELS[name], CLUSTERS[gpus]
        for states in options.formats:
            master = "float32" if states == "float32" else "none"
            memory = None if options.host_memory is None else options.host_memory * min(gpus, 8)
            config = TrainConfig(plan_for=machine, host_memory=memory, find_max_seq_len=True)
            job = Job(
                model,
                Profile(attention="cudnn", compute_dtype="bfloat16"),
                1,
                1024,
                1,
                gpus,
                states=states,
                master=master,
            )
            cluster = with_room(parse_cluster(machine, memory), job)
            planner = Planner.of(config, cluster, functools.partial(make_step, config, cluster, jnp.dtype("bfloat16")))
            planner = dataclasses.replace(planner, compiles=planner.compiles and gpus in options.compiled)
            cell = f"| {name} | {gpus} | {states} "
            try:
                choice = planner.longest(job)
                plan = choice.plan
                host = f"{plan.host_bytes / 2**30:.0f} of {plan.host_limit / 2**30:.0f}"
                cell += f"| {choice.job.length:,} | {plan.source} | {host} | {describe(choice.job)} "
            except UserError as error:
                cell += f"| none | | | {str(error).partition('. What would')[0]} "
            print(cell + f"| {ALST.get((name, gpus), '')} |", flush=True)


if __name__ == "__main__":
    main()
