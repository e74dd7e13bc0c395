"""The model of --model: a Hugging Face directory or hub name, a checkpoint, or by default the embedded tiny Llama."""

import dataclasses
import hashlib
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alst_jax.config import TrainConfig, UserError
from alst_jax.data.tokenizer import byte_tokenizer, has_tokenizer, load_tokenizer, use_template
from alst_jax.models.config import TINY_LLAMA, ModelConfig
from alst_jax.models.extend import extend
from alst_jax.models.hf_config import model_config
from alst_jax.models.hf_weights import load_params
from alst_jax.models.lora import adapters_of
from alst_jax.models.other_weights import has_others
from alst_jax.models.tree import combine
from alst_jax.models.weight_files import find_tensors, read_tensor
from alst_jax.processes.files import check_same_files
from alst_jax.step import TrainStep
from alst_jax.storage import checksums, run_directory
from alst_jax.storage.checkpoint import Checkpoints

SAMPLE = 4096  # bytes of each tensor in the hash of a base model


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model and the place of its weights: a Hugging Face directory, a checkpoint, or none (drawn at random)."""

    name: str
    config: ModelConfig
    tokenizer: Any
    files: pathlib.Path | None  # config.json, tokenizer: copied into the export
    hf_weights: pathlib.Path | None = None
    checkpoint: tuple[pathlib.Path, int] | None = None
    resize: bool = False  # the vocabulary may be larger than the weights have rows


def find_model(config: TrainConfig, tokenizer: bool = True) -> ModelSource:
    """The model in the run directory when resuming, the model of --model, or the embedded tiny Llama.

    tokenizer: load it too. A plan needs none. --resize-vocabulary does.
    """
    source = _find(config, tokenizer or config.resize_vocabulary)
    if not config.resume:  # the config.json of a run has its positions already
        source = dataclasses.replace(source, config=extend(source.config, source.files, config))
    if not config.resize_vocabulary:
        return source
    tokens = 1 + max(source.tokenizer.get_vocab().values())
    if tokens > source.config.vocab_size and source.checkpoint is not None:
        raise UserError(
            f"--resize-vocabulary: {source.name} is a checkpoint with {source.config.vocab_size} rows for "
            f"{tokens} tokens; rows are added to Hugging Face directories only. Convert it first "
            "(python -m convert.to_hf CHECKPOINT HF_DIR)"
        )
    larger = dataclasses.replace(source.config, vocab_size=max(tokens, source.config.vocab_size))
    return dataclasses.replace(source, config=larger, resize=True)


def _find(config: TrainConfig, tokenizer: bool) -> ModelSource:
    if config.resume:
        run_dir = pathlib.Path(config.out)
        if run_directory.read_run_file(run_dir).get("kind") != "training":
            raise UserError(
                f"--resume --out {run_dir}: a converted model, not a run; train it with --model {run_dir} "
                "and another --out"
            )
        files = run_dir / run_directory.MODEL
        named = files if config.model is None else _model_files(config.model)  # compared with the run's own later
        model = model_config(named) if config.model is None else extend(model_config(named), named, config)
        return ModelSource(str(config.model or files), model, _tokenizer(files, config), files)
    if config.model is None:
        return ModelSource("the embedded tiny Llama", TINY_LLAMA, _tokenizer(None, config) if tokenizer else None, None)
    files = _model_files(config.model, weights=not (config.random_weights or config.planning))
    if config.random_weights:
        if config.export and has_others(files):
            raise UserError(
                f"--random-weights --export: {config.model} is more than a language model, and its other "
                "weights are not drawn; leave out --export, or give the config of the language model alone"
            )
        own = files if has_tokenizer(files) else None
        made = _tokenizer(own, config) if tokenizer else None
        return ModelSource(f"{config.model}, random weights", model_config(files), made, files)
    parts = (config.model, model_config(files), _tokenizer(files, config) if tokenizer else None, files)
    if run_directory.is_checkpoint(config.model):
        return ModelSource(*parts, checkpoint=run_directory.find_checkpoint(config.model))
    return ModelSource(*parts, hf_weights=files)


def _tokenizer(files: pathlib.Path | None, config: TrainConfig) -> Any:
    """The tokenizer of a directory, or the embedded one, with the template of --chat-template."""
    tokenizer = byte_tokenizer() if files is None else load_tokenizer(files)
    use_template(tokenizer, config.chat_template, same=config.resume)
    return tokenizer


def _model_files(model: str, weights: bool = True) -> pathlib.Path:
    """The directory with the config and tokenizer of --model. weights: of a model on the hub, fetch its weights too."""
    if not model:
        raise UserError("--model '': name a Hugging Face directory, a hub name or a checkpoint")
    if run_directory.is_checkpoint(model):
        run_dir = run_directory.find_checkpoint(model)[0]
        run_directory.refuse_adapters(run_dir)
        return run_dir / run_directory.MODEL
    return _hub_directory(model, weights)


def _hub_directory(model: str, weights: bool) -> pathlib.Path:
    path = pathlib.Path(model)
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        return path  # model_config names the fault
    from huggingface_hub import snapshot_download

    try:
        ignored = ["*.bin", "*.pth", "*.gguf", "original/*", *(() if weights else ("*.safetensors",))]
        return pathlib.Path(snapshot_download(model, ignore_patterns=ignored))
    except Exception as error:  # the hub's client raises many kinds; all mean: not available
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--model {model}: no such directory, and no such model could be fetched from the hub ({reason})"
        ) from error


def load_weights(source: ModelSource, step: TrainStep, dtype: jnp.dtype, seed: int) -> Any:
    """The weights, with the shardings and memory kinds of the step. Adapters are new ones."""
    if source.hf_weights is None and source.checkpoint is None:
        return step.init_params(jax.random.key(seed), dtype)
    if step.model.lora is None:
        return _load(source, step, step.params)
    return combine(step.init_adapters(jax.random.key(seed), dtype), _load(source, step, adapters_of(step.params)[1]))


def _load(source: ModelSource, step: TrainStep, abstract: Any) -> Any:
    """The weights that `abstract` describes, from the files of the source."""
    if source.hf_weights is not None:
        check_same_files(f"the weights of --model {source.hf_weights}", list(source.hf_weights.glob("*.safetensors")))
        checksums.verify_weights(source.hf_weights, together=True)
        wide = any(tensor.dtype == np.float32 for tensor in find_tensors(source.hf_weights).values())
        if wide and step.profile.compute_dtype == "bfloat16":
            print(
                f"warning: the float32 weights of {source.name} are rounded to bfloat16; --dtype float32 keeps them",
                file=sys.stderr,
                flush=True,
            )
        return load_params(source.hf_weights, source.config, abstract, source.resize)
    run_dir, at = source.checkpoint
    checkpoints = Checkpoints(run_dir)
    checkpoints.check_run_files(at)
    params = checkpoints.restore_params(at, abstract)
    checkpoints.close()
    return params


def identity(source: ModelSource, seed: int) -> dict[str, str | None]:
    """The name of a base model and a hash of its weights: of the names, types, shapes and first bytes of all
    tensors."""
    if source.hf_weights is None and source.checkpoint is None:
        return {"name": None, "hash": f"drawn with --seed {seed}"}
    found = hashlib.sha256()
    if source.hf_weights is not None:
        name = source.hf_weights.absolute() if pathlib.Path(source.name).exists() else source.name
        for key, tensor in sorted(find_tensors(source.hf_weights).items()):
            found.update(repr((key, tensor.shape, str(tensor.dtype))).encode())
            found.update(read_tensor(tensor, (slice(0, 1),)).tobytes()[:SAMPLE])
        return {"name": str(name), "hash": found.hexdigest()}
    run_dir, at = source.checkpoint
    checkpoints = Checkpoints(run_dir)
    for key, array in sorted(checkpoints.open_params(at)):
        found.update(repr((key, array.shape, str(array.dtype))).encode())
        found.update(array[(slice(0, 1),) * (len(array.shape) - 1)].tobytes()[:SAMPLE])
    checkpoints.close()
    return {"name": str(run_dir / run_directory.CHECKPOINTS / str(at)), "hash": found.hexdigest()}
