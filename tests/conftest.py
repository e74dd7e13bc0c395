"""Eight simulated devices, shapes checked on every call, and no silent rank promotion."""

import gc
import importlib.abc
import importlib.machinery
import os
import re
import sys

if sys.dont_write_bytecode:
    # Some machines are set so. Each process would compile the sources of all packages again: 8 s, and 30 with torch.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(cache, "alst_jax-tests")

# One heavy process a worker: the simulated devices already share the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of torch and numpy that wait for each other spin: 20 s a test
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Tracing makes many objects that live: the collector would look at all of them often.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

jax.config.update("jax_numpy_rank_promotion", "raise")

# Where arrays have shapes. Checks of every call are slow in the loops of plain Python, above all in planning/.
install_import_hook(
    [
        f"alst_jax.{name}"
        for name in (
            "in_backward",
            "models.block",
            "ops",
            "optim",
            "parallel",
            "preflight",
            "stack",
            "step",
            "storage",
            "trainer",
            "xla",
        )
    ],
    "beartype.beartype",
)


class Unchecked(importlib.abc.MetaPathFinder):
    """Modules of plain numbers in these packages: a plan calls them 120,000 times, and half of its time were checks."""

    def find_spec(self, name, path, target=None):
        costs = name.startswith("alst_jax.") and name.endswith(".costs")
        return importlib.machinery.PathFinder.find_spec(name, path, target) if costs else None


sys.meta_path.insert(0, Unchecked())

# Cases whose kind has others in the same list. `pytest -n 2 -m slow` runs them; so does -m 'not gpu' all that needs no GPU.
SLOW = re.compile(
    "|".join(
        (
            # mesh
            r"test_every_feature_changes_nothing\[(?!olmo3.*packed)",
            r"test_norms_over_all_heads",
            r"test_on_equals_off_on_one_device",
            r"test_on_equals_off_on_four_devices",  # test_torch_training has all of them on 2x4
            r"test_lengths_that_nothing_divides",  # test_ops has such tiles
            # mesh/test_lora and parity/test_qwen2 freeze; unit/test_freeze has the patterns
            r"test_frozen_parameters_stay_and_the_others_move_as_before",
            r"test_the_stack_equals_its_twin",  # PLAIN is that twin: test_features, test_levels compare with it
            r"test_no_gradient_buffer_for_frozen_parameters",
            r"test_frozen_parameters_with_the_update_in_the_backward_pass",
            r"test_specs_of_the_xla_kernel\[None-(?!.*scale=None.*causal=False)",  # a window: with documents
            r"test_specs_of_the_xla_kernel\[documents1-(?!.*scale=0.7)",
            r"test_layers_of_two_kinds_equal_a_python_loop",  # olmo3 has two kinds, with features and against torch
            r"test_kinds_matter_and_the_program_does_not_grow_with_depth",
            r"test_equals_the_update_behind_it\[(?!untied-\(2, 2\))",
            r"test_draws_the_same_random_bits",
            r"test_mesh_equals_one_device",  # test_torch_training: 2x4 with tiles; mesh/test_levels: 2x2
            r"test_kv_heads_are_repeated_as_needed",  # the test after it has the all-to-all alone; test_torch_training a step
            r"test_a_rank_whose_labels_are_all_ignored",  # test_padding_behind_a_document_changes_nothing has one
            r"test_two_rows_a_device_equal_one",  # test_everything_is_sharded has two, mesh/test_levels has two on 2x2
            r"test_equal_to_the_sum_of_separate_gradients",  # test_torch_training sums two batches in host memory
            r"test_profile_equals_plain",  # mesh/test_levels has segments, chunks, kept arrays, tiles, host memory
            r"test_the_twin_keeps_inputs_alone",
            r"test_profile_on_a_mesh_equals_plain",  # test_families_profiles, too; test_torch_training has the updates
            r"test_with_a_kernel_that_lives_on_kept_statistics",  # mesh/test_levels has such a kernel
            r"mesh/test_levels\.py::test_each_level_equals_the_plain_step\[\(1, 1\)",
            r"test_kept_outputs_spare_attention_forwards\[(segment_layers=\((2,|3)|head_chunks=4-)",
            r"test_packed_documents_equal_documents_one_by_one",  # test_families_profiles: packed, windows, all features
            r"test_borders_count",  # the control of the test above
            r"test_an_update_in_the_backward_pass_on_packed_documents",
            r"test_257_documents_in_one_sequence",
            # LoRA: one case of each kind by default
            r"mesh/test_lora\.py::test_no_feature_changes_the_result\[(?!ulysses)",
            r"mesh/test_lora_dropout\.py::test_no_feature_changes_the_masks",  # a step of training draws them below
            r"mesh/test_lora\.py::test_the_program_has_no_gradient_of_a_frozen_weight\[plain",
            r"parity/test_lora\.py::test_(training|files|merged).*\[(?!llama)",
            r"parity/test_lora\.py::test_loss_and_every_gradient\[(olmo2|llama)",  # training: llama
            r"test_sequence_parallel_with_all_features_equals_data_parallel_without",  # test_torch_training has all of them
            r"mesh/test_interfaces.py::test_heads_are_slices\[[28]\]",
            r"test_stages_have_names",
            r"test_each_option_changes_the_loss",  # test_families_parity has the options, against torch
            r"test_the_input_of_the_first_segment_is_looked_up_again",
            r"test_a_loop_of_dense_calls_on_four_devices",  # test_buckets has the loop, the stand-in for flash the mesh
            r"test_same_seed_gives_the_same_weights_on_every_mesh",
            r"test_one_device_compiles_to_no_collectives",
            r"test_token_losses.py::test_packed_documents_are_those_alone",
            # memory
            r"test_the_choice_fits_and_the_next_faster_does_not\[(786432|524288-search1)",  # formats: the test of them
            r"memory/test_plan\.py::test_what_cannot_be_is_refused\[arguments[02]",  # test_decide has their words
            r"test_a_choice_that_the_compiler_contradicts_is_corrected\[(?!0-0|16106127360)",
            r"test_a_run_compiles_nothing_that_its_plan_has_compiled\[manual",
            r"test_gradient_and_update_are_compiled_as_a_run_calls_them",
            r"test_an_update_in_the_backward_pass_stores_no_gradients",
            r"test_a_debug_run_has_the_profile_of_the_whole_run",
            r"test_attention_in_some_layers_needs_the_bytes_of_all",
            r"test_what_is_kept_is_what_the_compiler_keeps",
            r"test_shards_dtypes_and_accumulation",
            r"test_each_switch_shows_the_bytes_it_saves",  # test_memory has tiles, layers and ranks
            r"test_the_longest_sequence",  # of the command; test_auto has the search
            r"test_devices_that_a_run_leaves_alone_take_no_host_memory",
            r"test_a_kind_of_profile_that_is_misjudged_does_not_condemn_the_others",
            r"test_a_plan_follows_the_steps_frozen_parameters",
            r"test_it_is_a_line_of_every_plan\[changes1",
            r"test_the_compiler_has_the_last_word",  # the longest length is one that compiles; test_auto: a choice is corrected
            r"test_copies_of_a_device_are_made_as_they_are_written",
            r"test_weights_of_segments_of_two_are_gathered_in_their_turn",
            r"test_bytes_are_those_of_the_compiler\[changes[0124]",
            r"test_each_chunk_of_a_real_model_is_written_once\[(32B|70B)-[248]",
            r"test_resident_memory_does_not_grow_with_the_data",  # pages of the page cache: alone on a machine it is right
            # parity: each option keeps its gradients; blocks and every feature on for a few
            r"test_hf_parity.py::(test_block|test_attention_module|test_mlp_module)\[(?!gqa|mqa|biases|yarn\])",
            r"test_hf_parity.py::test_gradients_with_every_feature_on_equal_torch",  # test_torch_training has all of them
            r"test_hf_parity.py::test_logits_loss_and_every_gradient\[(mha|mqa|head_dim|linear|yarn_)",
            r"test_families_parity.py::.*\[(qwen3|mistral|seed_oss|smollm3|granite|olmo2|olmo3, tied|gemma3, untied, biases)\]",
            r"test_families_parity.py::test_loss.*\[(mistral, tied, w|olmo2, tied, b)",  # qwen3: windows; olmo3: its norms
            r"test_families_parity.py::test_loss_and_every_gradient\[phi3(\]|.*short)",
            r"test_families_parity.py::test_logits\[(?!gemma3\])",  # the loss and every gradient are compared
            r"test_qwen2.py::test_loss_and_every_gradient",
            r"test_qwen2.py::test_training_one_step_equals_torch_with_frozen_parameters\[tied",
            r"test_training_is_that_of_torch\[one device",
            r"test_a_small_mistake_would_show",
            r"parity/test_lora_bfloat16.py::test_a_norm_in_bfloat16_beside_adapters_has_a_master",
            r"test_hf_parity.py::test_logits_loss_and_every_gradient\[(biases|llama3|tied)\]",  # families have them
            r"test_torch_training.py::test_the_comparison_covers_what_it_should",  # the control of the test before it
            r"test_qwen2.py::test_logits",  # the training step is compared
            r"test_text_config.py::test_the_loss_and_every_gradient_of_the_language_model",  # gemma3 alone, and end to end
            r"test_families_parity.py::test_loss_and_every_gradient\[qwen2, windows",  # qwen3, windows; test_qwen2
            r"test_a_plan_for_a_machine_by_arithmetic",  # test_json_for_machines and the commands of pages plan so, too
            r"test_a_debug_run_compiles_its_own_programs_before_the_first_step",
            r"test_the_writer_of_many_cores_stays_within_its_part",
            r"test_packed_on_a_mesh_equals_one_at_a_time",  # test_extend_cli evaluates packs on sp 2
            # command line
            r"test_a_step_takes_as_many_sequences_on_any_mesh",  # test_batches_of_a_step; test_old_runs: another mesh
            r"test_weighted_sources_resume_where_they_stopped",  # test_sources: from the start
            r"test_sigterm_saves_too",  # processes/test_train: a signal saves
            r"test_there_and_back_bit_for_bit\[(?!float32-sharded-tied|bfloat16-single-untied|float16-sharded)",
            r"test_an_interrupted_conversion_leaves_nothing_that_looks_finished\[(?!.*file_part|killed-to_hf-save_params|inter.*run_file)",
            r"test_the_command_of_a_row_learns_from_its_record\[(texts in another|chats in another|instructions \(Dolly|instructions with|fields)",
            r"test_a_run_is_the_same_with_and_without\[(?!\{\}|\{'weights': True, 'pack')",
            r"test_stopped_and_resumed_is_as_if_never_stopped",  # in this process: SIGTERM, and a resumed run bit for bit
            r"test_packed_runs_resume_in_the_middle_of_an_epoch_on_another_mesh",  # each by itself: test_steps_cli
            r"test_optimizer_flags_reach_the_checkpoint",
            r"test_sequences_beyond_the_models_positions_are_warned_of",
            r"test_lengths_change_the_padding_and_nothing_else",  # test_buckets, test_features: padding; test_files: lengths
            r"test_weights_that_are_not_finite_are_not_saved_and_the_run_can_start_again",
            r"test_the_export_of_a_bfloat16_model_trained_in_float32_is_float32",
            r"test_a_run_keeps_its_template_and_its_date",
            r"test_an_adapter_goes_on",
            r"test_a_run_that_goes_back_equals_one_whose_data_lack_the_batch",  # test_refused_steps has its steps
            r"test_added_data_are_learned_from_then_on",
            r"test_a_checkpoint_holds_the_weights_of_its_step",
            r"test_long_documents_are_dropped_and_counted",
            r"test_the_export_of_a_large_model_is_in_several_files",
            # processes and faults
            r"test_the_others_outlive_process_0",
            # refusals that tests of the function have, too: unit/test_config, test_freeze, test_records, test_sources,
            # test_watch, test_run_directory; test_hf_config, test_data; test_hf_refusals, test_headers,
            # test_checkpoint_files; test_files, test_bad_records, test_sequences, test_label_templates
            r"test_refused\[train: (no steps|a negative number|no number as|a beta|a ratio|no devices|a tile)",
            r"test_refused\[train: (no regular|a pattern of everything|a date|no template|a held-out|a weight|a source)",
            r"test_refused\[train: (samples of|spikes|back to|a run that|a resume of)",
            r"test_refused\[model: (no config|no JSON|bytes|no vocabulary|quantised|half|a tokenizer that)",
            r"test_refused\[weights: (no weights|half|an index of nothing|a tensor of another shape|a tensor beyond)",
            r"test_refused\[weights: (a pointer|pickled)",
            r"test_refused\[data: (no such|an empty file|blank|a list|records of|a number|no Parquet|no list|no answer)",
            r"test_refused\[data: (a picture|two formats at|other bytes|UTF|a row|two columns|an open|no Arrow|packed)",
            r"test_refused\[data: (JSON cut|half a char|a weight of two|short|tools that)",
            r"test_refused\[(resume: (no run|half|no checkpoints|another seed|a number out)|convert: no checkpoint)",
            # unit
            r"test_the_trace_contains_every_named_scope",
            r"test_work_(follows_the_documents|grows_with_length)",
            r"test_a_save_that_was_cut_off_is_never_found",
            r"test_equals_optax_wherever_it_lives\[profile([1234])",
            r"test_loading_takes_the_memory_of_about_one_shard",
            r"test_buckets.py::test_dense_calls_equal_documents\[(?!at the sizes)",
            r"test_an_update_is_in_place_and_works_a_layer_at_a_time\[int8",
            r"test_narrow_state_trains_like_float32",  # test_on_a_mesh_and_streamed_from_the_host
            r"test_on_a_mesh_and_streamed_from_the_host\[.*int8",  # test_old_runs steps with it
            r"test_bfloat16_weights_follow_a_float32_master",  # test_low_bits_are_a_float32_master, test_torch_training
            r"test_low_bits_are_a_float32_master_to_the_last_bit\[device",
            r"test_xla_attention\[[14]\]",
            r"test_output_and_gradients_equal_a_column_of_scores\[(cap|window)",
            r"test_tiles_that_read_a_part_of_the_keys_equal_a_mask.*-(16|202)\]",
            # by default a window with a cap, many documents, and a window that sees both ways among documents
            r"test_tiles_that_read_a_part_of_the_keys_equal_a_mask\[AttentionSpec\(scale=None, window=2,",
            r"test_tiles_that_read_a_part_of_the_keys_equal_a_mask\[.*window=5, soft_cap=None, causal=True",
            r"test_tiles_that_read_a_part_of_the_keys_equal_a_mask\[.*window=None, soft_cap=None",
            r"test_written_as_it_was_read\[(?!torch.bfloat16-pinned)",  # test_hf_weights and test_convert: float32
            r"test_the_border_is_transformers\[(?!Mistral)",  # test_families_parity has windows of each of them
            r"unit/test_optimizer\.py::test_equals_torch",  # test_torch_training has its AdamW
            r"test_every_bit_survives_meshes_and_memory_kinds\[float32",
            r"test_a_save_is_not_reached_by_the_updates_that_follow\[device",
            r"test_large_arrays_are_restored_some_rows_at_a_time\[device",
            r"test_old_checkpoints_make_room\[(None|2)",
            r"test_changed_files_have_stores_of_their_own\[(time|size)",
            r"works_a_layer_at_a_time\[(float32-low-bits|bfloat16)",
        )
    )
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker("slow")
    items.sort(key=lambda item: "processes/test_train.py" not in item.nodeid)  # the longest first, not last and alone


def pytest_configure(config):
    """Simulated devices, or with `-m gpu` those of the machine; JAX_PLATFORMS has the last word."""
    on_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr or "") is not None
    platform = os.environ.get("JAX_PLATFORMS") or ("cuda" if on_gpu else "cpu")
    jax.config.update("jax_platforms", platform)
    jax.config.update("jax_num_cpu_devices", 8)
    if platform == "cpu":
        # Machine code that is compiled fast instead of running fast, here and in the processes tests start: half the
        # time.
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
    if on_gpu:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # some tests start processes on the same GPU
        try:
            jax.devices("gpu")
        except RuntimeError as error:
            pytest.exit(f"-m gpu: jax finds no CUDA GPU here: {str(error).splitlines()[0]}", returncode=1)
