"""Refusals of flags that are wrong with any model, data and machine."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from alst_jax.config import TrainConfig, parse_steps
from alst_jax.data_flags import data_mistakes
from alst_jax.declare import UserError, flag, too_small
from alst_jax.extend_flags import extend_mistakes
from alst_jax.lora_flags import lora_mistakes
from alst_jax.process_flags import process_mistakes
from alst_jax.profile import TILES
from alst_jax.watch_flags import watch_mistakes


def check_run(config: TrainConfig, several: bool = False) -> None:
    """UserError for flags that are wrong with any model, data and machine. several: whether several processes run."""
    _check_numbers(config)
    config.check(config.clip_norm, config.grad_accum)
    for wrong, message in itertools.chain(_mistakes(config), process_mistakes(config, several)):
        if wrong:
            raise UserError(message)


def _check_numbers(config: TrainConfig) -> None:
    for message in too_small(config):
        raise UserError(message)
    if config.seed >= 2**32:
        raise UserError(f"--seed {config.seed}: must be below 2^32")
    for field in ("learning_rate", "eps"):
        value = getattr(config, field)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag(field)} {value}: must be a positive number")
    for field, value in dataclasses.asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag(field)} {value}: must be a finite number")
    for field in ("beta1", "beta2"):
        if not 0 <= getattr(config, field) < 1:
            raise UserError(f"{flag(field)} {getattr(config, field)}: must be at least 0 and below 1")


def _mistakes(config: TrainConfig) -> Iterator[tuple[Any, str]]:
    """(whether the flags are wrong, message) for each rule."""
    yield from _training_mistakes(config)
    yield from _tracing_mistakes(config)
    yield from _planning_mistakes(config)
    for tile, tiled in TILES.items():
        yield (
            getattr(config, tile) and not getattr(config, tiled),
            f"{flag(tile)} has no meaning with {flag('no_' + tiled)}; leave one of them out",
        )


def _training_mistakes(config: TrainConfig) -> Iterator[tuple[Any, str]]:
    yield (
        not 0 <= config.final_learning_rate_ratio <= 1,
        f"--final-learning-rate-ratio {config.final_learning_rate_ratio}: must be between 0 and 1",
    )
    yield (
        config.steps is not None and config.warmup_steps is not None and config.warmup_steps > config.steps,
        f"--warmup-steps {config.warmup_steps} is more than --steps {config.steps}",
    )
    yield from data_mistakes(config)
    yield (
        config.find_max_seq_len and config.lengths,
        "--find-max-seq-len with --lengths: memory is that of the longest; leave --lengths out",
    )
    yield (
        config.lengths and config.seq_len != max(config.lengths, default=None),
        f"--lengths {' '.join(map(str, config.lengths))}: the longest of them is the length of a sequence, and "
        f"--seq-len says {config.seq_len}; leave --seq-len out, or add it to --lengths",
    )
    yield from watch_mistakes(config)
    yield from lora_mistakes(config)
    yield from extend_mistakes(config)
    yield (
        config.find_max_seq_len and config.pack,
        "--find-max-seq-len with --pack: packed documents need the memory of one as long; leave --pack out",
    )
    yield (
        config.random_weights and config.model is None and not config.resume,
        "--random-weights draws the weights of a model's config.json: name its directory with --model",
    )
    yield (
        config.resize_vocabulary and config.model is None and not config.resume,
        "--resize-vocabulary adds rows to a model's embedding: name the model with --model",
    )
    yield config.resume and config.out is None, "--resume needs --out, the directory of the run to continue"


def _tracing_mistakes(config: TrainConfig) -> Iterator[tuple[Any, str]]:
    if config.profile_steps is not None:
        last = parse_steps(config.profile_steps)[1]
        yield (
            config.steps is not None and last > config.steps,
            f"--profile-steps {config.profile_steps} is after the last of --steps {config.steps}",
        )
        yield (
            config.planning,
            "--profile-steps traces a run, and --plan-only and --find-max-seq-len make none; leave one out",
        )
    yield (
        config.debug_attention_layers is not None and config.resume,
        f"--debug-attention-layers {config.debug_attention_layers} trains nothing that could be resumed; leave out "
        "--resume, and give it an --out of its own",
    )
    yield (
        config.debug_attention_layers is not None and config.save_every is not None,
        f"--save-every {config.save_every} with --debug-attention-layers, which never saves; leave one of them out",
    )


def _planning_mistakes(config: TrainConfig) -> Iterator[tuple[Any, str]]:
    yield (
        config.plan_for is not None and not config.plan_for.strip(),
        "--plan-for '': name a machine, as in H100-80 or 8xH100",
    )
    for field in ("json", "plan_for", "plan_picture", "explain"):
        yield (
            getattr(config, field) and not config.planning,
            f"{flag(field)} is for --plan-only and --find-max-seq-len; a run has the machine it is on",
        )
    yield (config.explain and config.json, "--explain is for people, and --json for programs; leave one of them out")
    yield (
        config.host_memory is not None and not config.host_memory > 0,
        f"--host-memory {config.host_memory}: must be a positive number of GiB",
    )
    yield (
        config.plan_for and config.simulate_devices,
        "--plan-for names the machine and --simulate-devices another; leave one of them out",
    )
    yield (
        config.find_max_seq_len and config.seq_len is not None,
        f"--find-max-seq-len looks for what --seq-len {config.seq_len} says; leave one of them out",
    )
    yield (
        config.allow_narrow_optimizer and config.memory == "manual",
        "--allow-narrow-optimizer is for --memory auto; with manual, say --optimizer-states and --master-weights",
    )
    yield (
        config.planning and config.resume,
        "--plan-only or --find-max-seq-len with --resume: plan the run with its own flags and --model on its directory",
    )
