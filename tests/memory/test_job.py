# pytest tests/memory/test_job.py
"""Sizes that follow from the parameters; frozen parameters; the costs of sequence parallelism; imports of planning/."""

import ast
import dataclasses
import graphlib
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from alst_jax import planning
from alst_jax.config import TrainConfig
from alst_jax.hardware.machines import parse_cluster
from alst_jax.models.block import abstract_params
from alst_jax.models.lora import Lora
from alst_jax.models.sizes import needed_flops, parameter_sizes, trained_sizes
from alst_jax.parallel.costs import Shapes, Traffic, head_groups, traffic, work
from alst_jax.planning.estimate import estimate
from alst_jax.planning.footprint import dropout_work, layer_work, rebuilt_bytes, state_bytes, trained_bytes, working_set
from alst_jax.planning.job import Job, describe, total
from alst_jax.planning.planner import Planner
from alst_jax.planning.seconds import EXPOSED, collectives, seconds
from alst_jax.planning.seconds import traffic as moved
from alst_jax.profile import Profile
from alst_jax.stack.check import check_profile
from benchmarks.shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B, QWEN3_32B
from tests.helpers import TINY, job_of, make_step, plan_of, tiny

TABLES = "embed_tokens|lm_head"
ON_GPU = Profile(attention="cudnn", compute_dtype="bfloat16")
OFFLOADED = dataclasses.replace(ON_GPU, offload_weights=True, offload_optimizer=True, offload_activations=True)


# ----------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "model", [TINY, tiny(tie_word_embeddings=True, mlp_bias=False), LLAMA_1B, LLAMA_8B, LLAMA_70B, QWEN3_32B]
)
def test_sizes_by_hand(model):
    sizes, d = parameter_sizes(model), model.hidden_size
    tables = 1 if model.tie_word_embeddings else 2
    assert sizes.total == model.num_params and sizes.head == model.vocab_size * d
    assert sizes.tables == tables * sizes.head and sizes.other_leaves == tables + 1
    assert sizes.total == model.num_layers * sizes.layer + sizes.tables + d
    assert sizes.layer_leaves == 9 + 4 * model.attention_bias + 3 * model.mlp_bias
    assert sizes.largest == max(leaf.size for leaf in jax.tree.leaves(abstract_params(model, jnp.float32)))
    assert trained_sizes(model, "no such name") == sizes


def test_a_frozen_parameter_is_named_by_a_pattern():
    whole, model = parameter_sizes(TINY), TINY
    gate = trained_sizes(model, r"mlp\.gate_proj\.kernel")
    assert whole.total - gate.total == model.num_layers * model.hidden_size * model.intermediate_size
    assert (whole.layer_leaves - gate.layer_leaves, gate.tables) == (1, whole.tables)
    heads = trained_sizes(model, "^lm_head")
    assert (heads.head, heads.tables, heads.layer) == (0, whole.head, whole.layer)
    assert trained_sizes(model, "^norm.scale$").total == whole.total - model.hidden_size
    layers = trained_sizes(model, "^layers")
    assert (layers.layer, layers.layer_leaves, layers.largest_stack) == (0, 0, 0) and layers.largest == whole.head


# --------------------------------------------------------------------------------------------------- frozen parameters


@pytest.mark.parametrize("profile", [ON_GPU, OFFLOADED])
@pytest.mark.parametrize("devices", [1, 8])
def test_frozen_tables_have_no_gradients_and_no_states(profile, devices):
    job = Job(LLAMA_8B, profile, 1, 131072, 1, devices)
    frozen = dataclasses.replace(job, freeze=TABLES)
    shard = 2 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size // devices
    (weights, gradients, states), (weights_, gradients_, states_) = state_bytes(job), state_bytes(frozen)
    assert weights_ == weights and gradients - gradients_ == 2 * shard and states - states_ == 12 * shard
    assert trained_bytes(job) - trained_bytes(frozen) == 2 * shard
    plan, less = estimate(job), estimate(frozen)
    for part, difference in (("weights", 0), ("gradients", 2 * shard), ("optimizer", 12 * shard)):
        sizes = [plan.device.get(part, 0) + plan.host.get(part, 0) for plan in (plan, less)]
        assert sizes[0] - sizes[1] == difference, part
    assert plan.flops - less.flops == 2 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size * 131072  # of the head's gradient
    assert less.host["saving"] <= plan.host["saving"]


def test_frozen_parameters_move_less():
    job = Job(LLAMA_8B, OFFLOADED, 1, 131072, 1, 8)
    frozen, table = dataclasses.replace(job, freeze=TABLES), LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    sent = lambda job, name: collectives(job)[name]
    assert sent(job, "reduce-scatter")["bytes"] - sent(frozen, "reduce-scatter")["bytes"] == 2 * table * 4 * 7 // 8
    assert sent(job, "reduce-scatter")["calls"] - sent(frozen, "reduce-scatter")["calls"] == 2
    assert sent(job, "all-gather") == sent(frozen, "all-gather")
    shard = 2 * table // 8  # gradients once in the step; gradients, weights and states there and back in the update
    all_traffic, less = moved(job), moved(frozen)
    assert all_traffic["step"] - less["step"] == 2 * shard
    assert all_traffic["update"] - less["update"] == (2 * 2 + 2 * 2 + 2 * 12) * shard
    here = lambda freeze: moved(dataclasses.replace(job, profile=ON_GPU, freeze=freeze))["device"]
    assert here(None) - here(TABLES) == (2 * 2 + 2 * 2 + 2 * 12) * shard


def test_all_layers_frozen():
    job = Job(LLAMA_8B, ON_GPU, 1, 131072, freeze="^layers")
    assert state_bytes(job)[1] == 2 * (2 * LLAMA_8B.vocab_size + 1) * LLAMA_8B.hidden_size
    # No gradients to reuse buffers of, and no float32 sums of a layer's gradients.
    sums = 4 * parameter_sizes(LLAMA_8B).layer
    assert working_set(dataclasses.replace(job, freeze=None)) - working_set(job) == pytest.approx(1.015 * sums, abs=8)


def test_rows_read_ahead():
    """Of a layer, on the device; and of all layers, which hides the copies of all but each loop's first."""
    row = lambda job: (job.sizes.hidden, job.sizes.heads + job.sizes.statistics)
    ahead = dict(prefetch_activations=True, keep_attention_on_host=10, keep_attention_on_device=2)
    every = Job(LLAMA_8B, dataclasses.replace(OFFLOADED, **ahead), 1, 131072)
    (none, some, last), (hidden, output) = (
        every.segments,
        row(every),
    )  # they keep no output, one in host memory, one here
    assert [every.read_ahead(each) for each in (none, some, last)] == [
        (hidden, 19 * hidden),
        (hidden + output, 9 * (hidden + output)),
        (hidden, hidden),
    ]
    rebuilt = every.changed(segment_layers=(4,))
    assert [rebuilt.read_ahead(each) for each in rebuilt.segments] == [
        *[(0, 0)] * 5,
        (output, 2 * output),
        (output, 2 * output),
        (output, output),
    ]
    here = every.changed(keep_attention_on_device=12, keep_attention_on_host=0, offload_activations=False)
    off = every.changed(prefetch_activations=False)
    assert not any(any(job.read_ahead(each)) for job in (here, off) for each in job.segments)
    assert moved(every)["ahead"] == 29 * hidden + 9 * output and moved(every)["step"] == moved(off)["step"]
    assert working_set(every) - working_set(off) == pytest.approx(1.015 * hidden, abs=8)  # at the last layers
    h100 = parse_cluster("H100-80", 125)
    link = lambda job: seconds(job, h100)["host traffic"]
    assert link(off) - link(every) == pytest.approx(EXPOSED * moved(every)["ahead"] / h100.machine.host_link)


def test_rebuilt_inputs_alone():
    """Segments of 4 layers: three of each compute attention once more, and their outputs are not held."""
    held = Job(LLAMA_8B, dataclasses.replace(OFFLOADED, segment_layers=(4,), keep_attention_on_device=4), 1, 131072)
    alone = held.changed(rebuild_inputs_alone=True)
    assert held.recomputed_attention == list(range(28))
    assert alone.recomputed_attention == sorted([*range(28), *(layer for layer in range(28) if layer % 4 != 3)])
    assert alone.passes.attention_forward - held.passes.attention_forward == 21
    assert rebuilt_bytes(held, held.segments[0]) - rebuilt_bytes(alone, alone.segments[0]) == 3 * (
        held.sizes.heads + held.sizes.statistics
    )
    assert rebuilt_bytes(alone, alone.segments[0]) == 3 * held.sizes.hidden
    each = held.changed(segment_layers=(1,))
    assert each.changed(rebuild_inputs_alone=True).recomputed_attention == each.recomputed_attention


def test_adapters_in_the_plan():
    """Rank 16 beside all linear layers of Llama-8B, by hand."""
    model = dataclasses.replace(LLAMA_8B, lora=Lora(16, 16.0))
    columns = 4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336)  # inputs and outputs of the seven layers
    adapters, kernels, head = 16 * 32 * columns, 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 128256 * 4096
    job = Job(LLAMA_8B, OFFLOADED, 1, 131072)
    beside = dataclasses.replace(job, model=model)
    base = parameter_sizes(LLAMA_8B).total
    assert parameter_sizes(model).adapters == adapters == 41_943_040 and parameter_sizes(model).total == base + adapters
    assert state_bytes(beside) == (2 * base + 4 * adapters, 4 * adapters, 8 * adapters)
    assert trained_bytes(beside) == 4 * adapters
    pairs = LLAMA_8B.causal_pairs(131072) * 32 * 128
    assert beside.flops == (4 * (kernels + head) + 6 * adapters) * 131072 + 12 * pairs
    assert job.flops == 6 * (kernels + head) * 131072 + 12 * pairs and needed_flops(LLAMA_8B, None, 131072) == job.flops
    assert working_set(beside) < working_set(job)
    assert moved(beside)["update"] < moved(job)["update"] / 50
    norms = dataclasses.replace(beside, freeze="proj|embed_tokens|lm_head")
    assert trained_sizes(model, norms.freeze).total == adapters + 65 * 4096
    # Of the norms moments and master; where some parameters have a master, the adapters have one too.
    assert state_bytes(norms)[2] - state_bytes(beside)[2] == 12 * 65 * 4096 + 4 * adapters
    assert state_bytes(dataclasses.replace(norms, master="none"))[2] == 8 * (adapters + 65 * 4096)
    assert "--lora-rank 16" in describe(beside)
    dropped = dataclasses.replace(beside, model=dataclasses.replace(model, lora=Lora(16, 16.0, dropout=0.1)))
    assert "--lora-rank 16 --lora-dropout 0.1" in describe(dropped)
    an_input_and_its_mask = 2 + 1
    assert dropout_work(dropped) == dropped.tiles.mlp * (14336 + 2 * 4096) * an_input_and_its_mask
    assert dropout_work(beside) == 0


def test_a_plan_follows_the_steps_frozen_parameters():
    """By the compiler: its parts come from the trees of the step."""
    step = lambda freeze: make_step(TINY, profile=Profile(loss_tile=32, mlp_tile=32), freeze=freeze)
    whole, frozen = plan_of(step(None), 1, 64), plan_of(step(TABLES), 1, 64)
    assert whole.device["gradients"] - frozen.device["gradients"] == 2 * TINY.vocab_size * TINY.hidden_size * 4
    assert whole.device["weights"] == frozen.device["weights"] and job_of(step(TABLES), 1, 64).freeze == TABLES


def test_the_flag_is_in_the_words():
    job = Job(LLAMA_8B, ON_GPU, 1, 1024, freeze=TABLES)
    assert "--freeze 'embed_tokens|lm_head'" in describe(job)
    assert "--freeze norm" in describe(dataclasses.replace(job, freeze="norm"))
    assert "--freeze" not in describe(dataclasses.replace(job, freeze=None))


# ------------------------------------------------------------------------------------------------ sequence parallelism


def shapes(**changes) -> Shapes:
    """32 query heads and 8 kv heads of 100 bytes."""
    return Shapes(**dict(q=3200, kv=800, heads=32, kv_heads=8, degree=1, chunks=1, wide=2) | changes)


def test_traffic_by_hand():
    assert traffic(shapes()) == traffic(shapes(chunks=4)) == Traffic()
    array = 2 * 3200 + 2 * 800  # q and o, k and v
    assert traffic(shapes(degree=8)) == Traffic(4, array * 7 // 8, 8, 2 * array * 7 // 8)
    repeated = 2 * 3200 + 2 * 800 * 4  # 8 kv heads for 32 devices
    assert traffic(shapes(degree=32)) == Traffic(4, repeated * 31 // 32, 8, 2 * repeated * 31 // 32)
    shared = 2 * 3200 + 2 * 800 * 2 * 2  # each of 16 groups of heads sends half of the kv heads' group, twice
    assert traffic(shapes(degree=2, chunks=16)) == Traffic(64, shared // 2, 128, shared)


def test_work_by_hand():
    alone, swapped = work(shapes()), work(shapes(degree=8))
    assert (alone.swaps, alone.before, alone.output_copy, alone.lone_output_copy) == (False, 0, 0, 0)
    assert alone.peak == alone.during == 2 * 3200 + 4 * 800
    assert (swapped.swaps, swapped.output_copy, swapped.lone_output_copy) == (True, 3200, 3200)
    assert swapped.peak == swapped.before == 3 * 3200 + 2 * 800
    assert work(shapes(degree=32)).output_copy == 0  # one head's transpose is no copy
    groups = work(shapes(degree=2, chunks=8))
    assert (groups.before, groups.during) == (0, 4 * 400 + 4 * 100 * 2 + 2 * 800)  # a kv head for each of two devices
    assert (groups.output_copy, groups.lone_output_copy) == (3200, 0)
    assert work(shapes(chunks=16)).during == 4 * 200 + 4 * 100 + 2 * 800 * 2  # sums in float32


def test_head_groups_and_local_heads():
    assert head_groups(32, 8, 1, 8) == head_groups(32, 8, 4, 8) == [1, 2, 4, 8]
    assert head_groups(32, 8, 8, 8) == [1, 2, 4] and head_groups(32, 8, 3, 8) == []
    assert [shapes(degree=d, chunks=c).local_heads for d, c in ((1, 1), (8, 1), (4, 8))] == [32, 4, 1]


def test_plans_count_with_them():
    """Bytes that sequence parallelism adds are bytes that a plan adds; here the peak is at the MLP, with that copy."""
    job = Job(LLAMA_8B, ON_GPU, 1, 131072, 1, 8)
    before, kept = total(layer_work(job)), dataclasses.replace(job).kept
    more = dataclasses.replace(job.attention_work, output_copy=job.attention_work.output_copy + 10**11)
    job.__dict__["attention_work"] = more
    assert total(layer_work(job)) == before + 10**11 and job.kept == kept
    assert json.loads(estimate(job).to_json())["device_bytes"] > estimate(dataclasses.replace(job)).device_bytes


# -------------------------------------------------------------------------------------------------------------- imports


def planning_imports(tree: ast.AST) -> set[str]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in nodes for alias in node.names]
    return {name.split(".")[2] for name in names if name.startswith("alst_jax.planning.")}


def test_no_file_of_planning_imports_in_a_cycle():
    files = {file.stem: ast.parse(file.read_text()) for file in pathlib.Path(planning.__path__[0]).glob("*.py")}
    order = graphlib.TopologicalSorter({name: planning_imports(tree) for name, tree in files.items()})
    assert set(order.static_order()) == set(files)  # CycleError otherwise
    functions = [node for tree in files.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not set().union(*map(planning_imports, functions))


def test_auto_plans_what_the_plain_stack_has():
    """Its choice passes the step's own check, and says the flag."""
    config = TrainConfig(plan_for="8xH100", sp=8, stack="plain")
    job = Job(LLAMA_8B, dataclasses.replace(ON_GPU, stack="plain"), 1, 131072, 1, 8)
    planner = Planner(config, parse_cluster("8xH100"), False, lambda job: None)
    found = planner.choose(job).job
    check_profile(found.profile, LLAMA_8B, 8)
    assert "--stack plain" in describe(found)
