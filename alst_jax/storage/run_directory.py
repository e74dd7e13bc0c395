"""The layout of a run directory. Training runs and converted models share it:

DIR/run.json              origin of the directory: kind, versions, flags
DIR/model/                config.json, tokenizer, chat template: the Hugging Face directory without its weights
DIR/checkpoints/STEP/     orbax items: params, optimizer (not in a conversion), loop (JSON: data position, geometry)
DIR/hf/                   the export at the end of a training run
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

from alst_jax.config import TrainConfig, UserError
from alst_jax.data.tokenizer import has_tokenizer
from alst_jax.declare import flag
from alst_jax.models.config import ModelConfig
from alst_jax.models.extend import record_extension
from alst_jax.models.hf_config import hf_config_dict, model_config, record_vocabulary
from alst_jax.models.other_weights import keep_others

CHECKPOINTS, MODEL, RUN_FILE, EXPORT = "checkpoints", "model", "run.json", "hf"
ADDED_FILE = "added.json"  # additions to the data, by --add-data
TEMPLATES = "additional_chat_templates"  # the folder of named chat templates beside chat_template.jinja
WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.safetensors.checksums.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.ot",
)

# ------------------------------------------------------------------------------------------------------------- finding


def find_checkpoint(path: str | pathlib.Path) -> tuple[pathlib.Path, int]:
    """(run directory, step) for a run directory, its checkpoints directory, or one step's directory."""
    given = pathlib.Path(path).absolute()
    located = _locate(given)
    if located is None:
        raise UserError(
            f"{path}: no checkpoint there; it is a directory with {RUN_FILE}, {MODEL}/ and {CHECKPOINTS}/, "
            "as convert.from_hf or a training run makes"
        )
    run_dir, step = located
    folder = run_dir / CHECKPOINTS
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if step is None and not steps:
        raise UserError(f"{path}: the run has saved no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"{path}: no such step; there are {', '.join(map(str, steps)) or 'none'}")
    return run_dir, steps[-1] if step is None else step


def _locate(path: pathlib.Path) -> tuple[pathlib.Path, int | None] | None:
    """The run directory that a path means, and its step if the path names one; None for other directories."""
    if is_run_directory(path):
        return path, None
    if path.name == CHECKPOINTS and is_run_directory(path.parent):
        return path.parent, None
    if path.name.isdigit() and path.parent.name == CHECKPOINTS and is_run_directory(path.parent.parent):
        return path.parent.parent, int(path.name)
    return None


def is_run_directory(path: str | pathlib.Path) -> bool:
    """Whether a training run or a conversion made this directory."""
    return (pathlib.Path(path) / RUN_FILE).is_file()


def has_results(run_dir: str | pathlib.Path) -> bool:
    """Whether a run directory holds a checkpoint or an export."""
    folder = pathlib.Path(run_dir)
    steps = folder / CHECKPOINTS
    return (folder / EXPORT).exists() or steps.is_dir() and any(p.name.isdigit() for p in steps.iterdir())


def is_checkpoint(path: str | pathlib.Path) -> bool:
    """Whether `find_checkpoint` accepts this path. Hugging Face directories are none."""
    return _locate(pathlib.Path(path).absolute()) is not None


def refuse_adapters(run_dir: str | pathlib.Path) -> None:
    """UserError for a run with adapters: its checkpoints are no whole model."""
    base = read_run_file(run_dir).get("base")
    if base is not None:
        raise UserError(
            f"{run_dir} is a run with adapters: its checkpoints do not hold the base model, "
            f"{base.get('name') or 'drawn at random'}. Go on with --resume, or train from its export with "
            f"--model BASE --adapter {run_dir}/adapter; python -m convert.merge {run_dir}/adapter BASE DIR "
            "makes a whole model"
        )


# ------------------------------------------------------------------------------------------------- starting a directory


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
    if is_run_directory(out) and not has_results(out):
        return out  # a run that ended before it saved anything: start it again
    if out.exists() and any(path.name != f".{RUN_FILE}" for path in out.iterdir()):  # the remains of a killed start
        what = "holds another run" if is_run_directory(out) else "is not empty"
        raise UserError(
            f"--out {out} {what}; choose another directory"
            + (", or continue that run with --resume" if is_run_directory(out) else "")
        )
    return out


def start_run_directory(
    out: pathlib.Path,
    config: TrainConfig,
    model: ModelConfig,
    tokenizer: Any,
    hf_dir: pathlib.Path | None,
    base: dict[str, Any] | None = None,
) -> None:
    """Write run.json and model/: the first files of a run. hf_dir: copy its model files, else make them. base: of a run
    with adapters, whose checkpoints hold no base model: its name and hash.

    run.json is first: a run that was killed here can be started again in the same directory.
    """
    write_run_file(
        out,
        "training",
        {"flags": dataclasses.asdict(config) | {"resume": False}} | ({} if base is None else {"base": base}),
    )
    if hf_dir is not None:
        copy_model_files(hf_dir, out / MODEL)
        if not config.random_weights:
            keep_others(hf_dir, out / MODEL)
        if not has_tokenizer(out / MODEL):  # of random weights
            tokenizer.save_pretrained(out / MODEL)
        elif config.chat_template is not None:
            write_template(tokenizer.chat_template, out / MODEL)
        record_vocabulary(out / MODEL, model.vocab_size)
        record_extension(out / MODEL, config)
    else:
        tokenizer.save_pretrained(out / MODEL)
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        fields = hf_config_dict(model) | {name: getattr(tokenizer, name) for name in special}
        (out / MODEL / "config.json").write_text(json.dumps(fields, indent=2))


def copy_model_files(hf_dir: str | pathlib.Path, out: str | pathlib.Path) -> None:
    """Copy a Hugging Face directory without its weights: config, tokenizer, chat templates, generation config."""
    source, target = pathlib.Path(hf_dir), pathlib.Path(out)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not any(file.match(p) for p in WEIGHT_FILES):
            shutil.copyfile(file, target / file.name)
    if (source / TEMPLATES).is_dir() and source.resolve() != target.resolve():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)


def write_template(template: str, model_dir: pathlib.Path) -> None:
    """Make this the only chat template of a Hugging Face directory."""
    shutil.rmtree(model_dir / TEMPLATES, ignore_errors=True)
    (model_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = model_dir / "tokenizer_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("chat_template", None)
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def write_run_file(run_dir: pathlib.Path, kind: str, extra: dict[str, Any]) -> None:
    """DIR/run.json; kind is "training" or "converted"."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
    run_dir.mkdir(parents=True, exist_ok=True)
    write_run_json(run_dir, {"kind": kind, "versions": versions, **extra})


def write_run_json(run_dir: pathlib.Path, content: dict[str, Any]) -> None:
    """Replace DIR/run.json, complete or not at all."""
    partial = run_dir / f".{RUN_FILE}"
    partial.write_text(json.dumps(content, indent=2))
    partial.replace(run_dir / RUN_FILE)


# ------------------------------------------------------------------------------------------------------------- resuming


def read_run_file(run_dir: str | pathlib.Path) -> dict[str, Any]:
    """DIR/run.json. UserError if it is missing or not JSON."""
    file = pathlib.Path(run_dir) / RUN_FILE
    if not file.is_file():
        raise UserError(f"{run_dir}: no run to resume there: it has no {RUN_FILE}; leave out --resume to start one")
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if (
        not isinstance(content, dict)
        or content.get("kind") not in ("training", "converted")
        or not all(isinstance(content.get(name, {}), dict) for name in ("flags", "versions"))
    ):
        raise UserError(
            f"{file} is not what a run writes: an object with kind (training or converted), versions and flags"
        )
    return content


def _are_additions(added: Any) -> bool:
    """Whether this is a list of additions to the data of a run, as `record_added` stores them."""
    return isinstance(added, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("step"), int)
        and isinstance(each.get("batches"), int)
        and isinstance(each.get("hash"), str)
        and isinstance(each.get("data"), list)
        and all(isinstance(path, str) for path in each["data"])
        for each in added
    )


def saved_model(out: pathlib.Path) -> ModelConfig:
    """The model of the run in `out`."""
    return model_config(out / MODEL)


def check_same_model(saved: ModelConfig, now: ModelConfig) -> None:
    """UserError that names each field in which two models differ."""
    before, after = dataclasses.asdict(saved), dataclasses.asdict(now)
    changed = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    if changed:
        raise UserError(
            f"--resume: the model has changed since the checkpoint ({'; '.join(changed)}); start a new run "
            "in another --out, or resume with the model it began with"
        )


def check_geometry(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError unless a resumed run sees the same data in the same order and trains the same parameters.

    Checkpoints written before a flag existed lack it, which counts as None. Older ones have the two factors of
    `samples_per_step`: "rows" and "grad_accum".
    """
    if "rows" in saved and "grad_accum" in saved:
        saved = saved | {"samples_per_step": saved["rows"] * saved["grad_accum"]}
    meaning = {
        "data": "--data",
        "samples_per_step": "--dp x --batch-size x --grad-accum, or --samples-per-step, the sequences of a step",
    }
    changed = [
        f"{meaning.get(name, flag(name))} ({saved.get(name)} -> {now[name]})"
        for name in now
        if saved.get(name) != now[name]
    ]
    if changed:
        raise UserError(
            f"--resume: changed since the checkpoint: {', '.join(changed)}. The position in the data or "
            "the state of the optimizer would no longer fit; set it back, or start a new run with "
            "--model on this run's directory (--add-data adds files)"
        )


def read_added(run_dir: str | pathlib.Path) -> list[dict[str, Any]]:
    """The additions to the data of a run, the oldest first: see `record_added`. UserError if the file is damaged."""
    file = pathlib.Path(run_dir) / ADDED_FILE
    try:
        added = json.loads(file.read_text()) if file.exists() else []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not _are_additions(added):
        raise UserError(f"{file} is not what --add-data writes; put back the file that was there")
    return added


def record_added(run_dir: pathlib.Path, added: Iterable[dict[str, Any]]) -> None:
    """Store the additions to the data of a run in DIR/added.json, complete or not at all.

    "data": the paths; "step": the step before the addition; "batches": batches of a step that were read before it,
    those left out included; "hash": of its sequences.
    """
    if list(added) != read_added(run_dir):
        partial = run_dir / f".{ADDED_FILE}"
        partial.write_text(json.dumps(list(added), indent=2))
        partial.replace(run_dir / ADDED_FILE)
