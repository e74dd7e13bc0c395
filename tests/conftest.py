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

# Where arrays have shapes. Checks of every call are slow in the loops of plain Python, above all in planning/.
install_import_hook([f"alst_jax.{name}" for name in (
    "in_backward", "models.block", "ops", "optim", "parallel", "preflight", "stack", "step", "storage", "trainer", "xla")],
    "beartype.beartype")

# Cases whose kind has others in the same list. `pytest -n 2 -m slow` runs them; so does -m 'not gpu' all that needs no GPU.
SLOW = re.compile("|".join((
    # mesh
    r"test_every_feature_changes_nothing\[(?!qwen3.*alone|(smollm3|olmo3).*packed)",
    r"test_on_equals_off_on_one_device\[(?!loss_tile\]|mlp_tile\]|offload_activations\]|offload_weights\])",
    r"test_on_equals_off_on_four_devices\[(?!mlp_tile|.*offload_activations\+offload_weights\+offload_optimizer\])",
    r"test_frozen_parameters_stay_and_the_others_move_as_before\[(?!q_proj-\(1, 4\))",
    r"test_frozen_parameters_with_the_update_in_the_backward_pass\[(?!layers)",
    r"test_the_stack_equals_its_twin\[(?!\{'offload_weights|\{'head_chunks': 2, 'loss.*\(1, 4\)|\{'loss)",
    r"test_the_stack_equals_its_twin\[.*\(1, 1\)\]",
    r"test_the_stack_equals_its_twin\[(?!\{'head_chunks': 2, 'loss).*\(1, 4\)\]",
    r"test_layers_of_two_kinds_equal_a_python_loop\[(?!\(1, 4\))",
    r"test_kinds_matter_and_the_program_does_not_grow_with_depth",
    r"test_equals_the_update_behind_it\[(?!untied-\(2, 2\)|untied-\(1, 1\)-segment_layers=\(2,\)|tied-\(1, 4\))",
    r"test_draws_the_same_random_bits\[bfloat16",
    r"test_mesh_equals_one_device\[(1-2|1-8|4-2)",
    r"test_kv_heads_are_repeated_as_needed\[(8-2-4|8-8-8|6-3-2)",
    r"test_profile_equals_plain\[(head_chunks=[28]|segment_layers=\([34],\)\]|keep_attention_on_host=4|keep_attention_on_device=4)",
    r"test_profile_equals_plain\[segment_layers=(\(2,\)\]|\(2,\)\+keep_attention_on_host=4|\(4,\)|\(2, 1, 1\)\+keep_attention_on_device=1)",
    r"test_profile_on_a_mesh_equals_plain\[\(1, 2\)",
    r"test_with_a_kernel_that_lives_on_kept_statistics\[.*\(4,\)",
    r"test_kept_outputs_spare_attention_forwards\[(segment_layers=\((2,|3)|head_chunks=4-)",
    r"test_packed_documents_equal_documents_one_by_one\[\((1, 1|4, 2)",
    # LoRA: one case of each kind by default
    r"mesh/test_lora\.py::test_no_feature_changes_the_result\[(?!ulysses)",
    r"mesh/test_lora\.py::test_the_program_has_no_gradient_of_a_frozen_weight\[plain",
    r"parity/test_lora\.py::test_(training|files|merged).*\[(?!llama)",
    r"parity/test_lora\.py::test_loss_and_every_gradient\[olmo2",
    # memory
    r"test_a_choice_that_the_compiler_contradicts_is_corrected\[(?!0-0|16106127360|6442450944-18)",
    r"test_the_compiler_has_the_last_word\[0",
    r"test_copies_of_a_device_are_made_as_they_are_written",
    r"test_weights_of_segments_of_two_are_gathered_in_their_turn",
    r"test_bytes_are_those_of_the_compiler\[changes[13]",
    r"test_each_chunk_of_a_real_model_is_written_once\[(32B|70B)-[248]",
    r"test_resident_memory_does_not_grow_with_the_data",  # pages of the page cache: alone on a machine it is right
    # parity: each option keeps its gradients; blocks and every feature on for a few
    r"test_hf_parity.py::(test_block|test_attention_module|test_mlp_module)\[(?!gqa|mqa|biases|yarn\])",
    r"test_hf_parity.py::test_gradients_with_every_feature_on_equal_torch\[(?!gqa|tied|yarn\])",
    r"test_families_parity.py::.*\[(qwen3|mistral|seed_oss|smollm3|granite|olmo2|olmo3, tied|gemma3, untied, biases)\]",
    r"test_qwen2.py::test_loss_and_every_gradient\[tied",
    # command line
    r"test_there_and_back_bit_for_bit\[(?!float32-sharded-tied|bfloat16-single-untied|float16-sharded)",
    r"test_an_interrupted_conversion_leaves_nothing_that_looks_finished\[(?!.*read_part|killed-to_hf-save_params|inter.*run_file)",
    r"test_the_command_of_a_row_learns_from_its_record\[(texts in another|chats in another|instructions \(Dolly|instructions with|fields)",
    r"test_a_run_is_the_same_with_and_without\[(?!\{\}|\{'weights': True, 'pack')",
    # unit
    r"works_a_layer_at_a_time\[(float32-low-bits|bfloat16)",
)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker("slow")
