"""A run with adapters: from its flags to the model's adapters, the base model's identity, and the exports."""

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from alst_jax.config import TrainConfig, UserError
from alst_jax.declare import flag
from alst_jax.models.block import abstract_params
from alst_jax.models.config import ModelConfig
from alst_jax.models.extend import is_extended, rope_flags
from alst_jax.models.families import FAMILIES
from alst_jax.models.lora import LINEARS, Lora, is_adapter, is_trained
from alst_jax.models.merging import merged
from alst_jax.models.other_weights import has_others
from alst_jax.models.peft_files import BASE, CONFIG, Base, load_adapter, read_base, read_lora, save_adapter
from alst_jax.models.tree import names
from alst_jax.step import TrainStep
from alst_jax.storage import run_directory
from alst_jax.storage.source import ModelSource, find_model, identity, load_weights

ADAPTER = "adapter"  # OUT/adapter


def with_adapter(config: TrainConfig) -> TrainConfig:
    """The flags, with the settings of the directory of --adapter. A resumed run has these settings already."""
    if config.adapter is None:
        return config
    if config.resume:
        begun = run_directory.read_run_file(config.out).get("flags", {}).get("adapter")
        if config.adapter != begun:
            raise UserError(
                f"--adapter {config.adapter} with --resume: the run in {config.out} began with "
                f"{begun or 'no adapter'}, and its checkpoint goes on from there; leave --adapter out, or "
                "start a new run with it"
            )
        return config
    found, dropout, base = read_lora(config.adapter)
    dropout = dropout if config.lora_dropout is None else config.lora_dropout
    said = {
        "lora_rank": found.rank,
        "lora_alpha": found.alpha,
        "rslora": found.rslora,
        "lora_targets": ",".join(found.targets),
    }
    for name, value in said.items():
        given = getattr(config, name)
        typed = given != getattr(TrainConfig, name)
        if name == "lora_targets" and _targets(config) == found.targets:  # in another order
            continue
        if typed and given != value:
            raise UserError(
                f"{flag(name)} {given}: the adapter in {config.adapter} has {value}; leave {flag(name)} out"
            )
    print(f"adapter {config.adapter}: made beside {base or 'a model that it does not name'}", flush=True)
    return dataclasses.replace(config, **said, lora_dropout=dropout)


def with_lora(config: TrainConfig, source: ModelSource) -> ModelConfig:
    """The model of a run: with adapters, if flags ask for them. UserError for targets that cannot have one."""
    model = source.config
    if config.lora_rank is None:
        return model
    targets = _targets(config)
    fused = {}
    for whole, parts in FAMILIES[model.family].fused.items():
        fused |= {part.split(".")[-2]: whole.split(".")[-2] for part in parts}
    if wrong := [name for name in targets if name in fused]:
        rest = ",".join(name for name in LINEARS if name not in fused)
        raise UserError(
            f"--lora-targets {config.lora_targets}: in {model.family} {', '.join(wrong)} are parts of "
            f"{', '.join(dict.fromkeys(fused[name] for name in wrong))}, whose adapters are not "
            f"implemented; use --lora-targets {rest}"
        )
    if source.files is not None and has_others(source.files):
        raise UserError(
            f"--lora-rank: {source.name} holds more than a language model, and PEFT names its layers "
            "otherwise; adapters are implemented for language models alone"
        )
    alpha = float(config.lora_rank if config.lora_alpha is None else config.lora_alpha)
    model = dataclasses.replace(
        model, lora=Lora(config.lora_rank, alpha, targets, config.rslora, config.lora_dropout or 0.0, config.seed)
    )
    return model


def _targets(config: TrainConfig) -> tuple[str, ...]:
    if config.lora_targets == "all":
        return LINEARS
    asked = [name.strip() for name in config.lora_targets.split(",")]
    unknown = [name for name in asked if name not in LINEARS]
    if unknown:
        raise UserError(
            f"--lora-targets {config.lora_targets}: {', '.join(map(repr, unknown))} matches no linear "
            f"layer; use all, or some of {','.join(LINEARS)}"
        )
    return tuple(name for name in LINEARS if name in asked)


def check_others(freeze: str | None, model: ModelConfig) -> None:
    """UserError for parameters trained beside the adapters that PEFT's format, whole modules to save, cannot hold."""
    modules: dict[tuple[str, ...], set[bool]] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(model, jnp.float32)):
        if not is_adapter(path):
            modules.setdefault(names(path)[:-1], set()).add(is_trained(path, freeze, model.lora))
    for module, trained in modules.items():
        if True in trained and (module[-1] in model.lora.targets or len(trained) > 1):
            raise UserError(
                f"--freeze {freeze!r} with adapters: {'.'.join(module)} has an adapter or is trained in "
                "part, and PEFT saves whole modules without adapters; let --freeze match it, as in "
                "--freeze 'proj|embed_tokens|lm_head', which trains the norms"
            )
    if model.tie_word_embeddings and True in modules["embed_tokens",]:
        raise UserError(
            f"--freeze {freeze!r} with adapters: embedding and head are one table here, which PEFT cannot "
            "save as one; let --freeze match embed_tokens"
        )


def settings(lora: Lora | None) -> dict[str, Any]:
    """The settings that a resumed run must share with its checkpoint, by the names of its flags."""
    if lora is None:
        return {}
    return {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_targets": ",".join(lora.targets),
        "rslora": lora.rslora,
        "lora_dropout": lora.dropout or None,
    }  # None: of checkpoints before the flag


# ------------------------------------------------------------------------------------------------------------- weights


def begin(config: TrainConfig, source: ModelSource, step: TrainStep, dtype: jnp.dtype) -> Any:
    """The parameters before the first step."""
    if config.adapter is not None:
        check_base(config, source)
    params = load_weights(source, step, dtype, config.seed)
    if config.adapter is None:
        return params
    return step.join(load_adapter(config.adapter, step.model, step.trained), step.split(params)[1])


def check_base(config: TrainConfig, source: ModelSource) -> None:
    """UserError if --adapter was trained beside other weights than --model's, or with other positions; a warning if its
    files do not say."""
    adapter, saved, now = config.adapter, read_base(config.adapter), identity(source, config.seed)
    base = read_lora(adapter).base
    if saved is not None:
        _check_rope(config, saved)
        base, hashed, escape = saved.name, saved.hash, f"remove {pathlib.Path(adapter) / BASE}"
    elif base and pathlib.Path(base).is_dir():
        there = dataclasses.replace(source, name=base, hf_weights=pathlib.Path(base), checkpoint=None)
        hashed = identity(there, config.seed)["hash"]
        escape = f"write --model's name into {pathlib.Path(adapter) / CONFIG}"
    elif base == source.name:
        return
    else:
        print(
            f"warning: --adapter {adapter}: its base model {base or 'has no name in it and'} is not on this machine "
            f"and cannot be compared with --model {source.name}; only the shapes are known to fit",
            file=sys.stderr,
            flush=True,
        )
        return
    if hashed != now["hash"]:
        raise UserError(
            f"--adapter {adapter} was trained with the base model {base or hashed}, and the weights of "
            f"--model {source.name} differ; name that base model with --model, or {escape} to continue "
            "with this one"
        )


def _check_rope(config: TrainConfig, saved: Base) -> None:
    """UserError unless the positions are stretched as in the training of the adapter."""
    words = lambda given: (
        " ".join(
            f"{flag(name)} {value}" for name, value in (given or {}).items() if value is not None and name != "seq_len"
        )
        or "the model's own positions"
    )
    was, now = words(saved.rope), words(rope_flags(config))
    if was != now:
        raise UserError(
            f"--adapter {config.adapter} was trained with {was}, and this run has {now}; give the run the "
            "same, or merge the adapter (python -m convert.merge) and stretch the merged model"
        )


def resume_base(config: TrainConfig, step: TrainStep, dtype: jnp.dtype) -> Any:
    """The frozen parameters of a resumed run, from its base model. UserError if that is another one now."""
    run = run_directory.read_run_file(config.out)
    name = config.model or run["base"]["name"] or run["flags"]["model"]
    source = find_model(dataclasses.replace(config, resume=False, model=name), tokenizer=False)
    now, saved = identity(source, config.seed), run["base"]
    if now["hash"] != saved["hash"]:
        raise UserError(
            f"--resume: {source.name} is not the base model that the adapters were trained beside, "
            f"{saved['name']}: its weights differ. Put that model back, or name its place with --model"
        )
    return step.split(load_weights(source, step, dtype, config.seed))[1]


def export(config: TrainConfig, step: TrainStep, trained: Any) -> None:
    """Write OUT/adapter."""
    out = pathlib.Path(config.out)
    saved = run_directory.read_run_file(out)["base"]
    base = saved["name"]
    save_adapter(out / ADAPTER, trained, step.model, base)
    Base(base, saved["hash"], rope_flags(config)).write(out / ADAPTER)
    if base and ((pathlib.Path(base) / "config.json").is_file() or not pathlib.Path(base).exists()):  # or of a hub
        load = f"peft.AutoPeftModelForCausalLM.from_pretrained({str(out / ADAPTER)!r})"
        print(f"wrote {out / ADAPTER}: {load} loads it beside {base}")
    else:
        print(
            f"wrote {out / ADAPTER}, in PEFT's format; its base model is no Hugging Face directory, so PEFT needs "
            "one to load it: --merge-adapter writes the whole model"
        )
    if is_extended(config):
        print(
            f"warning: the adapter was trained with another rotary embedding than that of {base}'s config.json; use "
            f"it with {out / run_directory.MODEL / 'config.json'}, or merge it (--merge-adapter, convert.merge)",
            file=sys.stderr,
        )


def merged_params(step: TrainStep, params: Any) -> Any:
    """The parameters of the base model with the adapters added, for `run_state.export`."""
    return merged(params, step.model.lora)
