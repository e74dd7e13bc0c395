"""From flags to the parts of a run, in the order in which train.py needs them. UserError for flags that cannot work."""

import dataclasses
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from alst_jax.config import TrainConfig, UserError
from alst_jax.hardware import environment
from alst_jax.hardware.devices import absent_devices, this_cluster
from alst_jax.hardware.machines import Cluster, parse_cluster
from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.extend import longest as model_length
from alst_jax.models.lora import is_adapter
from alst_jax.models.sizes import parameter_sizes
from alst_jax.models.tree import dotted
from alst_jax.ops.attention import KERNELS, refusal
from alst_jax.ops.attention.devices import Chosen, Gpu, choose_kernel
from alst_jax.ops.rope import MAX_POSITION
from alst_jax.optim.adamw import AdamW
from alst_jax.parallel.mesh import choose_degrees, make_mesh
from alst_jax.parallel.sequence import padded_length
from alst_jax.planning.job import Job
from alst_jax.planning.planner import ANY_LENGTH, Planner
from alst_jax.planning.process import beside, with_room
from alst_jax.profile import Profile
from alst_jax.run_lora import check_others, with_lora
from alst_jax.run_packs import of_short_documents
from alst_jax.step import TrainStep
from alst_jax.storage.source import ModelSource, find_model

OLDEST_JAX_ON_CUDA = (0, 11, 1)  # openxla/xla#46231


def subject(config: TrainConfig) -> tuple[ModelSource, Planner, Job]:
    """The model, the planner of the machine, and the step's shapes. UserError for impossible combinations."""
    # -------------------------------------------------------------------------------------------------- what: the model
    source = find_model(config, tokenizer=not config.planning)
    model = with_lora(config, source)
    largest = parameter_sizes(model).largest * (4 if config.dtype == "float32" else 2)
    environment.leave_room(lambda pools: beside(largest, pools, pools))

    # ------------------------------------------------------------------------------------------- where: devices, mesh
    cluster = target(config)
    dp, sp = choose_degrees(config.dp, config.sp, cluster.devices if config.plan_for else jax.device_count())

    # ------------------------------------------------------------------------------------------ how: the step's shapes
    check_freeze(config.freeze, model)
    if model.lora is not None:
        check_others(config.freeze, model)
    dtype = choose_dtype(config)
    profile = make_profile(config, dtype, source.config)
    if config.attention == "auto" and for_gpu(config):
        print(f"attention {profile.attention}: {attention_kernel(config, dtype, source.config).why}", file=sys.stderr)
    seq_len = ANY_LENGTH if config.find_max_seq_len else check_seq_len(config, source.config)
    job = Job(
        debug_model(config, model),
        profile,
        dp * config.batch_size,
        padded_length(seq_len, sp, profile),
        dp,
        sp,
        accumulation(config, dp),
        config.optimizer_states,
        config.master_weights,
        freeze=config.freeze,
    )
    if config.plan_only and config.pack and config.pack_attention == "documents":
        job = of_short_documents(job)
    cluster = with_room(cluster, job)
    return source, Planner.of(config, cluster, functools.partial(make_step, config, cluster, dtype), job), job


# -------------------------------------------------------------------------------------------------------------- machine


def target(config: TrainConfig) -> Cluster | None:
    """The machine that a command line plans for or runs on; None on a CPU. UserError for --host-memory there."""
    if config.plan_for:
        cluster = parse_cluster(config.plan_for, config.host_memory)
        each, rest = divmod(config.processes or cluster.hosts, cluster.hosts)
        if rest or not each or cluster.per_host % each:
            raise UserError(
                f"--processes {config.processes}: must be the same number on each host of {cluster}, and "
                f"share its devices evenly; use {cluster.hosts} or {cluster.devices}"
            )
        return dataclasses.replace(cluster, used=config.devices, processes=each)
    cluster = this_cluster(config.host_memory, config.devices)
    if cluster is None and config.host_memory is not None:
        raise UserError(
            f"--host-memory {config.host_memory:g}: limits what GPUs may keep in host memory, and jax sees "
            "no GPU; leave it out, or name a machine with --plan-for"
        )
    return cluster


# ---------------------------------------------------------------------------------------------------- model and profile


def check_freeze(pattern: str | None, model: ModelConfig) -> None:
    """UserError unless --freeze matches some of the model's parameters, and leaves some to train."""
    if pattern is None:
        return
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model, np.float32))
    parameters = [dotted(path) for path, _ in leaves if not is_adapter(path)]
    examples = ", ".join(parameters[:: len(parameters) // 3])
    names = f"{examples} and so on; `embed_tokens|lm_head`, for example, freezes the tables (--freeze)"
    try:
        frozen = [name for name in parameters if re.search(pattern, name)]
    except re.error as error:
        raise UserError(
            f"--freeze {pattern!r} is not a regular expression: {error}. It is searched for in the names "
            f"of parameters: {names}"
        ) from error
    if not frozen or model.lora is None and len(frozen) == len(parameters):
        rule = (
            "matches none of the {}, and must match at least one"
            if not frozen
            else ("matches all {}, and must leave at least one to train")
        )
        raise UserError(f"--freeze {pattern!r} {rule.format(len(parameters))}. Names of parameters: {names}")


def debug_model(config: TrainConfig, model: ModelConfig) -> ModelConfig:
    """The model that the step computes: with --debug-attention-layers, one without attention in its later layers."""
    layers = config.debug_attention_layers
    if layers is None:
        return model
    if layers > model.num_layers:
        raise UserError(
            f"--debug-attention-layers {layers}: the model has {model.num_layers} layers; give fewer, to "
            "leave attention out of the others"
        )
    if config.stack == "plain" or not config.remat:
        raise UserError(
            "--debug-attention-layers leaves attention out of the layers whose backward pass is written by "
            "hand; it needs --stack segments and --remat"
        )
    return dataclasses.replace(model, attention_layers=layers)


def for_gpu(config: TrainConfig) -> bool:
    """Whether the run is on GPUs, or planned for them."""
    return config.plan_for is not None or jax.default_backend() == "gpu"


def choose_dtype(config: TrainConfig) -> jnp.dtype:
    """float32 or bfloat16 weights and compute; auto is bfloat16 on GPU."""
    auto = "bfloat16" if for_gpu(config) else "float32"
    dtype = jnp.dtype(auto if config.dtype == "auto" else config.dtype)
    if dtype == jnp.float32 and config.master_weights != "float32":
        raise UserError(
            f"--master-weights {config.master_weights} is for bfloat16 weights; these are float32 (--dtype)"
        )
    return dtype


def make_profile(config: TrainConfig, dtype: jnp.dtype, model: ModelConfig) -> Profile:
    """The memory profile the flags describe. UserError if the attention kernel cannot run here."""
    if for_gpu(config) and jax.__version_info__ < OLDEST_JAX_ON_CUDA:
        raise UserError(
            f"jax {jax.__version__} gives wrong gradients for offloaded activations on CUDA without an "
            f"error; install {'.'.join(map(str, OLDEST_JAX_ON_CUDA))} or newer"
        )
    return config.profile(attention_kernel(config, dtype, model).kernel.name, str(dtype))


def attention_kernel(config: TrainConfig, dtype: jnp.dtype, model: ModelConfig) -> Chosen:
    """The attention kernel of the run, and the reason for it. UserError if it cannot run here, or does not implement
    an option of the model or packed documents."""
    chosen = choose_kernel(config.attention, KERNELS, gpu_of(config), str(dtype), model.head_dim, config.deterministic)
    documents = config.pack and config.pack_attention == "documents"
    if documents and any(rope.needs_length for rope in model.ropes):
        raise UserError(
            "--pack: this model's rotary embedding (dynamic or longrope) depends on the length of the "
            "batch, so a packed document would give another result than alone; use --pack-attention "
            "across, or leave --pack out"
        )
    if config.lengths and any(rope.needs_length for rope in model.ropes):
        raise UserError(
            "--lengths: this model's rotary embedding (dynamic or longrope) depends on the length of the "
            "batch, so a document would give another result in a shorter one; leave --lengths out"
        )
    for kind in model.kinds:
        if reason := refusal(chosen.kernel, model.attention_spec(kind), documents):
            raise UserError(f"{reason} (attention {chosen.kernel.name}: {chosen.why})")
    return chosen


def gpu_of(config: TrainConfig) -> Gpu | None:
    """The GPU of a run, or of its plan; None on a CPU."""
    if not for_gpu(config):
        return None
    if config.plan_for:
        machine = parse_cluster(config.plan_for).machine
        return Gpu(machine.name, ".".join(map(str, machine.capability)), present=False)
    device = jax.local_devices()[0]
    return Gpu(device.device_kind, str(getattr(device, "compute_capability", "")), present=True)


# --------------------------------------------------------------------------------------------------------------- length


def accumulation(config: TrainConfig, dp: int) -> int:
    """Batches of one optimizer step: --grad-accum, or the number that --samples-per-step needs on `dp` replicas."""
    samples, at_once = config.samples_per_step, dp * config.batch_size
    if samples is None:
        return config.grad_accum
    given = f"--samples-per-step {samples}"
    if samples % at_once:
        near = max(1, samples // at_once) * at_once
        raise UserError(
            f"{given}: dp {dp} x --batch-size {config.batch_size} = {at_once} sequences are computed at "
            f"a time, and must divide it; use {near}, {near + at_once} or another multiple, or change --dp "
            "or --batch-size"
        )
    batches = samples // at_once
    if config.grad_accum not in (1, batches):
        raise UserError(
            f"{given} is {batches} batches of dp {dp} x --batch-size {config.batch_size}, but --grad-accum "
            f"is {config.grad_accum}; leave one of them out (on --resume: --grad-accum 1)"
        )
    if config.update_in_backward and batches != 1:
        raise UserError(
            f"{given} is {batches} batches, and --update-in-backward cannot sum the gradients of several; "
            f"use --samples-per-step {at_once}, or leave --update-in-backward out"
        )
    return batches


def check_seq_len(config: TrainConfig, model: ModelConfig) -> int:
    """--seq-len, with a warning where the model was not made for it."""
    if config.seq_len is not None and config.seq_len > MAX_POSITION:
        raise UserError(f"--seq-len {config.seq_len}: rotary embedding is exact up to {MAX_POSITION} tokens")
    if config.seq_len is None:
        raise UserError(
            f"--seq-len: give the number of tokens in a sequence. The model's config says up to "
            f"{model.max_position_embeddings} (max_position_embeddings)"
        )
    longest = model_length(model)
    if config.seq_len > longest:
        scaling = "" if model.rope.rope_type == "default" else f" (RoPE scaling {model.rope.rope_type} included)"
        print(
            f"warning: --seq-len {config.seq_len} is beyond the {longest} positions the model was made for{scaling}: "
            "attention has not learned such distances, so the loss starts high and the model must learn them. To "
            f"stretch the positions it knows instead, use --rope-scaling yarn --rope-factor "
            f"{-(-config.seq_len // longest)}",
            file=sys.stderr,
            flush=True,
        )
    return config.seq_len


# ----------------------------------------------------------------------------------------------------------------- step


def make_step(config: TrainConfig, cluster: Cluster | None, dtype: jnp.dtype, job: Job) -> TrainStep:
    """The step of a job on this process's devices, or on the absent devices of --plan-for."""
    optimizer = AdamW(
        config.beta1,
        config.beta2,
        config.eps,
        config.weight_decay,
        config.clip_norm,
        job.states,
        job.master,
        config.seed,
    )
    mesh = make_mesh(job.dp, job.sp, absent_devices(cluster) if config.plan_for else None)
    return TrainStep(job.model, mesh, job.profile, optimizer, dtype, job.freeze)
