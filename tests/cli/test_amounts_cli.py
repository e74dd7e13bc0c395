# pytest tests/cli/test_amounts_cli.py
"""train.py: numbers that are not finite, dtypes, amounts of data and memory, random weights."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import train
from alst_jax import run as setup
from alst_jax import trainer
from alst_jax.config import TrainConfig, UserError
from alst_jax.models.config import TINY_LLAMA
from alst_jax.ops.attention import KERNELS
from alst_jax.ops.rope import RopeConfig
from alst_jax.storage.checkpoint import Checkpoints
from convert.to_hf import to_hf
from tests.runs import SHAPE, assert_same_tensors, make_hf, metrics, run_here, write_jsonl

# ------------------------------------------------------------------------------------------------- numbers that are none


def test_a_loss_that_is_not_finite_stops_with_its_state_saved(call, model, data, tmp_path):
    flags = "--seq-len 128 --dp 1 --schedule constant --warmup-steps 0 --clip-norm 0".split()
    flags += ["--model", model, "--data", data, "--out", tmp_path / "run"]
    code, stderr = call(*flags, "--steps", 20, "--learning-rate", 1e15)
    assert code == 2 and "The step was not applied; the state before it, step" in stderr and "is saved" in stderr
    assert "gradients not finite in layers 0, 1" in stderr
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1 and saved[0].isdigit()  # complete, not cut off
    assert not (tmp_path / "run" / "hf").exists()


def test_weights_that_are_not_finite_are_not_saved_and_the_run_can_start_again(call, model, data, tmp_path):
    flags = "--seq-len 128 --dp 1 --steps 1 --schedule constant --warmup-steps 0".split()
    flags += ["--model", model, "--data", data, "--out", tmp_path / "run"]
    code, stderr = call(*flags, "--learning-rate", 3e38, "--weight-decay", 1e3)
    assert code == 2 and "step 1 made weights that are not finite numbers; they are not saved" in stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [] and not (tmp_path / "run" / "hf").exists()
    assert call(*flags, "--learning-rate", 1e-3)[0] == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]


# ------------------------------------------------------------------------------------------------------- dtypes, amounts


def test_the_export_of_a_bfloat16_model_trained_in_float32_is_float32(data, tmp_path):
    model = make_hf(tmp_path / "bfloat16", dtype="bfloat16")
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: w.bfloat16() for name, w in weights.items()}, model / "model.safetensors", metadata={"format": "pt"}
    )
    flags = "--seq-len 128 --dp 1 --steps 2 --learning-rate 1e-5".split()
    assert run_here("--model", model, "--data", data, *flags, "--out", tmp_path / "run") == 0
    to_hf(tmp_path / "run", tmp_path / "converted")
    for export in (tmp_path / "run" / "hf", tmp_path / "converted"):
        loaded = AutoModelForCausalLM.from_pretrained(export)
        assert loaded.dtype == torch.float32
        assert_same_tensors({k: v for k, v in loaded.state_dict().items()}, load_file(export / "model.safetensors"))


def test_the_export_of_a_large_model_is_in_several_files(model, data, tmp_path, monkeypatch):
    """Each is held in host memory, which is nearly full after a long run."""
    monkeypatch.setattr("alst_jax.storage.saving.EXPORT_FILE", 10**5)
    run = tmp_path / "run"
    assert run_here("--model", model, "--data", data, "--seq-len", 128, "--dp", 1, "--steps", 1, "--out", run) == 0
    files = sorted((run / "hf").glob("*.safetensors"))
    exported = LlamaForCausalLM.from_pretrained(run / "hf").state_dict()
    largest = max(x.nbytes for name, x in exported.items())
    assert len(files) > 2 and all(file.stat().st_size < max(10**5, largest) + 10**4 for file in files)
    saved = dict(Checkpoints(run).read_params(1))
    np.testing.assert_array_equal(exported["model.norm.weight"].numpy(), saved["norm", "scale"])


def test_a_step_does_not_meet_a_sequence_twice(call, model, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", ["x" * 100])
    code, stderr = call(
        "--model", model, "--data", one, "--seq-len", 128, "--dp", 2, "--grad-accum", 2, "--out", tmp_path / "run"
    )
    assert code == 2 and "--data gives 1 sequences, fewer than the 4 of one step" in stderr


def test_float32_on_a_gpu_does_not_choose_slow_attention_in_silence(monkeypatch):
    monkeypatch.setattr(setup.jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="--dtype float32 on a GPU: .*--attention xla, which is exact and very slow"):
        setup.make_profile(TrainConfig(), np.dtype("float32"), TINY_LLAMA)


def test_random_weights_need_only_a_config_and_are_exported_only_on_purpose(call, model, data, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(model / "config.json", bare / "config.json")
    flags = ("--data", data, "--seq-len", 128, "--dp", 1)
    code, stderr = call("--model", bare, *flags, "--out", tmp_path / "refused")
    assert code == 2 and "has no tokenizer" in stderr
    out = tmp_path / "run"
    assert run_here("--model", bare, "--random-weights", *flags, "--steps", 1, "--out", out) == 0
    assert metrics(out)[0]["loss"] == pytest.approx(np.log(SHAPE["vocab_size"]), rel=0.05) and not (out / "hf").exists()
    assert run_here("--resume", "--out", out, "--steps", 2, "--export") == 0
    assert [line["step"] for line in metrics(out)] == [1, 2]
    AutoModelForCausalLM.from_pretrained(out / "hf")
    code, stderr = call("--random-weights", "--data", data, "--out", tmp_path / "none")
    assert code == 2 and "name its directory with --model" in stderr


def test_packed_runs_resume_in_the_middle_of_an_epoch_on_another_mesh(model, tmp_path, capfd):
    texts = [" ".join(str(i * n) for n in range(2 + i % 23)) for i in range(1, 60)]
    data, held_out = write_jsonl(tmp_path / "short.jsonl", texts), write_jsonl(tmp_path / "held.jsonl", texts[:9])
    flags = ["--model", model, "--data", data, "--eval-data", held_out, "--no-export"]
    flags += "--seq-len 128 --schedule constant --learning-rate 1e-3".split()
    packed, whole, parts = ("--pack",), tmp_path / "whole", tmp_path / "parts"
    assert run_here(*flags, *packed, "--dp", 2, "--sp", 2, "--steps", 6, "--out", whole) == 0
    out = capfd.readouterr().out
    assert "59 documents in " in out and "% full; at most " in out
    assert run_here(*flags, *packed, "--dp", 2, "--sp", 2, "--steps", 3, "--out", parts) == 0
    assert run_here("--resume", "--out", parts, "--dp", 1, "--batch-size", 2, "--sp", 4, "--steps", 6) == 0
    one, other = metrics(whole), metrics(parts)
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [(line["labels"], line["padding"]) for line in other] == [(line["labels"], line["padding"]) for line in one]
    assert all(line["tokens"] + line["padding"] == 2 * 128 for line in one)
    assert run_here("--resume", "--out", parts, "--steps", 7, "--no-pack") == 2  # other sequences
    alone = tmp_path / "alone"  # the same weights on documents that are not packed: the same held-out loss
    assert (
        run_here("--model", whole, *flags[2:], "--learning-rate", 1e-30, "--dp", 2, "--steps", 1, "--out", alone) == 0
    )
    assert metrics(alone)[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=1e-5)


def test_long_documents_are_dropped_and_counted(model, tmp_path, capfd):
    data = write_jsonl(tmp_path / "mixed.jsonl", ["short one", "x" * 300, "y" * 90])
    flags = ("--model", model, "--data", data, "--seq-len", 128, "--dp", 1, "--steps", 1, "--no-export")
    assert run_here(*flags, "--long-documents", "drop", "--pack", "--out", tmp_path / "run") == 0
    out = capfd.readouterr().out
    assert "1 longer than 128 tokens" in out and "2 documents in 1 packs of 128" in out


def test_random_weights_are_exported_where_that_is_typed():
    flags = ["--model", "m", "--random-weights"]
    assert not train.parse(flags).export and train.parse([*flags, "--export"]).export and train.parse(flags[:2]).export


def test_a_kernel_that_cannot_keep_documents_apart_is_refused_before_anything_is_loaded(monkeypatch):
    flags = dict(model="any", plan_for="H100", attention="cudnn", pack=True)
    setup.make_profile(TrainConfig(**flags), np.dtype("bfloat16"), TINY_LLAMA)
    monkeypatch.setitem(KERNELS, "cudnn", dataclasses.replace(KERNELS["cudnn"], serves=frozenset()))
    with pytest.raises(
        UserError, match="--attention cudnn does not implement documents, .*use --attention xla or flash"
    ):
        setup.make_profile(TrainConfig(**flags), np.dtype("bfloat16"), TINY_LLAMA)
    setup.make_profile(TrainConfig(**flags, pack_attention="across"), np.dtype("bfloat16"), TINY_LLAMA)


def test_ropes_that_depend_on_the_length_are_not_packed():
    model = dataclasses.replace(
        TINY_LLAMA, rope=RopeConfig(rope_type="dynamic", factor=2.0, max_position_embeddings=64)
    )
    with pytest.raises(UserError, match="--pack: this model's rotary embedding .dynamic or longrope."):
        setup.make_profile(TrainConfig(pack=True), np.dtype("float32"), model)
    setup.make_profile(TrainConfig(pack=True, pack_attention="across"), np.dtype("float32"), model)
    with pytest.raises(UserError, match="--lengths: this model's rotary embedding .dynamic or longrope."):
        setup.make_profile(TrainConfig(lengths=(32, 64)), np.dtype("float32"), model)
    setup.make_profile(TrainConfig(lengths=(32, 64)), np.dtype("float32"), TINY_LLAMA)


def test_a_jax_with_wrong_gradients_is_refused(monkeypatch):
    monkeypatch.setattr(setup.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(setup.jax, "__version_info__", (0, 11, 0))
    with pytest.raises(UserError, match="wrong gradients for offloaded activations on CUDA .*install 0.11.1 or newer"):
        setup.make_profile(TrainConfig(), np.dtype("bfloat16"), TINY_LLAMA)


def test_out_of_memory_names_what_is_left_to_try(call, model, data, tmp_path, monkeypatch):
    def too_much(*_):
        jax.block_until_ready(jax.numpy.zeros((2**46,)))

    words, jobs = train.out_of_memory, []
    monkeypatch.setattr(
        train, "out_of_memory", lambda config, reason, job=None: jobs.append(job) or words(config, reason, job)
    )
    monkeypatch.setattr(trainer, "optimizer_step", too_much)
    code, stderr = call(
        "--model", model, "--data", data, "--seq-len", 128, "--dp", 1, "--offload-optimizer", "--out", tmp_path / "run"
    )
    assert code == 2 and "error: out of memory: RESOURCE_EXHAUSTED" in stderr
    assert [job.profile.offload_optimizer for job in jobs] == [True]  # of the profile that ran
    assert "These need less: --offload-activations, --offload-weights, --optimizer-states int8, --head-chunks" in stderr


def test_memory_flags_reach_the_profile():
    flags = dict(
        remat=True,
        offload_activations=True,
        offload_weights=True,
        offload_optimizer=True,
        segment_layers=(2, 1),
        keep_attention_on_device=1,
        keep_attention_on_host=2,
        head_chunks=2,
        reduce_dtype="bfloat16",
        loss_tile=7,
        mlp_tile=5,
    )
    profile = setup.make_profile(TrainConfig(**flags), np.dtype("float32"), TINY_LLAMA)
    assert {name: getattr(profile, name) for name in flags} == flags
    off = setup.make_profile(
        TrainConfig(remat=False, tiled_loss=False, tiled_mlp=False), np.dtype("float32"), TINY_LLAMA
    )
    assert (off.remat, off.loss_tile, off.mlp_tile) == (False, None, None)


def test_optimizer_flags_reach_the_checkpoint(model, data, tmp_path):
    flags = "--seq-len 128 --dp 1 --steps 1 --dtype bfloat16 --optimizer-states int8 --master-weights none".split()
    flags += "--segment-layers 2 --keep-attention-on-host 1 --head-chunks 2".split()
    assert run_here("--model", model, "--data", data, *flags, "--out", tmp_path / "run") == 0
    names = (tmp_path / "run" / "checkpoints" / "1" / "optimizer" / "_METADATA").read_text()
    assert "code" in names and "scale" in names and "master" not in names
