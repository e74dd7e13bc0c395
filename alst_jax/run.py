"""From flags to the parts of a run: model, dtype, profile, data, run directory. Each answers or refuses."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alst_jax.config import TrainConfig, UserError, flag
from alst_jax.data.documents import Sequence, Stats, make_sequences
from alst_jax.data.embedded import python_reference
from alst_jax.data.sources import read_documents
from alst_jax.data.tokenizer import byte_tokenizer, load_tokenizer
from alst_jax.hardware.machines import Cluster, parse_cluster
from alst_jax.models.config import TINY_LLAMA, ModelConfig
from alst_jax.models.hf_config import hf_config_dict, model_config
from alst_jax.models.hf_weights import find_tensors, load_params
from alst_jax.ops.rope import MAX_POSITION
from alst_jax.optim.adamw import AdamW
from alst_jax.parallel.mesh import make_mesh
from alst_jax.planning.compiled import absent_devices
from alst_jax.planning.job import Job
from alst_jax.profile import Profile
from alst_jax.step import TrainStep
from alst_jax.storage import checkpoint as ckpt

OLDEST_JAX_ON_CUDA = (0, 11, 1)  # openxla/xla#46231
CUDNN_MAX_HEAD_DIM = 128  # of the backward pass on every generation
HOPPER = "9.0"  # compute capability
CUDNN_MULTIPLE = 128  # tokens: cuDNN's attention wants whole tiles


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model and where its weights are: a Hugging Face directory, one of our checkpoints, or nowhere (drawn at random)."""

    name: str
    config: ModelConfig
    tokenizer: Any
    files: pathlib.Path | None  # config.json, tokenizer: what the export copies
    hf_weights: pathlib.Path | None = None
    checkpoint: tuple[pathlib.Path, int] | None = None


# ---------------------------------------------------------------------------------------------------------------- model


def find_model(config: TrainConfig, tokenizer: bool = True) -> ModelSource:
    """The model of a run: that of the run directory when resuming, the one named, or the embedded tiny Llama; a plan needs
    no tokenizer."""
    if config.resume:
        run_dir = pathlib.Path(config.out)
        if ckpt.read_run_file(run_dir).get("kind") != "training":
            raise UserError(f"--resume --out {run_dir}: a converted model, not a run; train it with --model {run_dir} and "
                            "another --out")
        files = run_dir / ckpt.MODEL
        named = files if config.model is None else _model_files(config.model)  # compared with the run's own later
        return ModelSource(str(config.model or files), model_config(named), load_tokenizer(files), files)
    if config.model is None:
        return ModelSource("the embedded tiny Llama", TINY_LLAMA, byte_tokenizer() if tokenizer else None, None)
    files = _model_files(config.model)
    parts = (config.model, model_config(files), load_tokenizer(files) if tokenizer else None, files)
    if ckpt.is_checkpoint(config.model):
        return ModelSource(*parts, checkpoint=ckpt.find_checkpoint(config.model))
    return ModelSource(*parts, hf_weights=files)


def _model_files(model: str) -> pathlib.Path:
    """Where the config and tokenizer of --model are."""
    if not model:
        raise UserError("--model '': name a Hugging Face directory, a hub name or a checkpoint")
    return ckpt.find_checkpoint(model)[0] / ckpt.MODEL if ckpt.is_checkpoint(model) else _hub_directory(model)


def _hub_directory(model: str) -> pathlib.Path:
    path = pathlib.Path(model)
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        return path  # model_config says what is wrong with it
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except Exception as error:  # the hub's client raises many kinds, all of which mean: not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--model {model}: no such directory, and no such model could be fetched from the hub "
                        f"({reason})") from error


def for_gpu(config: TrainConfig) -> bool:
    """Whether the run is on GPUs, or planned for them."""
    return config.plan_for is not None or jax.default_backend() == "gpu"


def choose_dtype(config: TrainConfig) -> jnp.dtype:
    """float32 or bfloat16 weights and compute; auto is bfloat16 on GPU."""
    auto = "bfloat16" if for_gpu(config) else "float32"
    dtype = jnp.dtype(auto if config.dtype == "auto" else config.dtype)
    if dtype == jnp.float32 and config.master_weights != "float32":
        raise UserError(f"--master-weights {config.master_weights} is for bfloat16 weights; these are float32 (--dtype)")
    return dtype


def make_profile(config: TrainConfig, dtype: jnp.dtype, model: ModelConfig) -> Profile:
    """The memory profile the flags describe. UserError if the attention kernel cannot run here."""
    on_gpu = for_gpu(config)
    if on_gpu and jax.__version_info__ < OLDEST_JAX_ON_CUDA:
        raise UserError(f"jax {jax.__version__} gives wrong gradients for offloaded activations on CUDA without a word; "
                        f"install {'.'.join(map(str, OLDEST_JAX_ON_CUDA))} or newer")
    attention = config.attention
    if attention == "auto":
        if on_gpu and dtype != jnp.bfloat16:
            raise UserError(f"--dtype {dtype} on a GPU: cuDNN attention computes in bfloat16 only. Use --dtype bfloat16, or "
                            "--attention xla, which is exact and very slow at length")
        attention = "cudnn" if on_gpu else "xla"
    if attention != "xla" and not on_gpu:
        raise UserError(f"--attention {attention} needs an NVIDIA GPU, and jax sees none (is jax[cuda12] or jax[cuda13] "
                        "installed?); use --attention xla")
    if attention != "xla" and dtype != jnp.bfloat16:
        raise UserError(f"--attention {attention} needs --dtype bfloat16; use that or --attention xla")
    if attention == "tokamax":
        _check_tokamax(config)
    if attention != "xla" and (model.head_dim % 8 or model.head_dim > CUDNN_MAX_HEAD_DIM):
        raise UserError(f"--attention {attention}: the model's head_dim={model.head_dim} must be a multiple of 8 up to "
                        f"{CUDNN_MAX_HEAD_DIM}; use --attention xla")
    return Profile(
        loss_tile=(config.loss_tile or 0) if config.tiled_loss else None,
        mlp_tile=(config.mlp_tile or 0) if config.tiled_mlp else None,
        remat=config.remat, offload_activations=config.offload_activations, offload_weights=config.offload_weights,
        offload_optimizer=config.offload_optimizer, update_in_backward=config.update_in_backward,
        segment_layers=config.segment_layers,
        keep_attention_on_device=config.keep_attention_on_device, keep_attention_on_host=config.keep_attention_on_host,
        head_chunks=config.head_chunks, attention=attention, compute_dtype=str(dtype),
        reduce_dtype=config.reduce_dtype)


def _check_tokamax(config: TrainConfig) -> None:
    if config.plan_for:
        machine = parse_cluster(config.plan_for).machine
        name, capability = machine.name, ".".join(map(str, machine.capability))
    else:
        name, capability = jax.devices()[0].device_kind, jax.devices()[0].compute_capability
        if importlib.util.find_spec("tokamax") is None:
            raise UserError("--attention tokamax: the package is not installed (pip install tokamax, or the extra of that "
                            "name); or use --attention cudnn")
    if capability != HOPPER:
        raise UserError(f"--attention tokamax: its kernel was tested on Hopper GPUs only, not on {name}; use --attention cudnn")


def load_weights(source: ModelSource, step: TrainStep, dtype: jnp.dtype, seed: int) -> Any:
    """The weights, sharded and placed as the step wants them."""
    if source.hf_weights is not None:
        if dtype == jnp.bfloat16 and any(t.dtype == np.float32 for t in find_tensors(source.hf_weights).values()):
            print(f"warning: the float32 weights of {source.name} are rounded to bfloat16; --dtype float32 keeps them",
                  file=sys.stderr, flush=True)
        return load_params(source.hf_weights, source.config, step.params)
    if source.checkpoint is not None:
        run_dir, at = source.checkpoint
        checkpoints = ckpt.Checkpoints(run_dir)
        params = checkpoints.restore_params(at, step.params)
        checkpoints.close()
        return params
    return step.init_params(jax.random.key(seed), dtype)


# ----------------------------------------------------------------------------------------------------------------- data


def check_seq_len(config: TrainConfig, model: ModelConfig) -> int:
    """--seq-len, with a warning where the model was not made for it."""
    if config.seq_len is not None and config.seq_len > MAX_POSITION:
        raise UserError(f"--seq-len {config.seq_len}: rotary embedding is exact up to {MAX_POSITION} tokens")
    if config.seq_len is None:
        raise UserError(f"--seq-len: how many tokens a sequence? The model's config says up to "
                        f"{model.max_position_embeddings} (max_position_embeddings)")
    longest = model.max_position_embeddings
    if config.seq_len > longest:
        scaling = "" if model.rope.rope_type == "default" else f" (RoPE scaling {model.rope.rope_type} included)"
        print(f"warning: --seq-len {config.seq_len} is beyond the {longest} positions the model was made for{scaling}: "
              "attention has not learned such distances, so the loss starts high and the model must learn them. To "
              "stretch the positions it knows instead, set rope_parameters (yarn or linear, with a factor) and "
              "max_position_embeddings in config.json", file=sys.stderr, flush=True)
    return config.seq_len


def padded_length(seq_len: int, sp: int, profile: Profile) -> int:
    """seq_len, rounded up to what the mesh and the attention kernel divide; the rest is padding without labels."""
    multiple = math.lcm(sp, CUDNN_MULTIPLE if profile.attention != "xla" else 1)
    return -(-seq_len // multiple) * multiple


def read_sequences(
    config: TrainConfig, source: ModelSource, seq_len: int, held_out: bool = False
) -> tuple[list[Sequence], Stats]:
    """Training (or --eval-data) documents, tokenised and cut."""
    name = "--eval-data" if held_out else "--data"
    paths = (config.eval_data,) if held_out and config.eval_data else () if held_out else config.data
    if paths:
        documents = read_documents(paths, config.text_field, config.messages_field, name)
    else:
        documents = python_reference(held_out)
    return make_sequences(documents, source.tokenizer, seq_len, source.config.vocab_size, name)


def check_enough(config: TrainConfig, sequences: int, per_step: int) -> None:
    """UserError if one step would meet the same sequence twice."""
    if sequences < per_step:
        raise UserError(f"--data gives {sequences} sequences, fewer than the {per_step} of one step (--dp x --batch-size x "
                        "--grad-accum): the same would be repeated in it. Use more data or smaller steps")


def pad_token(tokenizer: Any) -> int:
    """A token to fill up with; it is never learned from, so any will do where the tokenizer names none."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


# -------------------------------------------------------------------------------------------------------- run directory


def check_out(config: TrainConfig) -> pathlib.Path:
    """--out, which must be new or empty, or with --resume hold the run to continue."""
    if config.out is None:
        raise UserError("--out: name a directory for checkpoints, metrics and the trained model")
    out = pathlib.Path(config.out)
    if config.resume:
        return out
    blocked = next((p for p in (out, *out.absolute().parents) if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise UserError(f"--out {out}: {blocked} is a file, not a directory")
    if ckpt.is_run_directory(out) and not ckpt.has_results(out):
        return out  # a run that ended before it saved anything: start it again
    if out.exists() and any(out.iterdir()):
        what = "holds another run" if ckpt.is_run_directory(out) else "is not empty"
        raise UserError(f"--out {out} {what}; choose another directory" +
                        (", or continue that run with --resume" if ckpt.is_run_directory(out) else ""))
    return out


def start_run_directory(out: pathlib.Path, config: TrainConfig, source: ModelSource) -> None:
    """model/ and run.json; nothing was written before, so a refused run leaves no directory behind."""
    if source.files is not None:
        ckpt.copy_model_files(source.files, out / ckpt.MODEL)
    else:
        source.tokenizer.save_pretrained(out / ckpt.MODEL)
        fields = hf_config_dict(source.config) | {
            "bos_token_id": source.tokenizer.bos_token_id, "eos_token_id": source.tokenizer.eos_token_id,
            "pad_token_id": source.tokenizer.pad_token_id}
        (out / ckpt.MODEL / "config.json").write_text(json.dumps(fields, indent=2))
    flags = dataclasses.asdict(config) | {"resume": False}
    ckpt.write_run_file(out, "training", {"flags": flags})


def saved_model(out: pathlib.Path) -> ModelConfig:
    """The model the run began with."""
    return model_config(out / ckpt.MODEL)


def check_geometry(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError if resuming would not see the same data in the same order."""
    meaning = {"data": "--data", "rows": "--dp x --batch-size", "grad_accum": "--grad-accum"}
    changed = [f"{meaning.get(name, flag(name))} ({saved.get(name)} -> {now[name]})" for name in now
               if saved.get(name) != now[name]]
    if changed:
        raise UserError(f"--resume: changed since the checkpoint: {', '.join(changed)}. The position in the data would "
                        "mean something else; set it back, or start a new run with --model on this run's directory")


# --------------------------------------------------------------------------------------------------------------- report


def announce(
    config: TrainConfig, source: ModelSource, step: TrainStep, stats: Stats, seq_len: int, padded_len: int, steps: int,
    done: int, out: str,
) -> None:
    """What is about to happen, in a few lines."""
    dp, sp = step.mesh.devices.shape
    kind = step.mesh.devices.flat[0].device_kind
    profile, model = step.profile, step.model
    on = [name for name, value in (("tiled loss", profile.loss_tile is not None), ("tiled MLP", profile.mlp_tile is not None),
          ("remat", profile.remat), ("activations in host memory", profile.offload_activations),
          ("weights in host memory", profile.offload_weights), ("optimizer in host memory", profile.offload_optimizer),
          ("update in the backward pass", profile.update_in_backward),
          (f"segments of {', '.join(map(str, profile.segment_layers))} layers", profile.segment_layers != (1,)),
          (f"attention of {profile.keep_attention_on_device} layers kept", profile.keep_attention_on_device),
          (f"of {profile.keep_attention_on_host} kept in host memory", profile.keep_attention_on_host),
          (f"{profile.head_chunks} head chunks", profile.head_chunks > 1)) if value]
    idle = jax.device_count() - dp * sp
    print(f"model   {source.name}: {model.num_params / 1e6:,.1f}M parameters, {model.num_layers} layers, "
          f"{profile.compute_dtype}, attention {profile.attention}")
    print(f"mesh    dp {dp} x sp {sp} on {kind}{f'; {idle} devices stay idle' if idle else ''}")
    print(f"memory  {', '.join(on) or 'no feature on'}")
    print(f"data    {stats.summary(seq_len)}" + (f", padded to {padded_len}" if padded_len != seq_len else ""))
    start = f", resumed at step {done}" if done else ""
    a_step = dp * config.batch_size * config.grad_accum
    print(f"steps   {steps} of {a_step} sequences, {steps * a_step / stats.sequences:.1f} times the data{start} -> {out}",
          flush=True)


# ----------------------------------------------------------------------------------------------------------------- step


def make_step(config: TrainConfig, cluster: Cluster | None, dtype: jnp.dtype, job: Job) -> TrainStep:
    """The step of a job on this process's devices, or on the absent devices of --plan-for."""
    optimizer = AdamW(config.beta1, config.beta2, config.eps, config.weight_decay, config.clip_norm,
                      job.states, job.master, config.seed)
    devices = absent_devices(cluster) if config.plan_for else None
    return TrainStep(job.model, make_mesh(job.dp, job.sp, devices), job.profile, optimizer, dtype)
