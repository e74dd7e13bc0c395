"""Adapters in PEFT's format: DIR/adapter_config.json and DIR/adapter_model.safetensors.

Parameters that are trained beside the adapters are PEFT's `modules_to_save`.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import jax

from alst_jax.config import UserError
from alst_jax.models.config import ModelConfig
from alst_jax.models.hf_saving import tensors_of
from alst_jax.models.hf_weights import is_transposed, leaf_names, load_leaf
from alst_jax.models.lora import LINEARS, Lora, is_adapter
from alst_jax.models.tree import is_stacked
from alst_jax.models.weight_files import ADAPTER as CONFIG
from alst_jax.models.weight_files import Tensor, find_tensors, write_file

WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"  # ours, which PEFT does not read: see `Base`
PREFIX = "base_model.model."  # of the names of a PEFT model's tensors
READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save"}
# Fields that do not change the numbers that an adapter computes.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "task_type",
    "target_modules_bd_a",
    "megatron_core",
    "qalora_group_size",
    "init_lora_weights",
    "exclude_modules",
    "ensure_weight_tying",
    "runtime_config",
    "ephemeral_gpu_offload",
}
FIXED = {"peft_type": "LORA", "bias": "none"}
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva", None)  # others change the base weights too


# ------------------------------------------------------------------------------------------------------------- writing


def save_adapter(out: pathlib.Path, trained: Any, config: ModelConfig, base: str | None) -> None:
    """Write the trained parameters, the adapters of `config.lora` and others. base: name of the base model."""
    out.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    tensors = [tensor._replace(name=PREFIX + tensor.name) for tensor in tensors_of(leaves, config)]
    partial = out / f".{WEIGHTS}"
    write_file(partial, sorted(tensors, key=lambda tensor: tensor.name))
    partial.replace(out / WEIGHTS)
    lora, kept = config.lora, modules_to_save(leaves, config)
    number = lambda x: int(x) if x == int(x) else x  # PEFT's type is int
    fields = FIXED | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": number(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": list(lora.targets),
        "modules_to_save": kept or None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    (out / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def modules_to_save(leaves: list[tuple[tuple, Any]], config: ModelConfig) -> list[str]:
    """PEFT's names of the modules that the leaves outside of adapters belong to. PEFT looks for modules whose name ends
    so."""
    found = []
    for path, _ in leaves:
        if not is_adapter(path):
            module = leaf_names(path, config)[0].rpartition(".")[0]
            found.append(module.rpartition(".")[2] if is_stacked(path) else module)
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------------------------------------------- base model


class Base(NamedTuple):
    """The base model of an adapter of ours: its name, a hash of its weights, and the flags that stretched its
    positions, with --seq-len (None: none did)."""

    name: str | None
    hash: str
    rope: dict[str, Any] | None = None

    def write(self, directory: pathlib.Path) -> None:
        (directory / BASE).write_text(json.dumps(self._asdict(), indent=2) + "\n", encoding="utf-8")


def read_base(directory: str | pathlib.Path) -> Base | None:
    """None: the directory does not say."""
    file = pathlib.Path(directory) / BASE
    if not file.is_file():
        return None
    try:
        return Base(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is not what a run with adapters writes ({error}); remove it to use the adapter beside "
            "any model with its shapes"
        ) from error


# ------------------------------------------------------------------------------------------------------------- reading


class Found(NamedTuple):
    """The adapters that a directory holds, the dropout that they were trained with, and the base model's name."""

    lora: Lora
    dropout: float
    base: str | None


def read_lora(directory: str | pathlib.Path) -> Found:
    """The adapters that a directory holds. UserError for options that are not implemented."""
    path = pathlib.Path(directory)
    if not (path / CONFIG).is_file():
        raise UserError(
            f"--adapter {path}: no {CONFIG} there; name a directory that PEFT, or a run with --lora-rank, has written"
        )
    try:
        raw = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        fields = dict(raw)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path / CONFIG} is not valid JSON: {error}") from error
    wrong = [
        f"{name}={raw.get(name)!r} ({value!r} is)" for name, value in FIXED.items() if raw.get(name, value) != value
    ]
    known = READ | HARMLESS | FIXED.keys()
    wrong += [f"{name}={value!r}" for name, value in fields.items() if value and name not in known]
    if raw.get("init_lora_weights", True) not in BEGINNINGS:
        wrong.append(f"init_lora_weights={raw['init_lora_weights']!r}, which changes the base model too")
    if wrong:
        raise UserError(f"{path / CONFIG}: not implemented: {', '.join(wrong)}")
    rank, alpha, dropout = raw.get("r", 8), raw.get("lora_alpha", 8), raw.get("lora_dropout", 0.0)
    for name, value, least in (("r", rank, 1), ("lora_alpha", alpha, 0), ("lora_dropout", dropout, 0)):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        wrong = name == "r" and not isinstance(value, int) or name == "lora_dropout" and number and value >= 1
        if not number or value < least or wrong:
            raise UserError(f"{path / CONFIG}: {name}={value!r} is no value of this field")
    return Found(
        Lora(rank, float(alpha), _targets(path), bool(raw.get("use_rslora"))),
        float(dropout),
        raw.get("base_model_name_or_path"),
    )


def _targets(path: pathlib.Path) -> tuple[str, ...]:
    """The linear layers that have adapters, from the names of the tensors: `target_modules` may be a pattern."""
    found = {name.split(".")[-3] for name in adapter_tensors(path) if ".lora_" in name}
    others = sorted(found - set(LINEARS))
    if others or not found:
        raise UserError(
            f"{path / WEIGHTS}: adapters of {', '.join(others) or 'no module'}; implemented are those of "
            f"{', '.join(LINEARS)}"
        )
    return tuple(name for name in LINEARS if name in found)


def adapter_tensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Name in the model -> place of each tensor of an adapter."""
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{path} has {CONFIG} and no {WEIGHTS}; save the adapter with PEFT's save_pretrained")
    tensors = find_tensors(path, [path / WEIGHTS])
    strange = [name for name in tensors if not name.startswith(PREFIX)]
    if strange:
        raise UserError(f"{path / WEIGHTS}: {strange[0]} is no name of PEFT's, which begin with {PREFIX}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def load_adapter(directory: str | pathlib.Path, config: ModelConfig, abstract: Any) -> Any:
    """The trained parameters from an adapter's directory, as `abstract` says (ShapeDtypeStructs with shardings).

    UserError unless the files hold exactly these: an adapter of another base model or rank does not.
    """
    path = pathlib.Path(directory)
    tensors, expected = adapter_tensors(path), {}
    for where, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        shape = leaf.shape[1:] if is_stacked(where) else leaf.shape
        for name in leaf_names(where, config):
            expected[name] = tuple(shape[::-1] if is_transposed(where) else shape)
    problems = [
        f"{name} is {_shape(tensors.get(name))} there and {list(expected.get(name, ())) or 'nothing'} here"
        for name in {**expected, **tensors}
        if name not in tensors or tensors[name].shape != expected.get(name)
    ]
    if problems:
        raise UserError(
            f"--adapter {path} is of another base model than --model, or trains other modules: "
            f"{'; '.join(problems[:3])}{', ...' * (len(problems) > 3)}. Name the base model of the adapter "
            "with --model; of modules trained in full (modules_to_save), --freeze must leave the same ones"
        )
    return jax.tree_util.tree_map_with_path(lambda where, leaf: load_leaf(where, leaf, tensors, config), abstract)


def _shape(tensor: Tensor | None) -> Any:
    return "missing" if tensor is None else list(tensor.shape)
