"""Eight simulated devices, shapes checked on every call, and no silent rank promotion."""

import os
import re

# One heavy process a worker: the simulated devices already share the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PLATFORM = os.environ.get("JAX_PLATFORMS", "cpu")
if PLATFORM == "cpu":
    # Machine code that is compiled fast instead of running fast, here and in the processes tests start: half the time.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_platforms", PLATFORM)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

install_import_hook("alst_jax", "beartype.beartype")

# Cases whose kind has others in the same list. `pytest -n 2 -m slow` runs them; so does -m 'not gpu' all that needs no GPU.
SLOW = re.compile("|".join((
    r"test_every_feature_changes_nothing\[(?!qwen3.*alone|(smollm3|olmo).*packed)",
    r"test_frozen_parameters_stay_and_the_others_move_as_before\[(?!embed_tokens|q_proj-\(1, 4\))",
    r"test_the_stack_equals_its_twin\[.*\(1, 1\)\]",
    r"test_the_stack_equals_its_twin\[(?!\{'head_chunks': 2, 'loss).*\(1, 4\)\]",
    r"test_equals_the_update_behind_it\[tied-(?!\(1, 4\))",
    r"test_layers_of_two_kinds_equal_a_python_loop\[\(1, 1\)-\{'stack'",
    r"works_a_layer_at_a_time\[(float32-low-bits|bfloat16)",
    r"test_families_parity.py::.*\[(qwen3|mistral|seed_oss|smollm3|granite|olmo2|olmo3, tied|gemma3, untied, biases)\]",
    r"test_profile_equals_plain\[(head_chunks=[28]|segment_layers=\([34],\)|keep_attention_on_host=4)\]",
    r"test_a_run_is_the_same_with_and_without\[(?!\{\}|\{'weights': True, 'pack')",
    r"test_resident_memory_does_not_grow_with_the_data",  # pages of the page cache: alone on a machine it is right
    r"test_each_chunk_of_a_real_model_is_written_once\[(32B|70B)-[248]",
)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker("slow")
