# pytest tests/unit/test_config.py
"""Flags and their checks; --help without jax."""

import os
import pathlib
import subprocess
import sys
import typing

import jax
import pytest
import typeguard

import train
from alst_jax.config import TrainConfig, UserError
from alst_jax.declare import parse_length
from alst_jax.flag_checks import check_run
from alst_jax.hardware import environment
from alst_jax.models.config import ModelConfig
from tests.helpers import TINY, make_step


@pytest.mark.parametrize(
    "text,tokens",
    [("32768", 32768), ("32k", 32_000), ("32K", 32_000), ("32Ki", 32768), ("0.5M", 500_000), ("1Mi", 2**20)],
)
def test_lengths(text, tokens):
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "abc", "-5", "0", "1.0001k", "12kb", "1e5"])
def test_bad_lengths(text):
    with pytest.raises(ValueError, match="length"):
        parse_length(text)


@pytest.mark.parametrize(
    "flags,message",
    [
        (dict(steps=0), "--steps 0: must be at least 1"),
        (dict(grad_accum=-1), "--grad-accum -1: must be at least 1"),
        (dict(learning_rate=0.0), "--learning-rate 0.0: must be a positive number"),
        (dict(learning_rate=float("nan")), "--learning-rate nan: must be a positive number"),
        (dict(beta2=1.0), "--beta2 1.0: must be at least 0 and below 1"),
        (dict(weight_decay=float("nan")), "--weight-decay nan: must be at least 0"),
        (dict(warmup_steps=11, steps=10), "--warmup-steps 11 is more than --steps 10"),
        (dict(offload_activations=True, remat=False), "it needs --remat"),
        (dict(pack_attention="across"), "needs --pack"),
        (dict(eval_every=3), "--eval-every needs --eval-data"),
        (dict(resume=True), "--resume needs --out"),
        (dict(model="x"), "--model without --data"),
        (dict(loss_tile=8, tiled_loss=False), "--loss-tile has no meaning with --no-tiled-loss"),
        (dict(mlp_tile=8, tiled_mlp=False), "--mlp-tile has no meaning with --no-tiled-mlp"),
        (dict(final_learning_rate_ratio=1.5), "must be between 0 and 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        check_run(TrainConfig(**flags))
    assert message in str(error.value)


def test_defaults_are_accepted():
    check_run(TrainConfig())


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(num_kv_heads=3), "num_key_value_heads=3 must divide num_attention_heads=8"),
        (dict(head_dim=7), "head_dim=7 must be even"),
        (dict(num_layers=0), "num_layers=0"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    good = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=4)
    with pytest.raises(UserError, match=message):
        ModelConfig(**good | fields)


def test_parameter_count_is_that_of_the_tree():
    import jax

    for model in (TINY, ModelConfig(99, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True)):
        assert model.num_params == sum(leaf.size for leaf in jax.tree.leaves(make_step(model).params))


def test_flops_of_llama_8b():
    """Against the count in FLOPs per token published for dense models: 6 N plus attention."""
    model = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128)
    assert model.num_params == 8_030_261_248
    matmul_parameters = model.num_params - 128256 * 4096 - 65 * 4096  # without look-up and norms
    attention = 3 * 32 * 2 * 524288**2 * 4096
    assert model.flops_per_sequence(524288) == pytest.approx(6 * matmul_parameters * 524288 + attention, rel=1e-12)


HELP = """
import runpy, sys
heavy = {"jax", "numpy", "flax", "orbax", "transformers", "tokenizers", "torch", "psutil", "matplotlib", "rich",
         "typeguard", "asyncio", "unittest", "multiprocessing", "concurrent"}
sys.argv = ["train.py", "--help"]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit:
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_help_imports_nothing_heavy():
    """It takes less than a second: typeguard alone, which tyro imports for types of defaults, took a quarter of one."""
    root = pathlib.Path(train.__file__).parent
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=root)
    assert not done.returncode and "--seq-len" in done.stdout, done.stderr


def test_defaults_are_of_their_types():
    """The check that tyro leaves out (`declare.without_typeguard`)."""
    types = typing.get_type_hints(TrainConfig)
    for name, value in vars(TrainConfig()).items():
        typeguard.check_type(value, types[name])
    with pytest.raises(typeguard.TypeCheckError):
        typeguard.check_type("3", types["segment_layers"])


@pytest.mark.parametrize(
    "flags,wrong",
    [
        (dict(clip_norm=1.0), "--clip-norm 1"),
        (dict(clip_norm=0.0, grad_accum=2), "--grad-accum 2"),
        (dict(clip_norm=0.0, remat=False), "--no-remat"),
    ],
    ids=str,
)
def test_an_update_in_the_backward_pass_knows_no_other_gradients(flags, wrong):
    with pytest.raises(UserError, match=f"--update-in-backward with {wrong}: "):
        check_run(TrainConfig(update_in_backward=True, **flags))
    offloaded = dict(update_in_backward=True, clip_norm=0.0, offload_weights=True)
    with pytest.raises(UserError, match="Use it with --offload-weights and --offload-optimizer"):
        check_run(TrainConfig(**offloaded))
    check_run(TrainConfig(**offloaded, offload_optimizer=True))


def test_simulated_devices_wait_for_each_other_on_a_busy_machine(monkeypatch):
    flag = "--xla_cpu_collective_call_terminate_timeout_seconds"
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    for before, after in (("", f"{flag}=1200"), (f"{flag}=7", f"{flag}=7")):
        monkeypatch.setenv("XLA_FLAGS", before)
        environment.prepare(2)
        assert os.environ["XLA_FLAGS"] == after


SCHEDULER, SLICES = "--xla_gpu_enable_latency_hiding_scheduler", "--xla_gpu_enable_dynamic_slice_fusion"
PASSES = "--xla_disable_hlo_passes"
SWITCHED_OFF = "rematerialization,dynamic-slice-copy-fusion-async-wrapper"


@pytest.mark.parametrize(
    "before,after",
    [
        ("", f"{SCHEDULER}=true {SLICES}=false {PASSES}={SWITCHED_OFF}"),
        (f"{SLICES}=true", f"{SLICES}=true {SCHEDULER}=true {PASSES}={SWITCHED_OFF}"),
        (f"{PASSES}=fusion", f"{PASSES}=fusion {SCHEDULER}=true {SLICES}=false"),
    ],
)
def test_compiler_flags_of_a_gpu_run(before, after, monkeypatch):
    for name in (environment.HOST_LIMIT, "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(environment, "visible_gpus", lambda: 0)
    environment.prepare(None)
    assert os.environ["XLA_FLAGS"] == before  # a CPU-only build would abort at flags it does not know
    monkeypatch.setattr(environment, "visible_gpus", lambda: 1)
    monkeypatch.setattr(environment, "has_cuda_compiler", lambda: False)
    environment.prepare(None)
    assert os.environ["XLA_FLAGS"] == before
    monkeypatch.setattr(environment, "has_cuda_compiler", lambda: True)
    environment.prepare(None)
    assert os.environ["XLA_FLAGS"] == after
