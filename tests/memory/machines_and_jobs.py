"""Jobs of large models on machines that are not here."""

import dataclasses
import functools

import jax.numpy as jnp

from alst_jax import run
from alst_jax.config import TrainConfig
from alst_jax.hardware.machines import parse_cluster
from alst_jax.planning.job import Job
from alst_jax.planning.planner import Planner
from alst_jax.profile import Profile
from benchmarks.shapes import LLAMA_8B

H100 = parse_cluster("H100-80", 125)
ON_GPU = Profile(attention="cudnn", compute_dtype="bfloat16")
EIGHT = Job(LLAMA_8B, ON_GPU, 1, 131072)


def maker(config: TrainConfig, dtype: str):
    """A function from jobs to steps, as train.py makes it."""
    return functools.partial(run.make_step, config, H100, jnp.dtype(dtype))


# ------------------------------------------------------------------------------------------------------------- refused


def planner(cluster=H100, compiles=False, **flags) -> Planner:
    """For GPUs that are not here, without a compiler for them."""
    config = TrainConfig(**flags)
    return Planner(config, cluster, compiles, maker(config, "bfloat16"))


def job(model=LLAMA_8B, length=131072, sp=1, dp=1, **changes) -> Job:
    return Job(model, dataclasses.replace(ON_GPU, **changes), dp, length, dp, sp)
