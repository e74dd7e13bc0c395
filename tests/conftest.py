"""Eight simulated devices, shapes checked on every call, and no silent rank promotion."""

import os

# One heavy process a worker: the simulated devices already share the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PLATFORM = os.environ.get("JAX_PLATFORMS", "cpu")
if PLATFORM == "cpu":
    # Machine code that is compiled fast instead of running fast, here and in the processes tests start: half the time.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_platforms", PLATFORM)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

install_import_hook("alst_jax", "beartype.beartype")
