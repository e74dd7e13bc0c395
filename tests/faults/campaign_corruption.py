"""python -m tests.faults.campaign_corruption 100 --results FILE: corrupt one file of a run, read all, expect a refusal.

A case damages one file of a copy of a small run: a bit flipped, a byte set, cut short, made longer, zeroed in part,
taken away, taken from another step, or a file put beside. It is refused if resuming (the loop, the run's own files,
weights, optimizer), loading the export, and `convert.verify` each refuse what they read, with a UserError that names
the file. Cases are numbered: the number is the seed. The results file gets a line a case; a second call goes on.
"""

import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tyro

from alst_jax.config import UserError
from alst_jax.data.tokenizer import byte_tokenizer
from alst_jax.models.hf_config import hf_config_dict
from alst_jax.models.weight_files import find_tensors
from alst_jax.storage import checksums, run_directory
from alst_jax.storage.checkpoint import Checkpoints
from convert.verify import verify
from tests.helpers import TINY

KINDS = ("bit", "byte", "cut", "longer", "zeros", "missing", "other step", "beside")


def campaign(cases: tyro.conf.Positional[int] = 100, results: pathlib.Path | None = None) -> int:
    """Add cases to the results until they hold this many. Exit code 1 if one was not refused."""
    first = len(results.read_text().splitlines()) if results and results.exists() else 0
    lines = []
    with tempfile.TemporaryDirectory(prefix="corruption-") as folder:
        intact = make_run(pathlib.Path(folder) / "intact")
        assert not refusals(intact), refusals(intact)
        for number in range(first, cases):
            run_dir = shutil.copytree(intact, pathlib.Path(folder) / "run")
            kind, name = damage(run_dir, random.Random(number))
            found = refusals(run_dir)
            names = [
                part for part, words in found.items() if pathlib.PurePath(name).name in words or "other name" in words
            ]
            lines.append(
                {
                    "case": number,
                    "kind": kind,
                    "file": name,
                    "refused_by": sorted(found),
                    "named_by": sorted(names),
                    "refused": "verify" in found and len(found) > 1,
                }
            )
            if results:
                with results.open("a") as stream:
                    stream.write(json.dumps(lines[-1]) + "\n")
            print(json.dumps(lines[-1]), flush=True)
            shutil.rmtree(run_dir)
    missed = [line for line in lines if not line["refused"]]
    print(
        f"{len(lines) - len(missed)} of {len(lines)} refused, {sum(bool(line['named_by']) for line in lines)} by the file's name"
    )
    return 1 if missed else 0


def make_run(run_dir: pathlib.Path) -> pathlib.Path:
    """A run with two checkpoints and an export."""
    run_directory.write_run_file(run_dir, "training", {"flags": {"learning_rate": 0.001}})
    (run_dir / "model").mkdir()
    (run_dir / "model" / "config.json").write_text(json.dumps(hf_config_dict(TINY)))
    byte_tokenizer().save_pretrained(run_dir / "model")
    checkpoints = Checkpoints(run_dir)
    rng = np.random.default_rng(0)
    for step in (2, 4):
        tree = {f"a{i}": {"kernel": jnp.asarray(rng.normal(size=(3, 50, 40)), jnp.float32)} for i in range(4)}
        checkpoints.save(
            step,
            tree,
            {"mu": tree, "count": jnp.int32(step)},
            {"step": step, "geometry": {"rows": 2}, "data": {"at": step}},
        )
    checkpoints.close()
    hf = run_dir / "hf"
    hf.mkdir()
    safetensors.numpy.save_file({"w": rng.normal(size=(30, 20)).astype(np.float32)}, hf / "model.safetensors")
    checksums.seal_weights(hf)
    return run_dir


def damage(run_dir: pathlib.Path, rng: random.Random) -> tuple[str, str]:
    """(kind, file) of what was done to the newest checkpoint, the run's own files or the export."""
    top = run_dir / "checkpoints" / "4"
    files = [
        f for f in sorted(top.rglob("*")) if f.is_file() and f.name not in checksums.LATE or f.parent.parent == top
    ]
    files = [f for f in files if f.is_file() and f.stat().st_size]
    files += [run_dir / "run.json", *sorted((run_dir / "model").iterdir()), *sorted((run_dir / "hf").iterdir())]
    file, kind = rng.choice(files), rng.choice(KINDS)
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    if kind == "other step":
        other = sorted(f for f in (run_dir / "checkpoints" / "2").rglob("*") if f.is_file() and f.suffix == file.suffix)
        same = [f for f in other if f.name == file.name] or other
        content = bytearray(rng.choice(same).read_bytes()) if same else content
        if content == file.read_bytes():
            kind, at = "bit", rng.randrange(len(content))
    if kind == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        content[at] = (content[at] + rng.randrange(1, 256)) % 256
    elif kind == "cut":
        content = content[:at]
    elif kind == "longer":
        content += os.urandom(rng.randint(1, 100))
    elif kind == "zeros":
        if not any(content[at : at + 512]):
            at = 0
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    elif kind == "beside" and file.is_relative_to(top):
        file = file.with_name("stale-" + file.name)
    elif kind in ("missing", "beside"):
        file.unlink()
        return "missing", str(file.relative_to(run_dir))
    file.write_bytes(content)
    return kind, str(file.relative_to(run_dir))


def refusals(run_dir: pathlib.Path) -> dict[str, str]:
    """Who refuses the run -> the words. Any other exception than a UserError goes up."""
    checkpoints = Checkpoints(run_dir)
    readers = {
        "loop": lambda: checkpoints.restore_loop(4),
        "run files": lambda: checkpoints.check_run_files(4),
        "params": lambda: dict(checkpoints.read_item(4, "params")),
        "optimizer": lambda: dict(checkpoints.read_item(4, "optimizer")),
        "export": lambda: checksums.verify_weights(run_dir / "hf") or find_tensors(run_dir / "hf"),
        "verify": lambda: verify(run_dir),
    }
    found = {}
    for name, read in readers.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if read() == 1 and name == "verify":
                    found[name] = "not verified"
        except UserError as error:
            found[name] = str(error)
    checkpoints.close()
    return found


if __name__ == "__main__":
    sys.exit(tyro.cli(campaign))
