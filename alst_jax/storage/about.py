"""All that a checkpoint's numbers depend on, written beside it: DIR/checkpoints/STEP/about.json; and its printing."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax

from alst_jax.config import TrainConfig, UserError
from alst_jax.declare import flag
from alst_jax.ops.attention import refusal
from alst_jax.ops.attention.devices import Chosen
from alst_jax.step import TrainStep
from alst_jax.storage import parts
from alst_jax.storage.run_directory import CHECKPOINTS, find_checkpoint, has_results, read_run_file

FILE = parts.ABOUT.name
PACKAGES = (
    "alst-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "flash-attn-4",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)


def about(
    config: TrainConfig,
    step: TrainStep,
    attention: Chosen,
    settings: dict[str, Any],
    shapes: dict[str, Any],
    plan: dict[str, Any] | None,
) -> dict[str, Any]:
    """The record that `--explain-run` prints, as JSON: the current state of the run, also after a resume.

    settings: the settings that a resumed run must share. shapes: of the step. plan: of --memory auto, None without one.
    """
    return {
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "flags": json.loads(json.dumps(dataclasses.asdict(config))),
        "versions": _versions(),
        "git": git_revision(),
        "devices": _devices(step),
        "settings": settings,
        "shapes": shapes,
        "kernels": _kernels(step, attention),
        "profile": json.loads(json.dumps(dataclasses.asdict(step.profile))),
        "plan": plan,
    }


def write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    (folder / FILE).write_text(json.dumps(content, indent=1))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an extra, or run from a source tree
            continue
    return found


def git_revision(folder: pathlib.Path = pathlib.Path(__file__).parent) -> str | None:
    """The commit of the program, and whether files were changed since; None outside of a git repository."""
    ask = lambda *words: subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    try:
        head, status = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + " with changes" * bool(status.stdout.strip())


def _devices(step: TrainStep) -> dict[str, Any]:
    dp, sp = step.mesh.devices.shape
    device = step.mesh.devices.flat[0]
    return {
        "kind": device.device_kind,
        "count": dp * sp,
        "dp": dp,
        "sp": sp,
        "platform": device.client.platform_version,
        "host": platform.node(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "processes": jax.process_count(),
    }


def _kernels(step: TrainStep, attention: Chosen) -> list[list[str]]:
    """[part, kernel, reason] of each part of a step that has several kernels."""
    profile, model = step.profile, step.model
    tiles = lambda tile: "whole" if tile is None else f"tiles of {tile or 'the default number of'} tokens"
    rows = [
        [
            f"attention, {kind}" if len(model.kinds) > 1 else "attention",
            profile.attention,
            refusal(attention.kernel, model.attention_spec(kind)) or attention.why,
        ]
        for kind in model.kinds
    ]
    return [
        *rows,
        ["MLP", tiles(profile.mlp_tile), "--tiled-mlp, --mlp-tile"],
        ["loss", tiles(profile.loss_tile), "--tiled-loss, --loss-tile"],
        ["layers", profile.stack, "--stack"],
        ["sums over devices", profile.reduce_dtype, "--reduce-dtype"],
    ]


# ---------------------------------------------------------------------------------------------------------- explaining


def explain(path: str) -> str:
    """All that is recorded about the newest checkpoint of a run, or of a step's directory."""
    if pathlib.Path(path).joinpath("run.json").is_file() and not has_results(path):
        read_run_file(path)
        raise UserError(f"--explain-run {path}: the run has saved no checkpoint yet")
    run_dir, step = find_checkpoint(path)
    folder = run_dir / CHECKPOINTS / str(step)
    run = read_run_file(run_dir)
    lines = [
        f"{folder}",
        f"kind      {run.get('kind')}" + (f" from {run['from']}" if "from" in run else ""),
        f"holds     {'; '.join(f'{part.name}: {part.holds}' for part in parts.present(folder))}",
    ]
    if not (folder / FILE).is_file():
        words = [f"{name} {version}" for name, version in run.get("versions", {}).items()]
        lines += [f"versions  {', '.join(words)}", *_flags(run.get("flags", {}))]
        return "\n".join([*lines, f"(saved without {FILE}: devices, plan and kernels are not recorded)"])
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return "\n".join([*lines, *_lines(record)])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder / FILE} is not what a run writes ({error!r}); python -m convert.verify {run_dir} "
            "says which files are damaged"
        ) from error


def _lines(record: dict[str, Any]) -> list[str]:
    devices = record["devices"]
    pairs = lambda values: ", ".join(f"{name} {value}" for name, value in values.items())
    lines = [
        f"command   {' '.join(record['command'])}",
        f"started   {record['started']}",
        f"program   {record['git'] or 'not in a git repository'}",
        f"versions  {pairs(record['versions'])}",
        f"devices   {devices['count']} x {devices['kind']}, dp {devices['dp']} x sp {devices['sp']}, "
        f"{' '.join(devices['platform'].split())}",
        f"host      {devices['host']}, {devices['system']}, {devices['cores']} cores, {devices['processes']} processes",
        f"XLA_FLAGS {devices['XLA_FLAGS'] or 'none'}",
        f"shapes    {pairs(record['shapes'])}",
        f"settings  {pairs(record['settings'])}",
        f"profile   {pairs(record['profile'])}",
        f"plan      {pairs(record['plan']) if record['plan'] else 'none: the flags alone (--memory manual, or a CPU)'}",
        "kernels",
    ]
    width = max(len(what) for what, _, _ in record["kernels"])
    return [
        *lines,
        *(f"  {what:{width}}  {kernel}  ({why})" for what, kernel, why in record["kernels"]),
        *_flags(record["flags"]),
    ]


def _flags(flags: dict[str, Any]) -> list[str]:
    """A line a flag; those with their default at the end of the line."""
    default = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))
    shown = {name: value for name, value in flags.items() if name not in ("typed", "explain_run")}
    return [
        "flags",
        *(
            f"  {flag(name)} {_word(value)}{'  (default)' if default.get(name) == value else ''}"
            for name, value in shown.items()
        ),
    ]


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
