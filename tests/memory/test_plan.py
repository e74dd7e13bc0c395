# pytest tests/memory/test_plan.py
"""The plan: parts that add up, that follow the switches, and that the compiler and the arrays agree with."""

import contextlib
import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from alst_jax.config import UserError
from alst_jax.hardware.environment import has_cuda_compiler
from alst_jax.hardware.machines import GIB, parse_cluster
from alst_jax.models.hf_config import hf_config_dict
from alst_jax.optim.adamw import AdamW
from alst_jax.planning.job import Job
from alst_jax.planning.plan import PARTS, Choice
from alst_jax.planning.report import planned_against_measured
from alst_jax.profile import Profile
from benchmarks.shapes import LLAMA_8B
from tests.helpers import initial, make_step, plan_of, tiny
from tests.runs import run_here

MODEL = tiny(num_heads=8, num_kv_heads=8, attention_bias=False, mlp_bias=False)
TILED = dict(loss_tile=32, mlp_tile=32)


def plan(rows=1, length=1024, grad_accum=1, sp=1, dp=1, dtype=jnp.float32, optimizer=AdamW(), model=MODEL, **changes):
    return plan_of(make_step(model, dp, sp, Profile(**TILED | changes), optimizer, dtype), rows, length, grad_accum)


def temporary(plan):
    return plan.device["working set"] + plan.device["kept activations"]


@pytest.fixture(scope="module")
def base():
    return plan()


def test_parts_are_those_of_the_arrays(base):
    step = make_step(MODEL)
    params = initial(step)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert size == 4 * MODEL.num_params
    assert (base.device["weights"], base.device["gradients"]) == (size, size)
    assert base.device["optimizer"] == sum(x.nbytes for x in jax.tree.leaves(step.init_optimizer(params)))
    assert base.device_bytes == sum(base.device.values()) and base.flops == MODEL.flops_per_sequence(1024)


def test_offloading_moves_parts_to_the_host(base):
    moved = plan(offload_weights=True, offload_optimizer=True)
    assert "weights" not in moved.device and moved.host["weights"] == base.device["weights"]
    assert moved.host["gradients"] == base.device["gradients"]
    assert moved.device["optimizer"] == 4  # the count of steps
    assert moved.host["optimizer"] + 4 == base.device["optimizer"]


def test_each_switch_shows_the_bytes_it_saves(base):
    work = lambda **changes: temporary(plan(**changes))
    wide = dict(model=tiny(vocab_size=4096, intermediate_size=4096, num_layers=2))
    both = work(**wide)
    assert work(**wide, loss_tile=None) > both + 1024 * 4096 * 4  # the logits, at least
    assert work(**wide, mlp_tile=None) > both + 1024 * 4096 * 4  # one of the MLP's intermediates, at least
    assert work(remat=False) > 1.2 * temporary(base)
    assert work(length=2048) > 1.5 * temporary(base)
    assert work(sp=4) < 0.6 * temporary(base)  # tiles and gathered weights do not shrink


def test_shards_dtypes_and_accumulation(base):
    assert plan(sp=8).device["weights"] == base.device["weights"] / 8
    assert plan(dtype=jnp.bfloat16, compute_dtype="bfloat16").device["weights"] == base.device["weights"] / 2
    assert plan(grad_accum=2).device["gradients"] == base.device["gradients"]  # float32 sums alone, in place
    assert plan(grad_accum=2).flops == 2 * base.flops
    narrow = plan(dtype=jnp.bfloat16, compute_dtype="bfloat16", optimizer=AdamW(states="int8", master="none"))
    assert narrow.device["optimizer"] < 0.35 * base.device["optimizer"]
    in_program = lambda p: p.collectives["all-to-all"]["instructions"]
    assert in_program(base) == 0 and in_program(plan(sp=2)) == 12


def test_command_line():
    command = ("--plan-only", "--seq-len", "512", "--dp", "1", "--sp", "4")
    table = train(*command).stdout
    assert "working set" in table and "device GiB" in table and "12 in the program" in table
    assert "whole process" not in table


@pytest.mark.slow  # test_json_for_machines has the keys
def test_json_of_a_compiled_plan():
    values = json.loads(train("--plan-only", "--seq-len", "512", "--dp", "1", "--sp", "4", "--json").stdout)
    assert values["device_bytes"] == sum(values["device"].values()) and set(values["host"]) >= {"kept activations"}
    assert values["flops"] > 0 and values["device_kind"] == "cpu" and values["process_bytes"] is None


# ------------------------------------------------------------------------------------------- machines that are not here


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    """A model directory without weights: plans do not need them."""
    directory = tmp_path_factory.mktemp("8b")
    (directory / "config.json").write_text(json.dumps(hf_config_dict(LLAMA_8B)))
    return str(directory)


@dataclasses.dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def train(*arguments):
    """train.py in this process: no plan for a machine that is not here needs devices of its own."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_here(*arguments)
    return Done(code, out.getvalue(), err.getvalue())


def only_plan(model, *arguments):
    return train("--model", model, "--plan-only", "--plan-for", "H100-80", "--host-memory", "125", *arguments)


@pytest.mark.skipif(has_cuda_compiler(), reason="there the compiler would be asked, and take a minute")
def test_a_plan_for_a_machine_by_arithmetic(llama_8b):
    done = only_plan(llama_8b, "--seq-len", "512Ki", "--allow-narrow-optimizer")
    assert done.returncode == 0, done.stderr
    for part in (
        "estimated, for 1 x H100",
        "weights",
        "optimizer",
        "kept activations",
        "working set",
        "headroom",
        "limit ",
        "the whole process: about 120 of 125 GiB of host memory: 109 in jax's pools",
        "collectives a step",
        "model FLOPs",
        "tok/s, limited by attention backward",
        "measured error",
        "memory: --loss-tile",
        "--offload-activations",
        "lacks",
    ):
        assert part in done.stdout, part


SCHEMA = {  # of --json
    "source": str,
    "device_kind": str,
    "device": dict,
    "host": dict,
    "device_limit": int,
    "host_limit": int,
    "flops": float,
    "collectives": dict,
    "seconds": dict,
    "tokens": int,
    "devices": int,
    "device_bytes": int,
    "host_bytes": int,
    "headroom": int,
    "step_seconds": float,
    "tokens_per_second": float,
    "limiting_term": str,
    "fits": bool,
    "flags": str,
    "seq_len": int,
    "process_bytes": int,
    "host_memory": int,
}


@pytest.mark.skipif(has_cuda_compiler(), reason="there the compiler would be asked, and take a minute")
def test_json_for_machines(llama_8b):
    done = train("--model", llama_8b, "--plan-only", "--plan-for", "8xH100", "--seq-len", "1Mi", "--sp", "8", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert {name: type(value) for name, value in values.items()} == SCHEMA
    assert set(values["device"]) <= set(PARTS) and set(values["host"]) <= set(PARTS)
    assert all(type(size) is int for place in ("device", "host") for size in values[place].values())
    assert values["device_bytes"] == sum(values["device"].values()) == values["device_limit"] - values["headroom"]
    assert values["step_seconds"] == pytest.approx(sum(values["seconds"].values()))
    assert values["limiting_term"] in values["seconds"]
    assert all(set(calls) == {"calls", "bytes"} for calls in values["collectives"].values())
    assert values["tokens_per_second"] == pytest.approx(2**20 / values["step_seconds"])
    assert values["fits"] and values["devices"] == 8
    assert (
        8 * values["host_bytes"]
        < values["process_bytes"]
        < values["host_memory"]
        == parse_cluster("8xH100").host_memory
    )


@pytest.mark.skipif(has_cuda_compiler(), reason="there the compiler would be asked, and take a minute")
def test_devices_that_a_run_leaves_alone_take_no_host_memory(llama_8b):
    arguments = (
        "--model",
        llama_8b,
        "--plan-only",
        "--json",
        "--seq-len",
        "512Ki",
        "--dp",
        "1",
        "--sp",
        "2",
        "--host-memory",
        "240",
    )
    two, eight = (json.loads(train(*arguments, "--plan-for", name).stdout) for name in ("2xH100", "8xH100"))
    assert two == eight and two["host_limit"] == (240 - 16 - 8) * GIB // 2


@pytest.mark.skipif(has_cuda_compiler(), reason="there the compiler would be asked, and take a minute")
def test_the_longest_sequence(llama_8b):
    arguments = ("--model", llama_8b, "--find-max-seq-len", "--plan-for", "H100", "--host-memory", "125")
    values = json.loads(train(*arguments, "--json").stdout)
    assert values["max_seq_len"] % 1024 == 0 and values["max_seq_len"] > 290_000 and values["fits"]
    with_formats = json.loads(train(*arguments, "--json", "--allow-narrow-optimizer").stdout)["max_seq_len"]
    assert with_formats > values["max_seq_len"]
    printed = train(*arguments).stdout
    assert f"longest sequence: {values['max_seq_len']:,} tokens, with --" in printed
    assert "--offload-activations" in printed and "--offload-optimizer" in printed


@pytest.mark.parametrize(
    "arguments,messages",
    [
        (
            ("--seq-len", "512Ki"),
            (
                "--seq-len 524288: does not fit 1 x H100-80, 125 GiB",
                "missing. The longest that fits",
                "--allow-narrow-optimizer",
            ),
        ),
        (
            ("--seq-len", "128Ki", "--memory", "manual"),
            ("GiB of device memory missing", "leave the memory flags to --memory auto"),
        ),
        (
            ("--seq-len", "32Ki", "--host-memory", "20"),
            ("does not fit", "at any length: at 1024 tokens", "GiB of host memory"),
        ),
        (("--seq-len", "32Ki", "--plan-for", "X100"), ("--plan-for X100: no such machine", "the closest is H100-80")),
        (("--seq-len", "32Ki", "--sp", "3"), ("sp=3 needs 3 devices and there are 1",)),
        (("--seq-len", "32Ki", "--segment-layers", "3", "4"), ("7 layers in all, where the model has 32",)),
    ],
)
@pytest.mark.skipif(has_cuda_compiler(), reason="there the compiler would be asked, and take a minute")
def test_what_cannot_be_is_refused(llama_8b, arguments, messages):
    done = only_plan(llama_8b, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr


def test_the_picture(tmp_path, base):
    base.picture(str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--plan-picture .*No such file or directory"):
        base.picture(str(tmp_path / "nowhere" / "plan.png"))
    with pytest.raises(UserError, match="--plan-picture .*plan.doc"):
        base.picture(str(tmp_path / "plan.doc"))


def test_the_picture_needs_matplotlib(monkeypatch, base):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="install the extra `plot`"):
        base.picture("plan.png")


def test_planned_against_measured(base):
    planned = dataclasses.replace(
        base, device={"all": 10 * GIB}, host={"all": GIB}, seconds={"matmuls": 2.0}, devices=4
    )
    one = Job(LLAMA_8B, Profile(compute_dtype="bfloat16"), rows=1, length=65536, sp=4)  # its largest stack: 3.5 GiB
    line = planned_against_measured(Choice(one, planned), 11.0, 23.1, [9.0, 2.0, 2.2, 2.0])
    assert "10.0 GiB planned, 11.0 measured (+10%)" in line and "2.0 s a step planned, 2.0 measured (+0%)" in line
    # of all four devices, which are here: each a pool of 1 beside its part of 3 for a save; 4 beside them, 3 for each but one,
    # and for a fourth of the largest stack 1
    assert "host 4.0 GiB planned, the whole process 21.0, its peak 23.1 measured (+10%)" in line
